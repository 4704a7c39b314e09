"""Evaluations that need no training: finished images, generators, and making statistics."""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dimo_jax.distributed import from_first, on_first
from dimo_jax.evaluation import pictures, scoring
from dimo_jax.evaluation.extraction import (
  SPATIAL_TAPS,
  USED_TAPS,
  Batches,
  Extractor,
  FeatureSums,
  accumulate,
  image_batches,
)
from dimo_jax.evaluation.image_sets import ImageSet, open_images
from dimo_jax.evaluation.inception import Inception
from dimo_jax.evaluation.published import PublishedProtocol
from dimo_jax.evaluation.references import (
  SETTINGS_KEY,
  ReferenceFile,
  file_sha256,
  write_arrays,
)
from dimo_jax.preemption import STOP
from dimo_jax.sharding import check_batch, fetch
from dimo_jax.types import Array, Bool, Float, Int, UInt8, UserError
from dimo_jax.writers import say

__all__ = [
  "Generator",
  "Judge",
  "evaluate_generator",
  "evaluate_images",
  "make_statistics",
]

_NUM_PICTURES = 40


@dataclasses.dataclass(frozen=True)
class Judge:
  """All that a set of images meets: protocol, statistics, network, devices.

  Attributes:
    batch_size: images at once, a multiple of the number of devices.
    interruptible: a signal stops it between two batches.

  Raises:
    UserError: statistics made otherwise than the protocol says, or a batch that cannot be split.
  """

  protocol: PublishedProtocol
  reference: ReferenceFile
  inception: Inception
  mesh: jax.sharding.Mesh
  batch_size: int
  interruptible: bool = True
  # The reference's features, once computed: the same for every judge fitted to a generator.
  _kept: dict[tuple[str, int], Float[np.ndarray, "k d"]] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )

  def __post_init__(self):
    check_batch(self.batch_size, self.mesh, "batch_size")
    self.reference.check(
      image_size=self.protocol.image_size,
      resize=self.protocol.resize,
      inception_sha256=self.inception.sha256,
    )

  @property
  def identity(self) -> dict[str, Any]:
    """What rows of the same judge share."""
    return {
      "protocol": self.protocol.name,
      "departures": self.protocol.departures(),
      "statistics_sha256": self.reference.sha256,
      "inception_sha256": self.inception.sha256,
    }

  def fitted_to(self, generator: "Generator") -> "Judge":
    """The judge that rounds as the generator does.

    Raises:
      UserError: images of another size or classes than the protocol's.
    """
    check_size(self.protocol, generator.image_shape or (), generator.name)
    if generator.num_classes != self.protocol.num_classes:
      raise UserError(
        f"{generator.name} has {generator.num_classes} classes, protocol={self.protocol.name!r} has"
        f" {self.protocol.num_classes}"
      )
    if generator.rounding is None:
      return self
    protocol = dataclasses.replace(self.protocol, rounding=generator.rounding)
    return dataclasses.replace(self, protocol=protocol)

  def evaluate(
    self, generator: "Generator", out: Path, source: Mapping[str, Any]
  ) -> dict[str, Any]:
    """`evaluate_generator` with this judge."""
    return evaluate_generator(self, generator, out, source)

  def judge(
    self, batches: Batches, what: str, out: Path, source: Mapping[str, Any]
  ) -> tuple[dict[str, Any], Path]:
    """(row, file of the unfinished job) for the protocol's number of images; see `accumulate`."""
    spatial = self.reference.spatial is not None
    taps = SPATIAL_TAPS if spatial else USED_TAPS
    extractor = Extractor(self.inception, self.protocol.resize, self.mesh, self.batch_size, taps)
    settings = {
      **dataclasses.asdict(self.protocol),
      "inception": self.inception.sha256,
      "batch_size": self.batch_size,
      "spatial": spatial,
      **source,
    }
    state_path = _state_path(out, settings)
    sums = accumulate(
      batches,
      extractor,
      FeatureSums.of(self.protocol, spatial=spatial),
      num_images=self.protocol.num_images,
      what=what,
      state_path=state_path,
      settings=settings,
      between_batches=STOP.raise_if_set if self.interruptible else None,
    )
    numbers = scoring.score(self.protocol, self.reference, self._reference_features(), sums)
    return scoring.result_row(
      self.protocol, self.reference, self.inception, numbers, source
    ), state_path

  def _reference_features(self) -> Float[np.ndarray, "k d"] | None:
    if self.reference.features is not None or not self.reference.has_images:
      return self.reference.features
    key = self.reference.sha256, self.protocol.num_kept
    if key in self._kept:
      return self._kept[key]
    images = open_images(self.reference.path)
    num = min(len(images), self.protocol.num_kept)
    extractor = Extractor(
      self.inception, self.protocol.resize, self.mesh, self.batch_size, ("2048",)
    )
    rows = []
    for batch in image_batches(images, num, self.batch_size)(0):
      rows.append(np.asarray(extractor(batch)["2048"])[: len(batch)])
      if self.interruptible:
        STOP.raise_if_set()
    self._kept[key] = np.concatenate(rows)
    return self._kept[key]


def _state_path(out: Path, settings: Mapping[str, Any]) -> Path:
  digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()
  return out.with_name(f"{out.name}.{digest[:12]}.partial.npz")


def check_size(protocol: PublishedProtocol, image_shape: tuple[int, ...], what: str) -> None:
  """Raises UserError where images are not of the protocol's size."""
  wanted = (protocol.image_size, protocol.image_size, 3)
  if tuple(image_shape) != wanted:
    raise UserError(f"{what} has images {image_shape}, protocol={protocol.name!r} is for {wanted}")


def evaluate_images(
  judge: Judge, images: ImageSet, out: Path, said: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Evaluates the first images of a finished set; adds its row to the file `out` and returns it.

  Args:
    said: what else the row says of them.

  Raises:
    UserError: images of another size or fewer than the protocol takes; features that are NaN.
    Preempted: a signal came; the same call goes on.
  """
  protocol = judge.protocol
  check_size(protocol, images.image_shape, images.name)
  scoring.too_few(protocol, len(images), images.name)
  source: dict[str, Any] = {"images": images.name, "images_fingerprint": images.fingerprint()}
  source |= said or {}
  batches = image_batches(images, protocol.num_images, judge.batch_size)
  row, state_path = judge.judge(batches, images.name, out, source)
  shown = images.read(0, min(_NUM_PICTURES, protocol.num_images))
  _finish(images.name, out, row, state_path, shown)
  return row


def _finish(
  name: str,
  out: Path,
  row: dict[str, Any],
  state_path: Path,
  shown: UInt8[np.ndarray, "b h w 3"],
) -> None:
  """Saves the first pictures beside the results, then the row."""
  file = Path(f"{state_path.name.removesuffix('.partial.npz')}.png")
  row["pictures"] = file.name

  def write() -> None:
    pictures.save_png(out.with_name(file.name), pictures.tile(shown))
    scoring.append_row(out, row)
    state_path.unlink(missing_ok=True)

  on_first(write)
  scoring.say_row(name, row, out)


Images = Float[np.ndarray | Array, "b h w c"] | UInt8[np.ndarray | Array, "b h w c"]


@runtime_checkable
class Generator(Protocol):
  """What makes images to be judged.

  Attributes:
    name: for the console and error messages.
    image_shape: (height, width, channels); None where it makes no pictures.
    num_classes: class ids are 0 .. num_classes - 1.
    settings: how it samples, for the result: plain values, `steps` among them.
    rounding: the key of ROUNDINGS by which its images are levels already; None where it makes
      floats.
  """

  @property
  def name(self) -> str: ...

  @property
  def image_shape(self) -> tuple[int, ...] | None: ...

  @property
  def num_classes(self) -> int: ...

  @property
  def settings(self) -> Mapping[str, Any]: ...

  @property
  def rounding(self) -> str | None: ...

  def batch(self, labels: Int[np.ndarray, " b"], seed: int, start: int) -> Images:
    """Images of the classes at positions start .. start + b - 1: floats in [-1, 1], or levels."""
    ...


class _GeneratedBatches:
  """Levels of the images that a generator makes.

  Attributes:
    images_per_second: of one batch after compilation, decoder included; None before.
  """

  def __init__(self, protocol: PublishedProtocol, generator: Generator, batch_size: int):
    self._protocol, self._generator, self._batch_size = protocol, generator, batch_size
    self.images_per_second: float | None = None

  def __call__(self, start: int) -> Iterator[UInt8[Array, "b h w 3"]]:
    size, labels = self._batch_size, self._protocol.labels()
    filled = np.resize(labels, -(-len(labels) // size) * size)
    before: tuple[int, Bool[Array, ""]] | None = None
    for first in range(start, len(labels), size):
      arguments = (filled[first : first + size], self._protocol.seed, first)
      if self.images_per_second is None:
        jax.block_until_ready(self._generator.batch(*arguments))
        began = time.perf_counter()
        jax.block_until_ready(self._generator.batch(*arguments))
        self.images_per_second = size / (time.perf_counter() - began)
      levels, finite = _levels(self._generator.batch(*arguments), self._protocol)
      self._check(before)
      before = first, finite
      yield levels
    self._check(before)

  def _check(self, batch: tuple[int, Bool[Array, ""]] | None) -> None:
    """Looks one batch late, so that the devices are never waited for."""
    if batch is not None and not fetch(batch[1]):
      raise UserError(
        f"{self._generator.name}: images {batch[0]} .. {batch[0] + self._batch_size - 1} hold NaN"
        " or infinite pixels"
      )


@functools.partial(jax.jit, static_argnames="protocol")
def _levels(
  images: Images, protocol: PublishedProtocol
) -> tuple[UInt8[Array, "b h w c"], Bool[Array, ""]]:
  """Levels, and whether all images are finite."""
  if images.dtype == np.uint8:
    return jnp.asarray(images), jnp.array(True)
  return protocol.levels(jnp.asarray(images)), jnp.isfinite(images).all()


def evaluate_generator(
  judge: Judge, generator: Generator, out: Path, source: Mapping[str, Any]
) -> dict[str, Any]:
  """Generates the protocol's images and evaluates them; adds the row to `out` and returns it.

  Args:
    source: what identifies the weights: `model`, `workdir`, `checkpoint`, `step`, ...

  Raises:
    UserError: images of another size or classes than the protocol's; pixels that are not finite.
    Preempted: a signal came; the same call goes on.
  """
  judge = judge.fitted_to(generator)
  settings = dict(generator.settings)
  full = {
    **source,
    "sampler": settings,
    "steps": settings["steps"],
    "seed": judge.protocol.seed,
    "batch_size": judge.batch_size,  # the draws may depend on it
  }
  batches = _GeneratedBatches(judge.protocol, generator, judge.batch_size)
  row, state_path = judge.judge(batches, generator.name, out, full)
  row["images_per_second"] = from_first(batches.images_per_second)
  num = min(judge.batch_size, judge.protocol.num_images)
  labels = np.resize(judge.protocol.labels()[:num], judge.batch_size)
  first = generator.batch(labels, judge.protocol.seed, 0)
  shown, _ = _levels(first, judge.protocol)
  shown = fetch(shown)[: min(num, _NUM_PICTURES)]
  _finish(generator.name, out, row, state_path, shown)
  return row


def make_statistics(
  images: ImageSet,
  protocol: PublishedProtocol,
  inception: Inception,
  mesh: jax.sharding.Mesh,
  out: Path,
  *,
  batch_size: int,
) -> dict[str, Any]:
  """Writes the statistics file of all images of a set; returns what it was made with.

  It has `mu, sigma` and `mu_s, sigma_s` as the published ones, `features` of up to
  `protocol.num_kept` images, `num`, and `settings`.

  Raises:
    UserError: images of another size than the protocol's, or fewer than two.
    Preempted: a signal came; the same call goes on.
  """
  check_size(protocol, images.image_shape, images.name)
  check_batch(batch_size, mesh, "batch_size")
  if len(images) < max(2, protocol.num_splits):
    raise UserError(f"{images.name} has {len(images)} images: too few for statistics")
  whole = dataclasses.replace(protocol, num_images=len(images))
  settings = {
    "protocol": protocol.name,
    "image_size": protocol.image_size,
    "resize": protocol.resize,
    "inception_sha256": inception.sha256,
    "images": images.name,
    "images_fingerprint": images.fingerprint(),
  }
  extractor = Extractor(inception, protocol.resize, mesh, batch_size, SPATIAL_TAPS)
  state_path = _state_path(out, settings)
  sums = accumulate(
    image_batches(images, len(images), batch_size),
    extractor,
    FeatureSums.of(whole, spatial=True),
    num_images=len(images),
    what=images.name,
    state_path=state_path,
    settings=settings,
    between_batches=STOP.raise_if_set,
  )
  pool = sums.pool.result()
  assert sums.spatial is not None
  spatial = sums.spatial.result()
  arrays = {
    "mu": pool.mean,
    "sigma": pool.covariance,
    "mu_s": spatial.mean,
    "sigma_s": spatial.covariance,
    "features": sums.features,
    "num": np.array(pool.num),
    SETTINGS_KEY: np.array(json.dumps(settings)),
  }
  write_arrays(out, arrays)
  state_path.unlink(missing_ok=True)
  made = {**settings, "num": pool.num, "statistics": str(out), "sha256": file_sha256(out)}
  say(f"{images.name}: statistics of {pool.num} images for {protocol.name}: {out}")
  return made
