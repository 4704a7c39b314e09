"""A trained generator for others to load, with its model card:

python -m dimo_jax.export --workdir=WORKDIR --format=linen,torch,stablehlo --out=DIR

DIR gets README.md and a folder for each format. `linen` is an orbax checkpoint, as the rest of the
project writes them, with the recorded config: what dimo_jax.load takes. `torch` has the original
key names and layouts. `stablehlo` is a program with its weights, which needs JAX alone. A folder
that exists is left alone without --overwrite, and DIR appears whole or not at all.
"""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import traverse_util
from ml_collections import config_flags

from dimo_jax import cli, prepare, records
from dimo_jax.artifacts import (
  PARAMS_FOLDER,
  PROGRAM_FILE,
  TOKENIZER_FILE,
  TORCH_FAMILIES,
  TORCH_FILES,
  WEIGHTS_FILE,
  Run,
  read_run,
  sample_fn,
)
from dimo_jax.build import Models, build
from dimo_jax.card import card
from dimo_jax.checkpoint import check_which, params_hash, save_params, save_tree
from dimo_jax.convert.files import FORMATS, MANIFEST
from dimo_jax.preemption import STOP
from dimo_jax.teachers.maskgit import MaskedTeacher
from dimo_jax.types import Params, UserError, choose
from dimo_jax.writers import say

PLATFORMS = ("cpu", "cuda", "tpu")
_SCRIPT_FILE, _SETTINGS_FILE, _CARD_FILE = "sample.py", "sampling.json", "README.md"

_FLAGS = flags.FlagValues()  # its own: `main` has flags of the same names
_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config in place of the recorded one.", flag_values=_FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=_FLAGS)
_FORMAT = flags.DEFINE_list(
  "format", None, f"One or more of {', '.join(FORMATS)}.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string("out", None, "Folder to make.", flag_values=_FLAGS)
_RAW = flags.DEFINE_boolean(
  "raw", False, "The generator itself instead of its moving average.", flag_values=_FLAGS
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "last", "Of the training: last, best or a step.", flag_values=_FLAGS
)
_LICENSE = flags.DEFINE_string(
  "license", "", "The teacher's licence, as a hub names it: cc-by-nc-sa-4.0.", flag_values=_FLAGS
)
_OVERWRITE = flags.DEFINE_boolean(
  "overwrite", False, "Replace an earlier export in --out.", flag_values=_FLAGS
)
_PUSH = flags.DEFINE_string(
  "push", "", "owner/repo on a hub, to upload to; HF_TOKEN is heeded.", flag_values=_FLAGS
)


def export(
  run: Run,
  formats: Sequence[str],
  out: Path,
  *,
  license_name: str = "",
  overwrite: bool = False,
) -> None:
  """Writes an export.

  Raises:
    UserError: an unknown format, one that the run cannot have, `out` exists or cannot be written.
  """
  for name in formats:
    choose(_WRITERS, name, "--format")
  _check_out(out, overwrite)
  models = run.recipe.models(str(run.workdir))
  if "stablehlo" in formats and models.tokenizer.image_shape is None:
    raise UserError(
      "--format=stablehlo makes images, and this run has no decoder:"
      f" tokenizer.name={run.recipe.config.tokenizer.name!r}"
    )
  manifest = {
    "role": "generator",
    "kind": models.teacher.kind,
    "num_classes": run.recipe.config.data.num_classes,
    "num_steps": models.student_sampler.num_steps,
    "image_shape": models.tokenizer.image_shape,
    "clock": run.clock,
    "step": run.step,
    "weights": "ema" if run.average else "raw",
    "teacher_sha256": run.teacher_sha256,
    "recipe": run.recipe.to_dict(),
  }
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".exporting-") as made:
      folder = Path(made, "export")
      with STOP.unfinished(folder.parent):  # not once what it replaces lies there too
        for name in dict.fromkeys(formats):
          (folder / name).mkdir(parents=True)
          _WRITERS[name](run, models, folder / name)
          _write_json(folder / name / MANIFEST, {"format": name, **manifest})
        text = card(
          run,
          tuple(dict.fromkeys(formats)),
          license_name=license_name,
          results=_results(run),
          notes=_notes(run, models, formats),
        )
        (folder / _CARD_FILE).write_text(text, encoding="utf-8")
      _put(folder, out, Path(made, "replaced"))
  except OSError as error:
    raise UserError(f"--out={str(out)!r} cannot be written: {error.strerror}") from error


def _put(folder: Path, out: Path, aside: Path) -> None:
  """Renames a folder to `out`; what was there goes to `aside`, and back if that fails."""
  if out.exists():
    os.replace(out, aside)
  try:
    os.replace(folder, out)
  except OSError:
    if aside.exists():
      os.replace(aside, out)
    raise


def _check_out(out: Path, overwrite: bool) -> None:
  """Raises UserError where something is in the way that must not be replaced."""
  if not out.exists() and not out.is_symlink():
    return
  is_export = any((out / name / MANIFEST).is_file() for name in FORMATS)
  if not is_export and not (out.is_dir() and not any(out.iterdir())):
    raise UserError(f"--out={str(out)!r} exists and is no export; name another folder")
  if is_export and not overwrite:
    raise UserError(f"--out={str(out)!r} exists; give --overwrite, or name another folder")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_linen(run: Run, models: Models, folder: Path) -> None:
  del models
  tree = {name: params for name, params in run.weights.items() if params}
  save_tree(folder / PARAMS_FOLDER, tree)


def _write_torch(run: Run, models: Models, folder: Path) -> None:
  path = folder / TORCH_FILES[models.teacher.kind]
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays = prepare.to_published(models.teacher, run.weights["network"])
  save_params(path, arrays, {"role": "generator", "family": TORCH_FAMILIES[models.teacher.kind]})
  if run.weights["tokenizer"]:
    save_params(folder / TOKENIZER_FILE, run.weights["tokenizer"], {})
  _write_json(folder / _SETTINGS_FILE, sampling_settings(run, models))


def sampling_settings(run: Run, models: Models) -> dict[str, Any]:
  """What a sampler in another framework must know, in plain values."""
  sampler = dataclasses.asdict(run.parts().sampler(models))  # type: ignore[call-overload]
  sampler.pop("section", None)  # of our config
  network: Any = models.teacher.network
  settings: dict[str, Any] = {"method": run.recipe.config.objective, "sampler": sampler}
  if isinstance(models.teacher, MaskedTeacher):
    codes, classes = models.teacher.mask_token_id, network.num_classes
    conditioning = {
      "kind": "class token after the image tokens, in the same embedding table",
      "mask_token_id": codes,
      "first_class_token_id": codes + 1,
      "null_class_token_id": codes + 1 + classes,
      "grid": list(models.tokenizer.grid),
    }
  else:
    conditioning = {"kind": "one-hot class vector, zeros for no class"}
    settings["preconditioning"] = _fields(network)
    network = network.model
  settings["network"] = {"class": type(network).__name__, **_fields(network)}
  settings["conditioning"] = {"num_classes": run.recipe.config.data.num_classes, **conditioning}
  return settings


def _fields(module: Any) -> dict[str, Any]:
  """A linen module's settings that JSON takes."""
  names = [field.name for field in dataclasses.fields(module)]
  values = {name: getattr(module, name) for name in names if name not in ("parent", "name")}
  values = {k: jnp.dtype(v).name if k == "dtype" else v for k, v in values.items()}
  return {k: v for k, v in values.items() if isinstance(v, int | float | str | tuple)}


def _write_stablehlo(run: Run, models: Models, folder: Path) -> None:
  sampler = run.parts().sampler(models)
  weights = {
    name: np.asarray(value)
    for name, value in traverse_util.flatten_dict(dict(run.weights), sep="/").items()
  }
  (folder / PROGRAM_FILE).write_bytes(lower(sample_fn(models, sampler), weights).serialize())
  save_params(folder / WEIGHTS_FILE, weights, {})
  last = max(1, run.recipe.config.data.num_classes) - 1
  script = _SCRIPT.replace("LAST", str(last))
  (folder / _SCRIPT_FILE).write_text(script, encoding="utf-8")


def lower(function: Callable[..., Any], weights: Params) -> Any:
  """`jax.export`'s program of `artifacts.sample_fn`, for any batch and every platform.

  Its arguments are weights by flat path, labels int32 [b], seeds and indices uint32 [b].
  """
  from jax import export

  def program(weights, labels, seeds, indices):
    tree = {"tokenizer": {}} | traverse_util.unflatten_dict(weights, sep="/")
    return function(tree, labels, seeds, indices)

  (b,) = export.symbolic_shape("b")
  batch = [jax.ShapeDtypeStruct((b,), dtype) for dtype in (jnp.int32, jnp.uint32, jnp.uint32)]
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in weights.items()}
  return export.export(jax.jit(program), platforms=PLATFORMS)(shapes, *batch)


_WRITERS: dict[str, Callable[[Run, Models, Path], None]] = {
  "linen": _write_linen,
  "torch": _write_torch,
  "stablehlo": _write_stablehlo,
}

_SCRIPT = '''\
"""Samples images: python sample.py LAST --seed=0 --out=samples.npy

Needs jax (with flatbuffers, which jax.export reads programs by) and safetensors. The program is
called with weights, class ids int32 [b], seeds uint32 [b] and indices uint32 [b], and returns
uint8 images [b, h, w, c]; an image depends on its class, seed and index alone.
"""

import argparse
import pathlib

import jax.export
import numpy as np
from safetensors.numpy import load_file

folder = pathlib.Path(__file__).parent
parser = argparse.ArgumentParser(description="Samples images of classes into an .npy file.")
parser.add_argument("label", nargs="+", type=int, choices=range(LAST + 1), metavar="0..LAST")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=lambda x: pathlib.Path(x).with_suffix(".npy"), default="samples")
options = parser.parse_args()
labels = np.array(options.label, np.int32)
program = jax.export.deserialize(bytearray((folder / "program.bin").read_bytes()))
indices = np.arange(len(labels), dtype=np.uint32)
weights = load_file(folder / "weights.safetensors")
images = program.call(weights, labels, np.full_like(indices, options.seed % 2**32), indices)
np.save(options.out, np.asarray(images))
print(f"{len(labels)} images {images.shape[1:]} in {options.out}")
'''


def _results(run: Run) -> list[dict[str, Any]]:
  """Rows of a workdir's results.json, if it has one, without those of a student of other weights
  than the run's.
  """
  path = run.workdir / "results.json"
  try:
    rows = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return []
  except ValueError as error:
    raise UserError(f"{path} is damaged ({error}); --mode=evaluate writes it anew") from error
  exported = {"step": run.step, "weights_sha256": params_hash(run.weights["network"])}
  return [
    row
    for row in rows
    if row.get("model") != "student" or all(row.get(k) == v for k, v in exported.items())
  ]


def _notes(run: Run, models: Models, formats: Sequence[str]) -> list[str]:
  """What the card must say of this run beside the usual."""
  notes = []
  config = run.recipe.config
  if "torch" in formats and config.denoiser.name == "mlp" and models.teacher.kind == "gaussian":
    notes.append(
      "The network is an MLP for tiny images, which the original code does not have: the torch"
      " weights follow its naming, but nothing there loads them."
    )
  elif "torch" in formats and models.teacher.kind == "gaussian":
    notes.append(
      "DMD2's scripts read `pytorch_model.bin`; in `torch/`, with PyTorch:\n\n"
      "    import safetensors.torch, torch\n"
      "    state_dict = safetensors.torch.load_file('model.safetensors')\n"
      "    torch.save(state_dict, 'pytorch_model.bin')"
    )
  if "torch" in formats and run.weights["tokenizer"]:
    notes.append(
      f"`torch/{TOKENIZER_FILE}` is the decoder of the tokens (tokenizer"
      f" `{config.tokenizer.name}`), under this project's names."
    )
  return notes


def push(folder: Path, repo: str) -> str:
  """Uploads a folder to a repository on a hub, made if need be; returns its address.

  HF_ENDPOINT and HF_TOKEN are heeded.

  Raises:
    UserError: the hub cannot be reached, or refuses.
  """
  import huggingface_hub
  from huggingface_hub import errors

  hub = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
  try:
    hub.create_repo(repo, exist_ok=True)
    made = hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of dimo_jax")
  except (errors.HFValidationError, errors.HfHubHTTPError, OSError, ValueError) as error:
    raise UserError(f"--push={repo!r}: {' '.join(str(error).split())[:300]}") from error
  return made.repo_url if hasattr(made, "repo_url") else str(made)


def _check_repo(repo: str) -> None:
  from huggingface_hub.errors import HFValidationError
  from huggingface_hub.utils import validate_repo_id

  try:
    validate_repo_id(repo)
    if repo.count("/") != 1:
      raise HFValidationError("it must be owner/repo")
  except HFValidationError as error:
    raise UserError(f"--push={repo!r} names no repository: {error}") from error


def _dispatch() -> None:
  STOP.at_once()
  workdir_text, formats, out_text = _WORKDIR.value, _FORMAT.value, _OUT.value
  check_which(_CHECKPOINT.value)
  if not workdir_text:
    raise UserError("--workdir is missing; name the folder of a run, such as runs/digits")
  if not formats:
    raise UserError(f"--format is missing; name one or more of {', '.join(FORMATS)}")
  if not out_text:
    raise UserError("--out is missing; name a folder to make")
  for name in formats:
    choose(_WRITERS, name, "--format")
  if not re.fullmatch(r"[\w.+-]*", _LICENSE.value):
    raise UserError(f"--license={_LICENSE.value!r} must be a name such as cc-by-nc-sa-4.0")
  out, workdir = Path(out_text), Path(workdir_text)
  _check_out(out, _OVERWRITE.value)
  if _PUSH.value:
    _check_repo(_PUSH.value)
  records.check_trained(workdir)
  experiment = None if _CONFIG.value is None else build(_CONFIG.value)
  run = read_run(workdir, experiment, checkpoint=_CHECKPOINT.value, average=not _RAW.value)
  export(run, formats, out, license_name=_LICENSE.value, overwrite=_OVERWRITE.value)
  say(f"{', '.join(formats)} of {workdir}, step {run.step}, in {out}")
  if not _LICENSE.value:
    say("the teacher's licence is not known; --license records it in the card")
  if _PUSH.value:
    say(f"pushed to {push(out, _PUSH.value)}")


def main() -> None:
  """Runs the command line."""
  cli.run(_dispatch, _FLAGS, needs_config=False)


if __name__ == "__main__":
  main()
