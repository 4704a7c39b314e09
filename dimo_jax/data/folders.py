"""Image files in one folder for each class."""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int32

from dimo_jax.data.images import check_shape, decode_image, sample
from dimo_jax.types import UserError

__all__ = ["FolderSource", "holds_classes", "load_folder"]

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
FOLDERS = {"train": ("train",), "test": ("val", "test")}  # of a split: the first that is there
_NUM_COMPARED = 16  # images


@dataclass(frozen=True, eq=False)
class FolderSource:
  """Image files, RGB, decoded when they are asked for.

  Attributes:
    image_size: as in `decode_image`.
  """

  paths: Sequence[str]
  labels: Int32[np.ndarray, " n"]
  num_classes: int
  image_shape: tuple[int, int, int]
  image_size: int
  num_levels: int = 256

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: SupportsIndex, /) -> dict[str, np.ndarray]:
    path = self.paths[index.__index__()]
    try:
      levels = decode_image(path, path, image_size=self.image_size)
    except UserError as error:
      hint = "remove it, or let python -m dimo_jax.data.prepare pass such files over"
      raise UserError(f"{error}; {hint}") from error
    check_shape(levels, self.image_shape, path)
    return sample(levels, self.labels[index], self.num_levels)


def load_folder(split: str, path: str | None, image_size: int) -> FolderSource:
  """The files path/{train, val or test}/<class name>/*.{png,jpg,jpeg,webp}, in order of name.

  Classes are the sorted names of the folders in train. The split "test" is val where there is one,
  else test. Hidden files are passed over.
  """
  if path is None or not os.path.isdir(path):
    raise UserError(
      f"data.path={path or ''!r} must be the folder that holds train and val or test, with"
      " data.name='folder'"
    )
  try:
    return _load(split, path, image_size)
  except OSError as error:
    raise UserError(
      f"data.path={path!r} cannot be read: {error.filename}: {error.strerror or error}"
    ) from error


def _load(split: str, path: str, image_size: int) -> FolderSource:
  train, test = (_split_folder(path, FOLDERS[name]) for name in ("train", "test"))
  classes, test_classes = _visible(train, os.DirEntry.is_dir), _visible(test, os.DirEntry.is_dir)
  if not classes:
    raise UserError(f"{train} has no folders, must have one of images for each class")
  if classes != test_classes:
    differences = [
      f"only {folder} has {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
      for folder, names in (
        (train, sorted({*classes} - {*test_classes})),
        (test, sorted({*test_classes} - {*classes})),
      )
      if names
    ]
    raise UserError(f"data.path={path!r} must have one set of classes: {'; '.join(differences)}")
  files = [_images(os.path.join(train if split == "train" else test, c)) for c in classes]
  paths = [file for names in files for file in names]
  shape = (image_size, image_size, 3)
  if not image_size:
    first = _images(os.path.join(train, classes[0]))[0]
    h, w, channels = decode_image(first, first, image_size=0).shape
    shape = h, w, channels
    for file in paths[:: -(-len(paths) // _NUM_COMPARED)]:  # most mixed folders show at once
      try:
        levels = decode_image(file, file, image_size=0)
      except UserError:
        continue  # a damaged one is said when it is read
      check_shape(levels, shape, file)
  return FolderSource(
    paths=paths,
    labels=np.repeat(np.arange(len(classes), dtype=np.int32), [len(names) for names in files]),
    num_classes=len(classes),
    image_shape=shape,
    image_size=image_size,
  )


def _split_folder(path: str, names: Sequence[str]) -> str:
  for name in names:
    if os.path.isdir(os.path.join(path, name)):
      return os.path.join(path, name)
  hint = ""
  if holds_classes(path):
    hint = (
      f"; python -m dimo_jax.data.prepare --source={path} --val_fraction=0.1 --size=64 --out=DIR"
      " divides its classes, for data.name='prepared'"
    )
  raise UserError(f"data.path={path!r} must have a folder {' or '.join(map(repr, names))}{hint}")


def holds_classes(path: str) -> bool:
  """Whether it is a folder of folders with images, none of which is called as a split is."""
  try:
    folders = _visible(path, os.DirEntry.is_dir)
  except OSError:
    return False
  if set(folders) & {name for names in FOLDERS.values() for name in names}:
    return False
  for folder in folders:
    with contextlib.suppress(OSError):
      files = _visible(os.path.join(path, folder), os.DirEntry.is_file)
      if any(file.lower().endswith(EXTENSIONS) for file in files):
        return True
  return False


def _visible(folder: str, wanted: Callable[[os.DirEntry], bool]) -> list[str]:
  """Sorted names of the wanted entries of a folder."""
  with os.scandir(folder) as entries:
    return sorted(e.name for e in entries if not e.name.startswith(".") and wanted(e))


def _images(folder: str) -> list[str]:
  """Paths of the images of a class."""
  names = _visible(folder, lambda entry: entry.name.lower().endswith(EXTENSIONS))
  if not names:
    raise UserError(f"{folder} has no images, must have some of {', '.join(EXTENSIONS)}")
  return [os.path.join(folder, name) for name in names]
