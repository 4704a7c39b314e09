"""What binds a workdir: the fields of the config that each stage depends on, and what it has kept.

A stage that has begun may go on with the fields that its record names, and with no others.
"""

from pathlib import Path
from typing import Any

from flax import traverse_util

from dimo_jax.build import Experiment
from dimo_jax.checkpoint import DAMAGED_FOLDER, RECORD_FILE, finished_steps, params_hash
from dimo_jax.convert import files
from dimo_jax.distributed import from_first
from dimo_jax.trackers import IDS_FILE
from dimo_jax.types import Params, UserError

# What every stage reads of its data; pairs are for a distillation alone.
_DATA = tuple(
  f"data.{name}" for name in ("name", "path", "tfds_name", "image_size", "num_classes", "flip")
)


def tokenizer_fields(experiment: Experiment) -> dict:
  """What a tokenizer depends on, by flat name, but for the weights of a published one."""
  return flat_fields(experiment.config, *_DATA, "tokenizer", "seed")


def classifier_fields(experiment: Experiment) -> dict:
  """What the evaluation's classifier depends on, by flat name."""
  return flat_fields(experiment.config, *_DATA, "evaluation.protocol")


def teacher_fields(experiment: Experiment) -> dict:
  """What a teacher's training depends on, by flat name."""
  return flat_fields(
    experiment.config,
    *_DATA,
    "tokenizer",
    *_network_sections(experiment),
    "seed",
    "teacher.name",
    "teacher.pretrain",
    "precision.compute_dtype",
  )


def distill_fields(experiment: Experiment, teacher: Params | None = None) -> dict:
  """What a distillation depends on, by flat name, a teacher by its hash."""
  fields = flat_fields(
    experiment.config,
    "data",
    "tokenizer",
    *_network_sections(experiment),
    "precision",
    "seed",
    "objective",
    experiment.config.objective,
    "optim",
    "train",
  )
  optimizers = experiment.generator_optimizer, experiment.fake_score_optimizer
  if all(spec.schedule == "constant" for spec in optimizers):
    fields.pop("train.num_steps")  # no schedule depends on it
  return fields if teacher is None else fields | {"teacher.sha256": params_hash(teacher)}


def _network_sections(experiment: Experiment) -> tuple[str, ...]:
  return ("denoiser", "process") if experiment.teacher.kind == "gaussian" else ("model",)


def flat_fields(config, *names: str) -> dict:
  """`a.b.c` names and values of the named sections or fields of a config, but for where the
  tokenizer's file and the images' codes lie, and how memory is saved.
  """
  fields: dict[str, Any] = {}
  for name in names:
    value = config
    for part in name.split("."):
      value = value[part]
    if hasattr(value, "to_dict"):
      flat = traverse_util.flatten_dict(value.to_dict(), sep=".")
      fields |= {f"{name}.{key}": item for key, item in flat.items()}
    else:
      fields[name] = value
  saved = "model.remat", "denoiser.remat", "train.ema_memory"
  for name in ("tokenizer.path", "data.tokens", *saved):
    fields.pop(name, None)
  return fields


def has_checkpoints(directory: Path) -> bool:
  """Whether a stage goes on from a checkpoint, in every process alike."""
  return bool(from_first(bool(finished_steps(directory))))


def check_begun(workdir: Path) -> None:
  """Raises UserError where a folder is not there, or is an export."""
  field = f"--workdir={str(workdir)!r}"
  if not workdir.exists():
    raise UserError(f"{field} does not exist; run --mode=train there first")
  if files.export_folder(workdir) is not None:
    raise UserError(f"{field} is an export; what is asked for needs the training's own workdir")


def check_trained(workdir: Path) -> None:
  """Raises UserError where no distillation was begun."""
  if (workdir / "distill" / "checkpoints").is_dir():
    return
  check_begun(workdir)
  raise UserError(
    f"--workdir={str(workdir)!r} holds no distillation yet; run --mode=train there first"
  )


def forget_if_fruitless(workdir: Path) -> None:
  """Takes away the records of a run that ended before it kept anything: what begins next in its
  workdir may be another one. To be called by what writes there, before it looks at the records.
  """
  stages = [path.parent for path in workdir.glob(f"*/{RECORD_FILE}")]
  fruits = ("results.json", "*/*.safetensors", "*/pictures/*", f"*/checkpoints/{DAMAGED_FOLDER}/*")
  if (
    any(finished_steps(stage) for stage in stages)
    or any(path.stat().st_size for path in workdir.glob("*/metrics.jsonl"))
    or any(any(workdir.glob(pattern)) for pattern in fruits)
  ):
    return
  for stage in stages:
    for name in (RECORD_FILE, IDS_FILE):
      (stage / name).unlink(missing_ok=True)
