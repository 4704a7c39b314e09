"""From images to sums of features: sharded, overlapped with the host, resumable.

While the devices work on one batch the host reads the next and sums the one before. The sums and
the position are saved every few batches, so a killed job goes on where it was.
"""

import dataclasses
import functools
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dimo_jax.distributed import on_first
from dimo_jax.evaluation.image_sets import ImageSet
from dimo_jax.evaluation.inception import SIDE, TAPS, Inception, InceptionV3
from dimo_jax.evaluation.published import PublishedProtocol
from dimo_jax.evaluation.references import SETTINGS_KEY, read_arrays, write_arrays
from dimo_jax.evaluation.resize import resize
from dimo_jax.evaluation.statistics import RunningScore, RunningStatistics
from dimo_jax.sharding import batch_sharding, fetch, local_rows, put, replicated, shard_batch
from dimo_jax.types import Array, Float, Int, Params, UInt8, UserError
from dimo_jax.writers import clock, say

__all__ = ["Extractor", "FeatureSums", "Progress", "accumulate", "image_batches"]

USED_TAPS = ("2048", "logits_unbiased")
SPATIAL_TAPS = ("spatial", *USED_TAPS)
# Levels to the network's input, as TensorFlow's graph does it.
_CENTRE, _SCALE = 128.0, 128.0


@functools.partial(jax.jit, static_argnames=("resize_name", "taps"))
def _features(
  params: Params, levels: UInt8[Array, "b h w 3"], resize_name: str, taps: tuple[str, ...]
) -> dict[str, Float[Array, "b _"]]:
  images = resize(levels.astype(jnp.float32), resize_name, SIDE)
  features = InceptionV3(taps).apply({"params": params}, (images - _CENTRE) / _SCALE)
  assert isinstance(features, dict)
  return features


@dataclasses.dataclass(frozen=True)
class Extractor:
  """Inception behind one resize, its parameters on every device.

  Attributes:
    inception: the weights.
    resize_name: a key of RESIZES.
    mesh: over which batches are split.
    batch_size: images at once, a multiple of the number of devices.
    taps: what is computed.
  """

  inception: Inception
  resize_name: str
  mesh: jax.sharding.Mesh
  batch_size: int
  taps: tuple[str, ...] = USED_TAPS

  @functools.cached_property
  def _params(self) -> Params:
    shardings = jax.tree.map(lambda _: replicated(self.mesh), self.inception.params)
    return put(self.inception.params, shardings)

  def __call__(self, levels: UInt8[np.ndarray | Array, "b h w 3"]) -> dict[str, Array]:
    """Starts the features of a batch on the devices, or of up to `batch_size` images that every
    process holds whole; filled up to it, so it compiles once.
    """
    if not isinstance(levels, jax.Array):
      missing = self.batch_size - len(levels)
      if missing:
        levels = np.concatenate([levels, np.zeros((missing, *levels.shape[1:]), np.uint8)])
      levels = shard_batch(levels[local_rows(self.batch_size, self.mesh)], self.mesh)
    levels = jax.device_put(levels, batch_sharding(self.mesh))
    return _features(self._params, levels, self.resize_name, self.taps)


class FeatureSums:
  """Everything that the metrics need of a set of images, in memory that does not grow with it.

  Attributes:
    num: images so far.
    pool: running statistics of the 2048 features.
    spatial: of the spatial ones, if they are wanted.
    score: the Inception Score's sums.
    features: rows of the 2048 features at the positions `kept`, filled as they come.
  """

  def __init__(
    self, num_images: int, num_splits: int, kept: Int[np.ndarray, " k"], *, spatial: bool
  ):
    self.num = 0
    self.pool = RunningStatistics(TAPS["2048"])
    self.spatial = RunningStatistics(TAPS["spatial"]) if spatial else None
    self.score = RunningScore(num_images, num_splits, None, TAPS["logits_unbiased"])
    self.kept = kept
    self.features = np.zeros((len(kept), TAPS["2048"]), np.float32)

  @classmethod
  def of(cls, protocol: PublishedProtocol, *, spatial: bool) -> "FeatureSums":
    """Empty sums for a protocol's images."""
    return cls(protocol.num_images, protocol.num_splits, protocol.kept(), spatial=spatial)

  def add(self, taps: Mapping[str, np.ndarray]) -> None:
    """Adds the features of the next images.

    Raises:
      UserError: features that are not finite.
    """
    pool = taps["2048"]
    if not np.isfinite(pool).all():
      raise UserError(f"images {self.num} .. {self.num + len(pool) - 1} give features that are NaN")
    self.pool.add(pool)
    if self.spatial is not None:
      self.spatial.add(taps["spatial"])
    self.score.add(taps["logits_unbiased"])
    first, last = np.searchsorted(self.kept, (self.num, self.num + len(pool)))
    self.features[first:last] = pool[self.kept[first:last] - self.num]
    self.num += len(pool)

  def save(self, path: Path, settings: str) -> None:
    """Writes the sums with what they depend on, whole or not at all."""
    parts = {"pool": self.pool.state(), "score": self.score.state()}
    if self.spatial is not None:
      parts["spatial"] = self.spatial.state()
    arrays = {f"{part}/{k}": v for part, state in parts.items() for k, v in state.items()}
    arrays |= {"features": self.features, SETTINGS_KEY: np.array(settings)}
    write_arrays(path, arrays)

  def restore(self, path: Path, settings: str) -> bool:
    """Goes on from a file that `save` wrote with the same settings; False where there is none."""
    try:
      with read_arrays(path, "state") as file:
        if str(file[SETTINGS_KEY]) != settings:
          return False
        parts: dict[str, dict[str, np.ndarray]] = {}
        for key in file.files:
          part, slash, name = key.partition("/")
          if slash:
            parts.setdefault(part, {})[name] = file[key]
        features = file["features"]
    except (UserError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      return False
    self.pool = RunningStatistics.restored(parts["pool"])
    if self.spatial is not None:
      self.spatial = RunningStatistics.restored(parts["spatial"])
    self.score.restore(parts["score"])
    self.features, self.num = features, self.pool.num
    return True


class Progress:
  """A console line now and then: how many images, how fast, how long it will take."""

  def __init__(self, what: str, num_images: int, start: int, every_seconds: float = 10.0):
    self._what, self._num, self._start = what, num_images, start
    self._every, self._began = every_seconds, time.perf_counter()
    self._said = self._began

  def __call__(self, num: int) -> None:
    """Says where the job is, unless it has just done so."""
    now = time.perf_counter()
    if num < self._num and now - self._said < self._every:
      return
    self._said = now
    rate = (num - self._start) / max(now - self._began, 1e-9)
    left = clock((self._num - num) / max(rate, 1e-9))
    say(f"{self._what} {num}/{self._num} images  {rate:.1f} images/s  ETA {left}")


Batches = Callable[[int], Iterator[UInt8[Any, "b h w 3"]]]


def image_batches(images: ImageSet, num_images: int, batch_size: int) -> Batches:
  """Batches of finished images from a position on, read one ahead in a thread."""

  def batches(start: int) -> Iterator[UInt8[np.ndarray, "b h w 3"]]:
    starts = list(range(start, num_images, batch_size))
    if jax.process_count() > 1:  # a set may compute: all processes must do so in one order
      yield from (images.read(i, min(i + batch_size, num_images)) for i in starts)
      return
    with ThreadPoolExecutor(1) as pool:

      def submit(i: int) -> Any:
        return pool.submit(images.read, starts[i], min(starts[i] + batch_size, num_images))

      ahead = submit(0) if starts else None
      for i in range(len(starts)):
        assert ahead is not None
        batch = ahead.result()
        ahead = submit(i + 1) if i + 1 < len(starts) else None
        yield batch

  return batches


def accumulate(
  batches: Batches,
  extractor: Extractor,
  sums: FeatureSums,
  *,
  num_images: int,
  what: str,
  state_path: Path,
  settings: Mapping[str, Any],
  save_every: int = 20,
  between_batches: Callable[[], None] | None = None,
) -> FeatureSums:
  """Sums the features of `num_images` images, going on from `state_path` where that is possible.

  Args:
    batches: from a position, a multiple of the batch size, the batches from there on.
    sums: empty.
    what: the console's name of the job.
    settings: everything that the sums depend on.
    save_every: batches between two saves.
    between_batches: called after every batch, to stop early by an exception; the sums are saved
      before it leaves.
  """
  text = json.dumps(dict(settings), sort_keys=True)
  if sums.restore(state_path, text) and sums.num:
    say(f"{what}: goes on from image {sums.num}")
  progress = Progress(what, num_images, sums.num)
  running: tuple[dict[str, Array], int] | None = None

  def collect() -> None:
    assert running is not None
    features, size = running
    sums.add({name: value[:size] for name, value in fetch(features).items()})
    progress(sums.num)

  def save() -> None:
    on_first(lambda: sums.save(state_path, text))

  started = sums.num
  num_batches = 0
  for batch in batches(sums.num):
    size = min(len(batch), num_images - started)
    started += size
    features = extractor(batch)
    if running is not None:
      collect()
      num_batches += 1
      if num_batches % save_every == 0:
        save()
    running = features, size
    if between_batches is not None:
      try:
        between_batches()
      except BaseException:
        save()
        raise
  if running is not None:
    collect()
  save()
  return sums
