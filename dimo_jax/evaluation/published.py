"""Published protocols of the Fréchet inception distance: what "which FID?" asks, answered by name.

A protocol fixes everything between a generator's floats and the number: rounding to levels, resize,
number of images and their classes, seed, splits and neighbourhoods. The statistics file it is
compared with, and Inception's weights, are recorded by hash in every result; what has not been
checked against the published thing is listed there under `unverified`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dimo_jax.evaluation.resize import RESIZES
from dimo_jax.types import Array, Float, Int, UInt8, UserError, choose

__all__ = ["PUBLISHED", "ROUNDINGS", "PublishedProtocol"]

# From floats in [-1, 1] to levels 0..255; what lies outside is clipped.
ROUNDINGS: Mapping[str, Callable[[Any], Any]] = {
  "floor": lambda x: jnp.floor(jnp.clip((x + 1) * 127.5, 0, 255)),  # ADM's sampling scripts
  "nearest": lambda x: jnp.floor(jnp.clip(x * 127.5 + 128, 0, 255)),  # EDM; torchvision's writer
}


@dataclasses.dataclass(frozen=True)
class PublishedProtocol:
  """How a number is made.

  Attributes:
    name: key in `PUBLISHED`.
    source: where it was published.
    statistics: the published statistics' file, or how they are made.
    image_size: pixels a side of the generated images.
    num_classes: of the data set.
    rounding: a key of `ROUNDINGS`.
    resize: a key of `RESIZES`, to Inception's size.
    num_images: how many to generate.
    classes: "uniform" draws class ids from `seed`; "balanced" repeats all in turn.
    seed: of the classes and the generator's draws.
    num_splits: of the Inception Score, in the images' order, from logits without bias.
    num_neighbors, balls: of precision, recall, density and coverage.
    num_kept: how many images' features, drawn from `seed`, the metrics beyond sums take.
    verified: the published statistics were at hand and gave a published number.
  """

  name: str
  source: str
  statistics: str
  image_size: int
  num_classes: int
  rounding: str
  resize: str
  num_images: int = 50_000
  classes: str = "uniform"
  seed: int = 0
  num_splits: int = 10
  num_neighbors: int = 3
  balls: str = "closed"
  num_kept: int = 10_000
  verified: bool = False

  def __post_init__(self):
    choose(ROUNDINGS, self.rounding, "rounding")
    choose(RESIZES, self.resize, "resize")
    choose(dict.fromkeys(("uniform", "balanced")), self.classes, "classes")

  def levels(self, images: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Levels 0..255 of images in [-1, 1]."""
    return ROUNDINGS[self.rounding](images).astype(jnp.uint8)

  def labels(self) -> Int[np.ndarray, " n"]:
    """The classes to generate, int32."""
    if self.classes == "balanced":
      return np.resize(np.arange(self.num_classes, dtype=np.int32), self.num_images)
    random = np.random.RandomState(self.seed)
    return random.randint(0, self.num_classes, self.num_images).astype(np.int32)

  def kept(self) -> Int[np.ndarray, " k"]:
    """Sorted positions of the images whose features are kept."""
    order = np.random.RandomState(self.seed).permutation(self.num_images)
    return np.sort(order[: self.num_kept])

  def with_images(self, num_images: int) -> "PublishedProtocol":
    """The protocol with another number of images: its results are no longer comparable.

    Raises:
      UserError: fewer images than splits of the score.
    """
    if num_images < max(self.num_splits, 2):
      raise UserError(f"num_images={num_images} must be {max(self.num_splits, 2)} or more")
    return dataclasses.replace(self, num_images=num_images)

  def departures(self) -> dict[str, Any]:
    """Fields that differ from the protocol of this name."""
    original = PUBLISHED.get(self.name, self)
    fields = (field.name for field in dataclasses.fields(self))
    return {f: getattr(self, f) for f in fields if getattr(self, f) != getattr(original, f)}


PUBLISHED = {
  protocol.name: protocol
  for protocol in (
    PublishedProtocol(
      name="adm-imagenet256",
      source="arXiv:2105.05233, guided-diffusion's evaluations",
      statistics="VIRTUAL_imagenet256_labeled.npz",
      image_size=256,
      num_classes=1000,
      rounding="floor",
      resize="tf1_bilinear",
      num_kept=50_000,  # its recall depends on them
    ),
    PublishedProtocol(
      name="clean-imagenet256-val",
      source="arXiv:2104.11222 with Di[M]O's reference images (arXiv:2503.15457)",
      statistics="made from ImageNet's 50,000 validation images, scaled and cropped to 256",
      image_size=256,
      num_classes=1000,
      rounding="nearest",
      resize="clean_bicubic",
      classes="balanced",
    ),
    PublishedProtocol(
      name="edm-imagenet64",
      source="arXiv:2206.00364, also DMD2's",
      statistics="imagenet-64x64.npz",
      image_size=64,
      num_classes=1000,
      rounding="nearest",
      resize="tf1_bilinear",
    ),
  )
}
