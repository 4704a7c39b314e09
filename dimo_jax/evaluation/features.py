"""A small classifier whose penultimate layer is the feature space of the small-data protocols.

Published FID uses Inception, which means nothing on 8x8 digits: there a classifier trained on the
same data takes its place. Its features define the Fréchet distance, so a number holds only for one
set of weights: record `Classifier.weight_hash()` beside it.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from flax import traverse_util

from dimo_jax.evaluation import metrics
from dimo_jax.types import Array, Float, Key, Params, UserError

__all__ = ["Classifier", "FeatureClassifier", "train_classifier"]

CHUNK = 512  # images per call of the network: inputs are padded to it, so it compiles once
WEIGHT_DECAY = 0.1
METADATA_KEY = "dimo_jax.classifier"


class FeatureClassifier(nn.Module):
  """Convolutions down to 4x4 pixels, then two dense layers; all activations are GELU.

  Attributes:
    num_classes: number of logits.
    width: channels of the first convolution; every halving of the resolution doubles them once.
    num_features: size of the penultimate layer.
  """

  num_classes: int
  width: int = 32
  num_features: int = 32

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"]
  ) -> tuple[Float[Array, "b f"], Float[Array, "b k"]]:
    """Features after their GELU, and logits, of images in [-1, 1]."""
    x = nn.gelu(nn.Conv(self.width, (3, 3))(images))
    while min(x.shape[1:3]) > 4:
      x = nn.gelu(nn.Conv(2 * self.width, (3, 3), strides=(2, 2))(x))
    x = x.reshape(x.shape[0], -1)
    features = nn.gelu(nn.Dense(self.num_features)(x))
    return features, nn.Dense(self.num_classes)(features)


# Inference compiles once per module and image shape; the parameters are arguments.
_apply = jax.jit(
  lambda module, params, images: module.apply({"params": params}, images), static_argnums=0
)


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A trained feature network with what is needed to use, identify and reload it.

  Attributes:
    module: the network.
    params: its float32 parameters.
    image_shape: (height, width, channels) that it was trained on.
    seed: the seed that it was trained with.
    test_accuracy: on held-out images, if they were given to `train_classifier`.
  """

  module: FeatureClassifier
  params: Params
  image_shape: tuple[int, int, int]
  seed: int
  test_accuracy: float | None = None

  def features_and_logits(
    self, images: np.ndarray | Array
  ) -> tuple[Float[np.ndarray, "n f"], Float[np.ndarray, "n k"]]:
    """Features and logits (float32) of any number of images [n, h, w, c] in [-1, 1].

    Raises:
      UserError: the images are not of the shape that the classifier knows.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[1:] != tuple(self.image_shape) or not len(images):
      raise UserError(
        f"images have shape {images.shape}; the classifier takes (n, *{self.image_shape}), n >= 1"
      )
    outputs = []
    for start in range(0, len(images), CHUNK):
      chunk = images[start : start + CHUNK]
      padding = [(0, CHUNK - len(chunk))] + [(0, 0)] * 3
      features, logits = _apply(self.module, self.params, np.pad(chunk, padding))
      outputs.append((np.asarray(features)[: len(chunk)], np.asarray(logits)[: len(chunk)]))
    features, logits = zip(*outputs, strict=True)
    return np.concatenate(features), np.concatenate(logits)

  def accuracy(self, images: np.ndarray | Array, labels: np.ndarray | Array) -> float:
    """Fraction of images [n, h, w, c] whose largest logit is at their label."""
    return metrics.class_agreement(self.features_and_logits(images)[1], np.asarray(labels))

  def weight_hash(self) -> str:
    """sha256 over the sorted paths and bytes of the parameters; it names the feature space."""
    digest = hashlib.sha256()
    for path, leaf in sorted(_flatten(self.params).items()):
      digest.update(path.encode())
      digest.update(leaf.tobytes())
    return digest.hexdigest()

  def save(self, path: str | os.PathLike) -> None:
    """Writes parameters and metadata to one safetensors file, whole or not at all."""
    metadata = {
      "num_classes": self.module.num_classes,
      "width": self.module.width,
      "num_features": self.module.num_features,
      "image_shape": self.image_shape,
      "seed": self.seed,
      "test_accuracy": self.test_accuracy,
    }
    data = safetensors.numpy.save(_flatten(self.params), {METADATA_KEY: json.dumps(metadata)})
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
      temporary.write_bytes(data)
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Classifier":
    """Reads what `save` wrote.

    Raises:
      UserError: no such file, or not a classifier's.
    """
    try:
      with safetensors.safe_open(path, framework="np") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
      raise UserError(f"classifier: no file {path}") from None
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
      raise UserError(f"classifier: {path} is not a file that Classifier.save wrote") from error
    return cls(
      module=FeatureClassifier(
        metadata["num_classes"], metadata["width"], metadata["num_features"]
      ),
      params=traverse_util.unflatten_dict(flat, sep="/"),
      image_shape=tuple(metadata["image_shape"]),
      seed=metadata["seed"],
      test_accuracy=metadata["test_accuracy"],
    )


def _flatten(params: Params) -> dict[str, np.ndarray]:
  flat = traverse_util.flatten_dict(params, sep="/")
  return {path: np.ascontiguousarray(leaf) for path, leaf in flat.items()}


def train_classifier(
  images: np.ndarray | Array,
  labels: np.ndarray | Array,
  num_classes: int,
  *,
  seed: int = 0,
  num_steps: int = 800,
  batch_size: int = 128,
  learning_rate: float = 2e-3,
  test_images: np.ndarray | Array | None = None,
  test_labels: np.ndarray | Array | None = None,
) -> Classifier:
  """Trains the feature network: AdamW, cosine decay to 0, random shifts by up to one pixel.

  Deterministic: the same arguments give the same weights on the same machine and core count.

  Args:
    images: [n, h, w, c] in [-1, 1].
    labels: [n] in [0, num_classes).
    num_classes: number of logits.
    seed: of the initial weights, the batches and the shifts.
    num_steps: updates.
    batch_size: images per update, drawn with replacement.
    learning_rate: peak learning rate.
    test_images: held-out images; only measured, into `Classifier.test_accuracy`.
    test_labels: their labels.

  Raises:
    UserError: labels out of range or not one per image.
  """
  images, labels = jnp.asarray(images, jnp.float32), np.asarray(labels)
  if images.ndim != 4 or labels.shape != images.shape[:1] or not len(images):
    raise UserError(f"images {images.shape} and labels {labels.shape} are not [n, h, w, c] and [n]")
  if labels.min() < 0 or labels.max() >= num_classes:
    raise UserError(f"labels span {labels.min()} to {labels.max()}; must be in [0, {num_classes})")
  labels = jnp.asarray(labels, jnp.int32)
  module = FeatureClassifier(num_classes)
  init_key, train_key = jax.random.split(jax.random.key(seed))
  params = module.init(init_key, images[:1])["params"]
  optimizer = optax.adamw(
    optax.cosine_decay_schedule(learning_rate, num_steps), weight_decay=WEIGHT_DECAY
  )

  def loss_fn(params, batch_images, batch_labels):
    logits = module.apply({"params": params}, batch_images)[1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch_labels).mean()

  @jax.jit
  def train_step(params, optimizer_state, images, labels, key):
    index_key, shift_key = jax.random.split(key)
    index = jax.random.randint(index_key, (batch_size,), 0, len(images))
    gradients = jax.grad(loss_fn)(params, _random_shift(shift_key, images[index]), labels[index])
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state

  optimizer_state = optimizer.init(params)
  for step in range(num_steps):
    key = jax.random.fold_in(train_key, step)
    params, optimizer_state = train_step(params, optimizer_state, images, labels, key)
  height, width, channels = images.shape[1:]
  classifier = Classifier(module, jax.device_get(params), (height, width, channels), seed)
  if test_images is None or test_labels is None:
    return classifier
  test_accuracy = classifier.accuracy(test_images, test_labels)
  return dataclasses.replace(classifier, test_accuracy=test_accuracy)


def _random_shift(key: Key, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  """Each image moved by -1, 0 or 1 pixel along both axes; what enters is black (-1)."""
  padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
  offsets = jax.random.randint(key, (len(images), 2), 0, 3)

  def crop(image, offset):
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

  return jax.vmap(crop)(padded, offsets)
