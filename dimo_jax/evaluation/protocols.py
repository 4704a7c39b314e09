"""Protocols: everything that must be the same for two numbers to be comparable.

A protocol fixes the reference split, the number of images and their classes, the rounding to the
data set's own levels and the neighbourhood size. The feature network is the remaining ingredient:
report `Classifier.weight_hash()` beside every number.
"""

import dataclasses
import hashlib

import numpy as np

from dimo_jax.evaluation import features, metrics
from dimo_jax.types import Array, Float, Int, UserError

__all__ = ["PROTOCOLS", "Protocol", "Reference"]


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How a number is made.

  Attributes:
    name: key in `PROTOCOLS`.
    reference_split: the split that samples are compared with.
    num_images: how many images to generate (the Fréchet distance depends on it).
    num_levels: grey levels of the data set, equally spaced over [-1, 1].
    num_neighbors: k of precision and recall.
    feature_network: what the features are, for the report.
    classifier_steps: updates of the feature network's training.
  """

  name: str
  reference_split: str
  num_images: int
  num_levels: int
  num_neighbors: int
  feature_network: str
  classifier_steps: int

  def labels(self, reference_labels: Int[np.ndarray, " m"]) -> Int[np.ndarray, " n"]:
    """The classes to generate: the reference split's labels in order, repeated if too few.

    With num_images equal to the size of the split the class counts are the same.
    """
    return np.resize(np.asarray(reference_labels), self.num_images)

  def round_images(self, images: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Images clipped to [-1, 1] and rounded to the data set's levels, as float32."""
    unit = (np.clip(np.asarray(images, np.float64), -1, 1) + 1) / 2
    top = self.num_levels - 1
    return (np.round(unit * top) / top * 2 - 1).astype(np.float32)

  def reference(
    self, classifier: features.Classifier, images: np.ndarray | Array, labels: np.ndarray | Array
  ) -> "Reference":
    """The reference side, computed once for any number of evaluations.

    Args:
      classifier: the feature network.
      images: [m, h, w, c] in [-1, 1], the reference split.
      labels: [m] integers.

    Raises:
      UserError: as `Reference.evaluate`.
    """
    images, labels = _check(self, classifier, images, labels, "reference")
    reference_features, _ = classifier.features_and_logits(images)
    statistics = metrics.FeatureStatistics.from_features(reference_features)
    return Reference(self, classifier, images, reference_features, statistics)


@dataclasses.dataclass(frozen=True)
class Reference:
  """Cached reference features of one protocol, classifier and split; made by the protocol.

  Attributes:
    protocol: the protocol.
    classifier: the feature network.
    images: [m, h, w, c], rounded.
    features: [m, f] float32.
    statistics: of the features.
  """

  protocol: Protocol
  classifier: features.Classifier
  images: Float[np.ndarray, "m h w c"]
  features: Float[np.ndarray, "m f"]
  statistics: metrics.FeatureStatistics

  @property
  def sha256(self) -> str:
    """Of the reference features."""
    return hashlib.sha256(self.features.tobytes()).hexdigest()

  def evaluate(
    self,
    images: np.ndarray | Array,
    labels: np.ndarray | Array,
    tokens: np.ndarray | Array | None = None,
    codebook_size: int | None = None,
  ) -> dict[str, float | int | None]:
    """All metrics of a set of images.

    Args:
      images: [n, h, w, c]; values outside [-1, 1] are clipped.
      labels: [n], the classes that were asked for.
      tokens: [n, l] integers behind the images, where there are any.
      codebook_size: needed with tokens.

    Returns:
      frechet_distance; frechet_distance_low and _high (its 95 % interval over the draw of the
      images, see `metrics.frechet_interval`); frechet_distance_normalized (by the trace of the
      reference covariance, comparable across feature networks); class_agreement, precision,
      recall, coverage and authenticity in [0, 1]; density; token_entropy (nats; None without
      tokens); nearest_distance (median over images of the Euclidean pixel distance to the nearest
      reference image, pixels in [-1, 1]);
      num_distinct (different images after rounding); num_images.

    Raises:
      UserError: not finite, wrong shape, too few images for a full-rank covariance, labels or
        tokens out of range.
    """
    images, labels = _check(self.protocol, self.classifier, images, labels, "generated")
    entropy = None if tokens is None else _token_entropy(tokens, codebook_size, len(images))
    image_features, logits = self.classifier.features_and_logits(images)
    statistics = metrics.FeatureStatistics.from_features(image_features)
    frechet_distance = metrics.frechet_distance(self.statistics, statistics)
    interval = metrics.frechet_interval(self.statistics, statistics, image_features)
    neighbors = metrics.precision_recall(self.features, image_features, self.protocol.num_neighbors)
    return {
      "frechet_distance": frechet_distance,
      "frechet_distance_low": interval.low if interval else None,
      "frechet_distance_high": interval.high if interval else None,
      "frechet_distance_normalized": frechet_distance / float(np.trace(self.statistics.covariance)),
      "class_agreement": metrics.class_agreement(logits, labels),
      **neighbors._asdict(),
      "authenticity": metrics.authenticity(self.features, image_features),
      "token_entropy": entropy,
      "nearest_distance": float(np.median(metrics.nearest_distances(images, self.images))),
      "num_distinct": metrics.num_distinct(images),
      "num_images": len(images),
    }


def _check(
  protocol: Protocol,
  classifier: features.Classifier,
  images: np.ndarray | Array,
  labels: np.ndarray | Array,
  what: str,
) -> tuple[Float[np.ndarray, "n h w c"], Int[np.ndarray, " n"]]:
  """Images rounded as the protocol says, and labels; UserError if they cannot be evaluated."""
  images, labels = np.asarray(images), np.asarray(labels)
  if images.ndim != 4 or images.shape[1:] != tuple(classifier.image_shape):
    raise UserError(f"{what} images have shape {images.shape}, not (n, *{classifier.image_shape})")
  needed = classifier.module.num_features + 1
  if len(images) < needed:
    raise UserError(
      f"{what} images: {len(images)} are too few; the features need at least {needed}"
    )
  num_bad = np.count_nonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
  if num_bad:
    raise UserError(f"{what} images: {num_bad} of {len(images)} hold NaN or infinite pixels")
  if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
    raise UserError(
      f"{what} labels are {labels.dtype} {labels.shape}, not one integer for each of the"
      f" {len(images)} images"
    )
  num_classes = classifier.module.num_classes
  if labels.min() < 0 or labels.max() >= num_classes:
    raise UserError(
      f"{what} labels span {labels.min()} to {labels.max()}; must be in [0, {num_classes})"
    )
  return protocol.round_images(images), labels


def _token_entropy(tokens: np.ndarray | Array, codebook_size: int | None, num_images: int) -> float:
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or len(tokens) != num_images or not np.issubdtype(tokens.dtype, np.integer):
    raise UserError(
      f"tokens are {tokens.dtype} {tokens.shape}, not integers ({num_images}, length)"
    )
  if codebook_size is None:
    raise UserError("codebook_size=None; tokens need it for their entropy")
  return metrics.token_entropy(tokens, codebook_size)


_DIGITS = Protocol(
  name="digits",
  reference_split="train",
  num_images=1437,
  num_levels=17,
  num_neighbors=3,
  feature_network="32 penultimate features of a small convolutional classifier of the digits",
  classifier_steps=800,
)
PROTOCOLS = {
  "digits": _DIGITS,
  # For configs/debug.py: the same wiring in a second; its numbers mean nothing.
  "debug": dataclasses.replace(
    _DIGITS,
    name="debug",
    num_images=96,
    feature_network="a barely trained classifier: these numbers mean nothing",
    classifier_steps=40,
  ),
}
