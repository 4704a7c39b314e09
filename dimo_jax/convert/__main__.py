"""Published weights to files that `--config.teacher.path` or `--config.tokenizer.path` takes, and
exports of this package to a generator in one file:

python -m dimo_jax.convert --source=PATH [--family=FAMILY] --out=DIR

DIR gets one safetensors file for each network (`teacher`, `generator`, `fake_score`, `critic`,
`tokenizer`) and `conversion.json`: the family, the sizes that the shapes tell, and the source's
SHA-256 (of an export that over its parameters). A file there is replaced whole or not at all, and
only once everything was converted.
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

from dimo_jax import artifacts
from dimo_jax.checkpoint import params_hash, save_params
from dimo_jax.cli import BAD_INPUT, IMPORT_HELP, guarded
from dimo_jax.convert import families, files
from dimo_jax.preemption import STOP
from dimo_jax.remote import local_path
from dimo_jax.types import Params, UserError, choose

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
  path = local_path(source)
  read = _read_published if files.export_folder(path) is None else _read_export
  record, networks = read(source, path, family)
  names = [f"{part}.safetensors" for part in networks]
  try:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".converting-") as folder:
      for name, (tree, metadata) in zip(names, networks.values(), strict=True):
        save_params(Path(folder, name), tree, {**metadata, "conversion": record})
      text = json.dumps({**record, "files": names}, indent=1)
      Path(folder, _RECORD).write_text(text + "\n", encoding="utf-8")
      for name in (*names, _RECORD):
        os.replace(Path(folder, name), out / name)
  except OSError as error:
    raise UserError(f"--out={str(out)!r} cannot be written: {error.strerror}") from error
  return {**record, "files": names}


_Networks = dict[str, tuple[Params, dict[str, Any]]]  # by name: (tree to write, its metadata)


def _read_published(source: str, path: Path, family: str) -> tuple[dict[str, Any], _Networks]:
  archive = files.read(path)
  converted = families.convert(archive, family)
  record = {
    "family": converted.family,
    "source": source,
    "source_sha256": _sha256(archive.path),
    "sizes": dict(converted.sizes),
  }
  process = {k: v for k, v in converted.sizes.items() if k.startswith("process.")}
  fields = {"teacher.name": families.FAMILIES[converted.family].teacher, **process}
  networks: _Networks = {}
  for part, params in converted.parts.items():
    if part in ("critic", "tokenizer"):  # no teacher's network
      networks[part] = params, {}
    else:
      networks[part] = {"network": params}, {"teacher": fields}
  return record, networks


def _read_export(source: str, path: Path, family: str) -> tuple[dict[str, Any], _Networks]:
  artifact = artifacts.load(path)
  found = artifacts.TORCH_FAMILIES[artifact.kind]
  if family and choose(families.FAMILIES, family, "--family") is not families.FAMILIES[found]:
    title = families.FAMILIES[found].title
    raise UserError(f"{source} is an export of dimo_jax, {title}: --family={family!r} is another's")
  if not isinstance(artifact, artifacts.NetworkArtifact):
    raise UserError(f"{artifact.name} is a program; the formats linen and torch can be converted")
  parts, teacher = artifact.parts, artifact.models.teacher
  record = {
    "family": found,
    "source": source,
    "source_sha256": params_hash(parts.weights["network"]),
    "sizes": families.network_sizes(teacher.network),
  }
  tree = {name: params for name, params in parts.weights.items() if params}
  metadata = {"role": parts.role, "recipe": parts.recipe.to_dict(), "clock": parts.clock}
  return record, {parts.role: (tree, metadata)}


def main(argv: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  name = "python -m dimo_jax.convert"
  parser = argparse.ArgumentParser(name, allow_abbrev=False, epilog=IMPORT_HELP)
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


def _run() -> None:
  STOP.at_once()
  sys.exit(main())


def _sha256(path: Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
  guarded(_run)
