"""Pictures of anything that can be sampled; no config is needed.

python -m dimo_jax.sample --artifact=DIR_OR_FILE --labels=3,1,4 --num=64 --seed=0 --out=grid.png
"""

from pathlib import Path

import numpy as np
from absl import flags

from dimo_jax import artifacts, cli
from dimo_jax.artifacts import Artifact
from dimo_jax.build import NUM_SEEDS, Experiment
from dimo_jax.convert import files
from dimo_jax.distributed import on_first
from dimo_jax.evaluation import pictures
from dimo_jax.preemption import STOP
from dimo_jax.recipe import parse_field
from dimo_jax.types import UserError
from dimo_jax.writers import say

_NUM_CLASSES, _NUM_EACH = 10, 4  # of the pictures where no labels are given

_FLAGS = flags.FlagValues()  # its own: `main` has flags of the same names
_ARTIFACT = flags.DEFINE_string(
  "artifact",
  None,
  "Export, workdir, teacher or checkpoint: a folder or a file.",
  flag_values=_FLAGS,
)
_LABELS = flags.DEFINE_string(
  "labels", "", "Class ids, as in 3,1,4; repeated up to --num.", flag_values=_FLAGS
)
_NUM = flags.DEFINE_integer(
  "num",
  None,
  "Number of images, one per label or more; default: one per label.",
  flag_values=_FLAGS,
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of what is drawn.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string("out", "samples.png", "PNG file of the grid.", flag_values=_FLAGS)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  "",
  "VQGAN that decodes the tokens, where the artifact holds none.",
  flag_values=_FLAGS,
)
_FAMILY = flags.DEFINE_string(
  "family", "", "Of published weights, where the file does not say.", flag_values=_FLAGS
)
_FIELD = flags.DEFINE_multi_string(
  "field", [], "Config field, as in sampling.temperature=7; may be repeated.", flag_values=_FLAGS
)
_STEPS = flags.DEFINE_integer("steps", None, "Of a teacher; default: its own.", flag_values=_FLAGS)


def parse_labels(text: str, num_classes: int, num: int | None = None) -> np.ndarray:
  """Class ids from `3,1,4`, repeated up to `num` of them.

  An empty text means the classes in turn, without `num` four of each of the first ten.

  Raises:
    UserError: not integers, out of range, or a number that is not positive or too small for them.
  """
  num_classes = max(num_classes, 1)
  if num is not None and num < 1:
    raise UserError(f"--num={num} must be 1 or more")
  if not text:
    if num is None:
      num_classes = min(num_classes, _NUM_CLASSES)
      num = _NUM_EACH * num_classes
    return np.arange(num, dtype=np.int32) % num_classes
  try:
    labels = np.array([int(part) for part in text.split(",")], np.int32)
  except (ValueError, OverflowError) as error:
    raise UserError(
      f"--labels={text!r} must be class ids from 0 to {num_classes - 1}, with commas between them"
    ) from error
  wrong = labels[(labels < 0) | (labels >= num_classes)]
  if wrong.size:
    raise UserError(f"--labels={text!r}: {wrong[0]} must lie in 0 .. {num_classes - 1}")
  if num is not None and num < len(labels):
    raise UserError(f"--num={num} is fewer than the classes of --labels={text!r}, {len(labels)}")
  return labels if num is None else np.resize(labels, num)


def _check(seed: int, out: Path) -> None:
  if not 0 <= seed < NUM_SEEDS:
    raise UserError(f"--seed={seed} must lie in 0 .. {NUM_SEEDS - 1}")
  if out.suffix.lower() != ".png":
    raise UserError(f"--out={str(out)!r} must end in .png")


def write_grid(
  artifact: Artifact, labels: np.ndarray, seed: int, out: Path, steps: int | None = None
) -> None:
  """Writes a PNG grid, one picture per label, and says how long it took.

  Raises:
    UserError: nothing can be sampled so, or `out` cannot be written.
  """
  samples = artifact.sample_timed(labels, seed, steps)

  def write() -> None:
    try:
      pictures.save_png(out, pictures.tile(samples.outputs))
    except OSError as error:
      raise UserError(f"--out={str(out)!r} cannot be written: {error.strerror}") from error

  on_first(write)
  num_steps, role = steps or artifact.num_steps, artifact.role
  if isinstance(artifact, artifacts.NetworkArtifact) and artifact.parts.step is not None:
    step, total = artifact.parts.step, artifact.parts.recipe.config.train.num_steps
    role += f" after {step} of {max(step, total)} updates"
  say(
    f"{len(labels)} picture{'s' if len(labels) > 1 else ''} in {out}; {role}, {num_steps}"
    f" step{'s' if num_steps > 1 else ''}: {len(labels) / samples.seconds:.1f} images/s, after"
    f" {samples.compile_seconds:.1f} s of compilation"
  )


def sample_workdir(
  workdir: Path,
  experiment: Experiment | None,
  labels_text: str,
  out_text: str,
  seed: int,
  *,
  checkpoint: str = "last",
) -> None:
  """Writes a PNG grid of the student in `workdir`, a run's or an export, one picture per label.

  Args:
    experiment: of a config that takes the place of a run's recorded one.
    out_text: a file's name; without one it is `samples.png` in the workdir.
    checkpoint: of a run: "last", "best" or a step.

  Raises:
    UserError: bad labels, nothing trained there, no decoder, or `out` cannot be written.
  """
  out = Path(out_text or workdir / "samples.png")
  _check(seed, out)
  if experiment is not None:  # before anything is read
    parse_labels(labels_text, experiment.config.data.num_classes)
    if not experiment.has_pictures:
      raise UserError(f"tokenizer.name={experiment.config.tokenizer.name!r} cannot make pictures")
  artifact: Artifact
  if files.export_folder(workdir) is not None:
    artifact = artifacts.load(workdir)
  else:
    run = artifacts.read_run(workdir, experiment, checkpoint=checkpoint)
    artifact = artifacts.NetworkArtifact(run.parts())
  write_grid(artifact, parse_labels(labels_text, artifact.num_classes), seed, out)


def _dispatch() -> None:
  STOP.at_once()
  if not _ARTIFACT.value:
    raise UserError("--artifact is missing; name an export, a workdir or a checkpoint")
  out = Path(_OUT.value)
  _check(_SEED.value, out)
  artifact = artifacts.load(
    _ARTIFACT.value,
    tokenizer=_TOKENIZER.value,
    family=_FAMILY.value,
    fields=dict(map(parse_field, _FIELD.value)),
  )
  labels = parse_labels(_LABELS.value, artifact.num_classes, _NUM.value)
  write_grid(artifact, labels, _SEED.value, out, _STEPS.value)


def main() -> None:
  """Runs the command line."""
  cli.run(_dispatch, _FLAGS, needs_config=False)


if __name__ == "__main__":
  main()
