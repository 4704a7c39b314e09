"""requirements*.txt are what tools/requirements.py makes of pyproject.toml."""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_check(root):
  command = [sys.executable, str(root / "tools" / "requirements.py"), "--check"]
  return subprocess.run(command, capture_output=True, text=True, check=False)


def test_requirements_are_current():
  result = run_check(ROOT)
  assert result.returncode == 0, result.stdout + result.stderr


def test_check_names_stale_and_unknown_files(tmp_path):
  (tmp_path / "tools").mkdir()
  for path in [ROOT / "pyproject.toml", *ROOT.glob("requirements*.txt")]:
    shutil.copy(path, tmp_path)
  shutil.copy(ROOT / "tools" / "requirements.py", tmp_path / "tools")
  assert run_check(tmp_path).returncode == 0

  pyproject = tmp_path / "pyproject.toml"
  pyproject.write_text(pyproject.read_text().replace('"pytest>=', '"pytest>=1,>='))
  (tmp_path / "requirements-old.txt").touch()
  result = run_check(tmp_path)
  assert result.returncode == 1
  assert result.stdout.startswith("requirements-dev.txt, requirements-old.txt differ")
