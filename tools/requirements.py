"""Writes requirements*.txt from pyproject.toml, or with --check says which one is stale.

python tools/requirements.py [--check]

Ranges are those of pyproject.toml: this is the one place to install from, not a lock file.
"""

import argparse
import pathlib
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADER = "# Generated from pyproject.toml by tools/requirements.py; do not edit.\n"


def render(pyproject: str) -> dict[str, str]:
  """The text of every requirements file, by file name, from the text of pyproject.toml."""
  project = tomllib.loads(pyproject)["project"]
  files = {"requirements.txt": HEADER + _lines(project["dependencies"])}
  for extra, wanted in project["optional-dependencies"].items():
    files[f"requirements-{extra}.txt"] = HEADER + "-r requirements.txt\n" + _lines(wanted)
  return files


def stale(root: pathlib.Path = ROOT) -> list[str]:
  """Names of the requirements files below `root` that are missing, differ or have no source."""
  files = render((root / "pyproject.toml").read_text())
  present = {path.name: path.read_text() for path in root.glob("requirements*.txt")}
  return sorted(n for n in files.keys() | present.keys() if files.get(n) != present.get(n))


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--check", action="store_true", help="write nothing, fail if one is stale")
  if parser.parse_args().check:
    if names := stale():
      print(f"{', '.join(names)} differ from pyproject.toml: run python tools/requirements.py")
      return 1
    return 0
  for name, text in render((ROOT / "pyproject.toml").read_text()).items():
    (ROOT / name).write_text(text)
  return 0


def _lines(requirements: list[str]) -> str:
  return "".join(f"{line}\n" for line in requirements)


if __name__ == "__main__":
  sys.exit(main())
