"""Batches of images and of conditions, each a function of (seed, step) alone.

Nothing here holds a position: a resumed run asks for the steps it still needs, on whatever number
of devices and hosts, and gets the batches that an uninterrupted run would have seen.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from dimo_jax.data.sources import PairSource, Source
from dimo_jax.data.tokens import TokenSource

__all__ = ["condition_batches", "image_batches"]


def image_batches(
  source: Source | PairSource | TokenSource,
  *,
  batch_size: int,
  seed: int,
  start_step: int,
  num_steps: int,
  num_threads: int = 1,
  rows: np.ndarray | None = None,
  flip: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of steps start_step .. start_step + num_steps - 1, numpy, of images, codes or pairs.

  Every epoch is a new uniform order in which each sample comes once. Batches run on across the end
  of an epoch, so no sample is dropped and `batch_size` may exceed `len(source)`.

  Args:
    seed: not negative.
    num_threads: that read ahead, each a whole batch; they do not change what is read.
    rows: the samples of each batch that are read, by their places in it; all by default.
    flip: mirror each sample left to right, or not, at random.

  Yields:
    The source's samples, stacked: {"image": float32 [b, h, w, c] in [-1, 1], "class_id": int32
    [b]}, where b is batch_size, or the number of rows.
  """
  # Grain shuffles epoch e with seed + e: without the hash, run 1 would be run 0 an epoch later.
  shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
  # As many epochs as are needed: endless ones have no length that batches of one could count.
  num_epochs = max(1, -(-(start_step + num_steps) * batch_size // len(source)))
  samples = grain.MapDataset.source(source).shuffle(seed=shuffle_seed).repeat(num_epochs)
  if flip:
    samples = samples.seed(shuffle_seed).random_map(_flip)
  if rows is not None and len(rows) < batch_size:
    part = _Rows(samples, batch_size, rows, start_step + num_steps)
    samples, batch_size = grain.MapDataset.source(part), len(rows)
  batches = samples.batch(batch_size)
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 1)
  yield from batches[start_step : start_step + num_steps].to_iter_dataset(options)


class _Rows:
  """The same places of every batch, one batch after the other."""

  def __init__(self, samples: grain.MapDataset, batch_size: int, rows: np.ndarray, num_steps: int):
    self._samples, self._batch_size = samples, batch_size
    self._rows, self._num_steps = rows, num_steps

  def __len__(self) -> int:
    return self._num_steps * len(self._rows)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    step, place = divmod(index, len(self._rows))
    return self._samples[step * self._batch_size + int(self._rows[place])]


def _flip(sample: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
  mirrored = rng.random() < 0.5
  if "mirrored_tokens" in sample:
    tokens = sample["mirrored_tokens" if mirrored else "tokens"]
    return {"tokens": tokens, "class_id": sample["class_id"]}
  return sample | {"image": sample["image"][:, ::-1]} if mirrored else sample


def condition_batches(
  num_classes: int, *, shape: Sequence[int], seed: int, start_step: int, num_steps: int
) -> Iterator[dict[str, np.ndarray]]:
  """Class ids, uniform and independent, of steps start_step .. start_step + num_steps - 1.

  Yields:
    {"class_id": int32 [*shape]}, in 0 .. num_classes - 1.
  """
  for step in range(start_step, start_step + num_steps):
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(step,)))
    class_id = np.random.Generator(bits).integers(num_classes, size=shape, dtype=np.int32)
    yield {"class_id": class_id}
