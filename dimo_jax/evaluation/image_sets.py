"""Sets of finished images to evaluate: a folder of files, or an `.npz`; checked before any compute.

Levels are 0..255, RGB, all of one size. Nothing is held in memory beyond a batch, but for a
compressed `.npz`.
"""

import dataclasses
import hashlib
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from dimo_jax.data.folders import EXTENSIONS
from dimo_jax.data.images import decode_image
from dimo_jax.data.sources import Source, pixels_sha256
from dimo_jax.evaluation.references import read_arrays
from dimo_jax.types import Int, UInt8, UserError

__all__ = ["ArrayImages", "FolderImages", "ImageSet", "SourceImages", "open_images"]

NUM_THREADS = 8
_IMAGE_KEYS, _LABEL_KEYS = ("arr_0", "images"), ("arr_1", "labels")


@runtime_checkable
class ImageSet(Protocol):
  """Finished images.

  Attributes:
    name: what a result calls them.
    image_shape: (height, width, 3).
    labels: classes, where they are known.
  """

  @property
  def name(self) -> str: ...

  @property
  def image_shape(self) -> tuple[int, int, int]: ...

  @property
  def labels(self) -> Int[np.ndarray, " n"] | None: ...

  def __len__(self) -> int: ...

  def read(self, start: int, stop: int) -> UInt8[np.ndarray, "b h w 3"]:
    """A run of images."""
    ...

  def fingerprint(self) -> str:
    """Changes where the images do."""
    ...


def open_images(path: str | os.PathLike, image_size: int = 0) -> ImageSet:
  """A folder of image files (in it, or in a folder for each class), or an `.npz` of images.

  Args:
    image_size: of a folder's images: scaled and cropped to it as ADM does; 0: all have one size.

  Raises:
    UserError: neither, no images, sizes that differ, a damaged file, pixels that are not finite.
  """
  path = Path(path)
  if path.is_dir():
    return _open_folder(path, image_size)
  return _open_arrays(path)


@dataclasses.dataclass(frozen=True, eq=False)
class FolderImages:
  """Image files, decoded when they are read."""

  path: Path
  files: Sequence[Path]
  image_shape: tuple[int, int, int]
  labels: Int[np.ndarray, " n"] | None
  image_size: int

  @property
  def name(self) -> str:
    """The folder."""
    return str(self.path)

  def __len__(self) -> int:
    return len(self.files)

  def read(self, start: int, stop: int) -> UInt8[np.ndarray, "b h w 3"]:
    """Decodes a run of files, several at a time."""

    def decode(file: Path) -> np.ndarray:
      return decode_image(str(file), str(file), image_size=self.image_size)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
      return np.stack(list(pool.map(decode, self.files[start:stop])))

  def fingerprint(self) -> str:
    """Over the names, sizes and times of the files."""
    digest = hashlib.sha256(f"{self.image_size}\n".encode())
    for file in self.files:
      entry = file.stat()
      digest.update(f"{file} {entry.st_size} {entry.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _open_folder(path: Path, image_size: int) -> FolderImages:
  files = sorted(
    file
    for file in path.rglob("*")
    if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")
  )
  if not files:
    raise UserError(f"{path} has no images, must have some of {', '.join(EXTENSIONS)}")
  with ThreadPoolExecutor(NUM_THREADS) as pool:
    sizes = list(pool.map(_verified_size, files))
  for file, size in zip(files, sizes, strict=True):
    if size != sizes[0] and not image_size:
      raise UserError(
        f"{file} is {size[0]}x{size[1]} pixels, {files[0].name} {sizes[0][0]}x{sizes[0][1]}: all"
        " must have one size"
      )
  width, height = (image_size, image_size) if image_size else sizes[0]
  labels = None
  folders = [file.parent for file in files]
  if path not in folders and len(set(folders)) > 1:
    classes = sorted(set(folders))
    labels = np.array([classes.index(folder) for folder in folders], np.int32)
  return FolderImages(path, files, (height, width, 3), labels, image_size)


def _verified_size(file: Path) -> tuple[int, int]:
  """(width, height), after the checksums of the file were found right."""
  try:
    with Image.open(file) as image:
      size = image.size
      image.verify()
    return size
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{file} cannot be read as an image: {reason}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayImages:
  """Images of an `.npz`, mapped from the disk where they are not compressed."""

  path: Path
  images: UInt8[np.ndarray, "n h w 3"]
  labels: Int[np.ndarray, " n"] | None

  @property
  def name(self) -> str:
    """The file."""
    return str(self.path)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, 3)."""
    return tuple(self.images.shape[1:])

  def __len__(self) -> int:
    return len(self.images)

  def read(self, start: int, stop: int) -> UInt8[np.ndarray, "b h w 3"]:
    """A run of images."""
    return np.asarray(self.images[start:stop])

  def fingerprint(self) -> str:
    """Over the name, size and time of the file."""
    entry = self.path.stat()
    text = f"{self.path} {entry.st_size} {entry.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()


def _open_arrays(path: Path) -> ArrayImages:
  with read_arrays(path, "images") as file:
    keys = [key for key in _IMAGE_KEYS if key in file.files]
    if not keys:
      raise UserError(
        f"images={str(path)!r} holds {', '.join(file.files) or 'nothing'}; needs images as"
        f" {' or '.join(_IMAGE_KEYS)}"
      )
    labels = next((file[key] for key in _LABEL_KEYS if key in file.files), None)
    try:
      images = _mapped(path, keys[0])
      images = file[keys[0]] if images is None else images
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
      raise UserError(f"images={str(path)!r} is damaged: {str(error).splitlines()[0]}") from error
  if np.issubdtype(images.dtype, np.floating):
    num_bad = np.count_nonzero(~np.isfinite(images).reshape(len(images), -1).all(axis=1))
    if num_bad:
      raise UserError(
        f"images={str(path)!r}: {num_bad} of {len(images)} hold NaN or infinite pixels"
      )
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
    raise UserError(
      f"images={str(path)!r} are {images.dtype} {images.shape}; must be uint8 (n, height, width, 3)"
    )
  if labels is not None and (
    labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)
  ):
    raise UserError(
      f"images={str(path)!r}: labels are {labels.dtype} {labels.shape}; must be one integer for"
      f" each of the {len(images)} images"
    )
  return ArrayImages(path, images, labels)


def _mapped(path: Path, key: str) -> np.ndarray | None:
  """An array of an `.npz` as a memory map; None where it is compressed."""
  with zipfile.ZipFile(path) as archive, open(path, "rb") as stream:
    entry = archive.getinfo(f"{key}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
      return None
    stream.seek(entry.header_offset + 26)  # lengths of name and extra field, then these, then data
    lengths = np.frombuffer(stream.read(4), "<u2")
    stream.seek(int(lengths.sum()), os.SEEK_CUR)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):  # longer headers are for structured types
      return None
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran or dtype.hasobject:
      return None
    return np.memmap(path, dtype, "r", offset=stream.tell(), shape=shape)


@dataclasses.dataclass(frozen=True, eq=False)
class SourceImages:
  """A split of a data set of `dimo_jax.data`, as levels.

  Attributes:
    source: with 256 levels and three channels.
    name: what a result calls it.
  """

  source: Source
  name: str

  def __post_init__(self):
    if self.source.num_levels != 256 or self.source.image_shape[-1] != 3:
      raise UserError(
        f"{self.name} has images {self.source.image_shape} of {self.source.num_levels} levels; must"
        " be RGB of 256 levels"
      )

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, 3)."""
    return self.source.image_shape

  @property
  def labels(self) -> Int[np.ndarray, " n"] | None:
    """The classes."""
    return np.asarray(self.source.labels)

  def __len__(self) -> int:
    return len(self.source)

  def read(self, start: int, stop: int) -> UInt8[np.ndarray, "b h w 3"]:
    """A run of images."""
    images = np.stack([self.source[i]["image"] for i in range(start, stop)])
    return np.round((images + 1) * 127.5).astype(np.uint8)

  def fingerprint(self) -> str:
    """Over the name, the classes and the pixels of some images."""
    digest = hashlib.sha256(self.name.encode() + np.asarray(self.labels).tobytes())
    digest.update(pixels_sha256(self.source).encode())
    return digest.hexdigest()
