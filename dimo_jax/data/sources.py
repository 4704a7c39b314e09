"""Labelled images by index: one small protocol, and a registry by config name."""

import functools
import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from dimo_jax.data.folders import load_folder
from dimo_jax.data.images import sample
from dimo_jax.data.prepared import load_prepared
from dimo_jax.data.tfds import load_tfds
from dimo_jax.types import UserError, choose

__all__ = [
  "SOURCES",
  "SPLITS",
  "ArraySource",
  "PairSource",
  "Row",
  "Source",
  "load_pairs",
  "load_source",
  "pixels_sha256",
]

SPLITS = ("train", "test")
_NUM_NOISE_IMAGES = 50_000
_NUM_COMPARED = 64  # images


@runtime_checkable
class Source(Protocol):
  """Random access to images; a pure function of the index, the same on every host."""

  def __hash__(self) -> int: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: SupportsIndex, /) -> dict[str, np.ndarray]:
    """{"image": float32 [h, w, c] in [-1, 1], "class_id": int32 scalar}."""
    ...

  @property
  def num_classes(self) -> int: ...

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(h, w, c)."""
    ...

  @property
  def num_levels(self) -> int:
    """Number of equally spaced values a channel takes in [-1, 1]."""
    ...

  @property
  def labels(self) -> Int32[np.ndarray, " n"]: ...


@dataclass(frozen=True, eq=False)
class ArraySource:
  """Images held in memory as integer levels 0 .. num_levels - 1."""

  levels: UInt8[np.ndarray, "n h w c"]
  labels: Int32[np.ndarray, " n"]
  num_classes: int
  num_levels: int

  def __len__(self) -> int:
    return len(self.levels)

  def __getitem__(self, index: SupportsIndex, /) -> dict[str, np.ndarray]:
    return sample(self.levels[index], self.labels[index], self.num_levels)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    h, w, c = self.levels.shape[1:]
    return h, w, c


@dataclass(frozen=True)
class NoiseSource:
  """Uniformly random pixels, made when they are asked for: a data set's stand-in."""

  split: str
  image_size: int
  num_classes: int
  num_levels: int = 256

  def __len__(self) -> int:
    return _NUM_NOISE_IMAGES

  def __getitem__(self, index: SupportsIndex, /) -> dict[str, np.ndarray]:
    index = index.__index__()
    rng = np.random.default_rng([SPLITS.index(self.split), index])
    levels = rng.integers(self.num_levels, size=self.image_shape, dtype=np.uint8)
    return sample(levels, self.labels[index], self.num_levels)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return self.image_size, self.image_size, 3

  @functools.cached_property
  def labels(self) -> Int32[np.ndarray, " n"]:
    return np.arange(len(self), dtype=np.int32) % self.num_classes


def load_source(
  name: str,
  split: str,
  path: str | None = None,
  *,
  image_size: int = 0,
  tfds_name: str = "",
  num_classes: int = 0,
) -> Source:
  """The `split` ("train" or "test") of the source that the config calls `name`.

  Args:
    path: where the data lie, for sources that read files; None or "" for the others.
    image_size: pixels a side that images are scaled and cropped to; 0 where all have one size.
    tfds_name: of the data set, for "tfds".
    num_classes: of sources that know none of their own; others do not look at it.

  Raises:
    UserError: unknown name or split, a field that is missing, not wanted or names bad data.
  """
  row = choose(SOURCES, name, "data.name", extensible=True)
  if split not in SPLITS:
    raise UserError(f"split={split!r} is unknown; known: {', '.join(SPLITS)}")
  given = {"path": path or None, "image_size": image_size, "tfds_name": tfds_name}
  for field, value in given.items():
    if value and field not in row.fields:
      right = "0" if field == "image_size" else "empty"
      raise UserError(
        f"data.{field}={value!r} has no use with data.name={name!r}; leave it {right}"
      )
  if image_size < 0:
    raise UserError(f"data.image_size={image_size} must be positive, or 0 for images of one size")
  given["num_classes"] = num_classes
  return row.load(split, **{field: given[field] for field in row.fields})


def _digits(split: str) -> Source:
  """scikit-learn's 1797 grey 8x8 digits with levels 0..16: 1437 train, 360 test, stratified."""
  # Imported here because scikit-learn takes a second and other sources do without.
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  bunch = load_digits()
  # Not the run's seed: the test images stay the same whatever a run does.
  rows = train_test_split(
    np.arange(len(bunch.target)), test_size=360, stratify=bunch.target, random_state=0
  )[SPLITS.index(split)]
  return ArraySource(
    levels=bunch.images[rows, :, :, None].astype(np.uint8),
    labels=bunch.target[rows].astype(np.int32),
    num_classes=10,
    num_levels=17,
  )


def _arrays(split: str, path: str | None) -> Source:
  """A .npz file with images_{train,test} uint8 [n,h,w,c] and labels_{train,test} integer [n].

  Classes are 0 .. max(labels_train).
  """
  if path is None:
    raise UserError("data.name='arrays' needs data.path, the .npz file to read")
  arrays = _read_npz(path, [f"images_{split}", f"labels_{split}", "labels_train"])
  images, labels = arrays[f"images_{split}"], arrays[f"labels_{split}"]
  if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
    raise UserError(
      f"{path}: images_{split} is {images.dtype} {list(images.shape)}, "
      "must be uint8 [n, h, w, c] and not empty"
    )
  if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
    raise UserError(
      f"{path}: labels_{split} is {labels.dtype} {list(labels.shape)}, "
      f"must be integer [{len(images)}]"
    )
  num_classes = int(arrays["labels_train"].max()) + 1
  if labels.min() < 0 or labels.max() >= num_classes:
    raise UserError(
      f"{path}: labels_{split} spans {labels.min()} to {labels.max()}, must lie in 0 to "
      f"{num_classes - 1} (the largest of labels_train)"
    )
  return ArraySource(images, labels.astype(np.int32), num_classes, num_levels=256)


def _noise(split: str, image_size: int, num_classes: int) -> Source:
  """RGB noise of any size, to try a config without its data set."""
  if not image_size or num_classes < 1:
    name, value = ("num_classes", num_classes) if image_size else ("image_size", image_size)
    raise UserError(f"data.{name}={value} must be positive with data.name='noise'")
  return NoiseSource(split, image_size, num_classes)


@dataclass(frozen=True, eq=False)
class PairSource:
  """Noise-image pairs of a teacher, held in memory."""

  noise: Float32[np.ndarray, "n h w c"]
  image: Float32[np.ndarray, "n h w c"]
  class_id: Int32[np.ndarray, " n"]
  teacher_sha256: str

  def __len__(self) -> int:
    return len(self.noise)

  def __getitem__(self, index: SupportsIndex, /) -> dict[str, np.ndarray]:
    fields = {"noise": self.noise, "image": self.image, "class_id": self.class_id}
    return {name: np.asarray(array[index]) for name, array in fields.items()}


def load_pairs(path: str, image_shape: tuple[int, int, int], num_classes: int) -> PairSource:
  """The pairs that `--mode=pairs` wrote.

  Raises:
    UserError: no such file, or not pairs of this shape and these classes.
  """
  keys = ["noise", "image", "class_id", "teacher_sha256"]
  arrays = _read_npz(path, keys, field="data.pairs")
  for name in ("noise", "image"):
    if arrays[name].shape[1:] != image_shape or not len(arrays[name]):
      raise UserError(
        f"data.pairs={path!r}: {name} is {list(arrays[name].shape)}, must be"
        f" [n, {', '.join(map(str, image_shape))}]"
      )
  labels = arrays["class_id"]
  lengths = [len(arrays[name]) for name in ("noise", "image")] + [labels.size]
  if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(set(lengths)) > 1:
    raise UserError(
      f"data.pairs={path!r}: {lengths[0]} noises go with {lengths[1]} images and class_id"
      f" {labels.dtype} {list(labels.shape)}, must be integer [{lengths[0]}]"
    )
  if labels.min() < 0 or labels.max() >= num_classes:
    raise UserError(
      f"data.pairs={path!r}: class_id spans {labels.min()} to {labels.max()}, must lie in 0 to"
      f" {num_classes - 1}"
    )
  return PairSource(
    arrays["noise"].astype(np.float32),
    arrays["image"].astype(np.float32),
    labels.astype(np.int32),
    str(arrays["teacher_sha256"]),
  )


def _read_npz(path: str, keys: list[str], field: str = "data.path") -> dict[str, np.ndarray]:
  """The named arrays of a .npz file; never unpickles."""
  try:
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
      return {key: file[key] for key in keys}
  except OSError as error:
    raise UserError(f"{field}={path!r} cannot be read: {error.strerror or error}") from error
  except KeyError as error:
    raise UserError(f"{path}: no array named {error.args[0].split()[0]!r}") from error
  except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f"{field}={path!r} is no .npz file of plain arrays: {error}") from error


@dataclass(frozen=True)
class Row:
  """How a source is loaded, and which fields of `config.data` it reads besides the name."""

  load: Callable[..., Source]
  fields: tuple[str, ...] = ()


SOURCES = {
  "digits": Row(_digits),
  "arrays": Row(_arrays, ("path",)),
  "prepared": Row(load_prepared, ("path", "image_size")),
  "noise": Row(_noise, ("image_size", "num_classes")),
  "folder": Row(load_folder, ("path", "image_size")),
  "tfds": Row(load_tfds, ("path", "image_size", "tfds_name")),
}


def pixels_sha256(source: Source) -> str:
  """Of the pixels of some images of a source, evenly spaced."""
  digest = hashlib.sha256()
  for index in np.linspace(0, len(source) - 1, min(len(source), _NUM_COMPARED), dtype=int):
    digest.update(source[int(index)]["image"].tobytes())
  return digest.hexdigest()
