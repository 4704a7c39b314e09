"""Pictures of a trained workdir: a grid of the one-step student's samples."""

import time
from pathlib import Path

import numpy as np

from dimo_jax import train
from dimo_jax.build import NUM_SEEDS, Experiment
from dimo_jax.distributed import on_first
from dimo_jax.evaluation import pictures
from dimo_jax.evaluation.generation import generate
from dimo_jax.hooks import sampling_network
from dimo_jax.types import UserError
from dimo_jax.writers import say

_NUM_COLUMNS = 10


def parse_labels(text: str, num_classes: int) -> np.ndarray:
  """Class ids from `3,1,4`; empty means four of each of the first ten classes.

  Raises:
    UserError: not integers, or out of range.
  """
  if not text:
    return np.arange(4 * min(num_classes, _NUM_COLUMNS), dtype=np.int32) % num_classes
  try:
    labels = np.array([int(part) for part in text.split(",")], np.int32)
  except (ValueError, OverflowError) as error:
    raise UserError(f"--labels={text!r} must be class ids such as 3,1,4") from error
  if labels.min() < 0 or labels.max() >= num_classes:
    raise UserError(f"--labels={text!r} must lie in 0 .. {num_classes - 1}")
  return labels


def sample_workdir(
  experiment: Experiment,
  workdir: Path,
  labels_text: str,
  seed: int,
  out_text: str,
  *,
  best: bool = False,
) -> None:
  """Writes a PNG grid of the student in `workdir`, one picture per label.

  Without a file's name in `out_text` it is `samples.png` in the workdir.

  Raises:
    UserError: bad labels, nothing trained there, no decoder, or `out` cannot be written.
  """
  out = Path(out_text or workdir / "samples.png")
  labels = parse_labels(labels_text, experiment.config.data.num_classes)
  if not experiment.has_pictures:
    raise UserError(f"tokenizer.name={experiment.config.tokenizer.name!r} cannot make pictures")
  if not 0 <= seed < NUM_SEEDS:
    raise UserError(f"--seed={seed} must lie in 0 .. {NUM_SEEDS - 1}")
  if out.suffix.lower() != ".png":
    raise UserError(f"--out={str(out)!r} must end in .png")
  teacher, state = train.restore(experiment, workdir, best=best)
  began = time.perf_counter()
  samples = generate(
    experiment.student_sampler.at(int(state.clock)),
    experiment.tokenizer,
    sampling_network(experiment, state.ema_params, teacher.autoencoder),
    labels,
    seed=seed,
    batch_size=experiment.config.evaluation.batch_size,
    mesh=experiment.mesh,
  )

  def write() -> None:
    try:
      pictures.save_png(out, pictures.grid(samples.images, min(len(labels), _NUM_COLUMNS)))
    except OSError as error:
      raise UserError(f"--out={str(out)!r} cannot be written: {error.strerror}") from error

  on_first(write)
  say(
    f"{len(labels)} pictures in {out}; {samples.images_per_second:.0f} images/s,"
    f" {time.perf_counter() - began:.1f} s with compilation"
  )
