"""Published weights to files that `--config.teacher.path` takes:

python -m dimo_jax.convert --source=PATH [--family=FAMILY] --out=DIR

DIR gets one safetensors file for each network (`teacher`, `generator`, `fake_score`, `critic`) and
`conversion.json`: the family, the sizes that the shapes tell, and the source's SHA-256. A file
there is replaced whole or not at all, and only once everything was converted.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dimo_jax.checkpoint import save_params
from dimo_jax.cli import BAD_INPUT
from dimo_jax.convert import families, files
from dimo_jax.remote import local_path
from dimo_jax.types import UserError

_RECORD = "conversion.json"


def convert(source: str, family: str, out: Path) -> dict[str, Any]:
  """Converts a file or folder and returns the record that it writes beside the networks.

  Args:
    source: as `remote.local_path` takes it.
    family: a key of FAMILIES; "" guesses it.
    out: a folder, made if need be.

  Raises:
    UserError: the source is missing or not of that family, or `out` cannot be written.
  """
  archive = files.read(local_path(source))
  converted = families.convert(archive, family)
  record = {
    "family": converted.family,
    "source": source,
    "source_sha256": _sha256(archive.path),
    "sizes": dict(converted.sizes),
  }
  process = {k: v for k, v in converted.sizes.items() if k.startswith("process.")}
  fields = {"teacher.name": families.FAMILIES[converted.family].teacher, **process}
  names = [f"{part}.safetensors" for part in converted.parts]
  try:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".converting-") as folder:
      for name, (part, params) in zip(names, converted.parts.items(), strict=True):
        if part == "critic":  # a head, no network of its own
          save_params(Path(folder, name), params, {"conversion": record})
        else:
          metadata = {"teacher": fields, "conversion": record}
          save_params(Path(folder, name), {"network": params}, metadata)
      text = json.dumps({**record, "files": names}, indent=1)
      Path(folder, _RECORD).write_text(text + "\n", encoding="utf-8")
      for name in (*names, _RECORD):
        os.replace(Path(folder, name), out / name)
  except OSError as error:
    raise UserError(f"--out={str(out)!r} cannot be written: {error.strerror}") from error
  return {**record, "files": names}


def main(argv: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  parser = argparse.ArgumentParser("python -m dimo_jax.convert", allow_abbrev=False)
  parser.add_argument("--source", required=True, help="file or folder; gs:// and hf:// too")
  parser.add_argument("--family", default="", help=f"guessed; {', '.join(families.FAMILIES)}")
  parser.add_argument("--out", required=True, type=Path, help="folder")
  arguments = parser.parse_args(argv)
  try:
    record = convert(arguments.source, arguments.family, arguments.out)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT
  sizes = ", ".join(f"{name}={size}" for name, size in record["sizes"].items())
  print(f"{arguments.source} is {families.FAMILIES[record['family']].title}: {sizes}")
  for name in record["files"]:
    print(f"wrote {arguments.out / name}")
  return 0


def _sha256(path: Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
  sys.exit(main())
