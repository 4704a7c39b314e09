"""What a data set on disk holds: folders of images, or tar files as ImageNet comes in."""

import collections
import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from dimo_jax.data.folders import EXTENSIONS, holds_classes
from dimo_jax.types import UserError

__all__ = [
  "PLACES",
  "Entry",
  "Listing",
  "classes_sha256",
  "is_imagenet",
  "list_source",
  "paths_in_source",
]

# Of ImageNet's 1000 sorted synset names: published teachers number the classes so.
_IMAGENET_SHA256 = "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15"

# Where a split may lie in a source; the first that is there is read.
PLACES = {
  "train": ("train", "ILSVRC2012_img_train.tar", "train.tar"),
  "validation": ("val", "ILSVRC2012_img_val.tar", "val.tar", "test", "test.tar"),
}


class Entry(NamedTuple):
  """An image file.

  Attributes:
    name: what records call it, as in "train/n01440764/n01440764_18.JPEG".
    label: its class.
    path: of the file, or of the tar file that holds it.
    offset, num_bytes: where in that file; num_bytes -1 is the whole of it.
  """

  name: str
  label: int
  path: str
  offset: int = 0
  num_bytes: int = -1


class _Item(NamedTuple):
  """An image file before its class is known by number; its class is "" where it lies in none."""

  class_name: str
  file_name: str
  path: str
  offset: int = 0
  num_bytes: int = -1


@dataclass(frozen=True)
class Listing:
  """The images of a source.

  Attributes:
    classes: their names, sorted; a class's id is its place here.
    splits: the images of "train" and "validation", in order of class and name.
    skipped: (name, reason) of what is no image by its name or place.
  """

  classes: list[str]
  splits: dict[str, list[Entry]]
  skipped: list[tuple[str, str]] = field(default_factory=list)

  def sha256(self) -> str:
    """Of the names and classes of all images: another set of files has another hash."""
    digest = hashlib.sha256()
    for entries in self.splits.values():
      for entry in entries:
        digest.update(f"{entry.name}\0{entry.label}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def classes_sha256(classes: Iterable[str]) -> str:
  """Of class names in order, a line for each."""
  text = "".join(f"{name}\n" for name in classes)
  return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def is_imagenet(classes: Iterable[str]) -> bool:
  """Whether these are the synset names of ImageNet's 1000 classes, sorted."""
  return classes_sha256(classes) == _IMAGENET_SHA256


def list_source(source: str, labels_path: str = "", val_fraction: float = 0.0) -> Listing:
  """Lists train and validation images of a folder that holds a place of PLACES for each, or with
  `val_fraction` the classes themselves, of which it takes that part each to validate on.

  A place is a folder `<class>/<image>`, a tar file of the same, or ImageNet's tar file with a tar
  file for each class inside. Validation images may also lie flat, then `labels_path` is a text file
  with the class name of each, a line for an image in order of name; ImageNet's own need none.

  Raises:
    UserError: nothing there, no classes, a class without images or with one that should be divided,
      or labels that do not fit.
  """
  if not os.path.isdir(source):
    raise UserError(f"--source={source!r} must be a folder that holds train and val, or tar files")
  skipped: list[tuple[str, str]] = []
  items = {}
  if val_fraction:
    items = _divided(source, val_fraction, skipped)
  else:
    for split in PLACES:
      items[split] = _read_place(_place(source, split), split, skipped)
  classes = sorted({item.class_name for item in items["train"]} - {""})
  if not classes:
    raise UserError(
      f"{_place(source, 'train')} has no images in folders of classes; images end in"
      f" {', '.join(EXTENSIONS)}{_of_tars(_place(source, 'train'))}"
    )
  validation = items["validation"]
  if validation and not any(item.class_name for item in validation):
    names = _flat_labels(_place(source, "validation"), validation, labels_path)
    items["validation"] = [
      item._replace(class_name=name) for item, name in zip(validation, names, strict=True)
    ]
  elif labels_path:
    raise UserError(f"--val_labels={labels_path!r} has no use: validation images lie in classes")
  ids = {name: i for i, name in enumerate(classes)}
  splits = {}
  for split, found in items.items():
    inside = [item for item in found if item.class_name]
    flat = [item for item in found if not item.class_name]
    skipped += [(f"{split}/{item.file_name}", "lies in no class") for item in flat]
    unknown = sorted({item.class_name for item in inside} - ids.keys())
    if unknown:
      raise UserError(
        f"{_place(source, split)} has classes that train lacks: {', '.join(unknown[:3])}"
        f"{' ...' if len(unknown) > 3 else ''}"
      )
    if not inside:
      raise UserError(f"{_place(source, split)} has no images; they end in {', '.join(EXTENSIONS)}")
    splits[split] = [
      Entry(f"{split}/{item.class_name}/{item.file_name}", ids[item.class_name], *item[2:])
      for item in sorted(inside, key=lambda item: item[:2])
    ]
  return Listing(classes, splits, sorted(skipped))


def paths_in_source(
  names: Sequence[str], listing: Listing, source: str, *, divided: bool
) -> list[str]:
  """Where to look for what a listing names: a file's path below the source, and of what lies in a
  tar file that one's, class and file.

  Args:
    names: of entries, or of what was skipped.
    divided: whether the source was listed with a `val_fraction`.
  """
  wanted = set(names)
  files = {
    entry.name: os.path.relpath(entry.path, source)
    for entries in listing.splits.values()
    for entry in entries
    if entry.num_bytes < 0 and entry.name in wanted
  }

  def path(name: str) -> str:
    split, _, rest = name.partition("/")
    return rest if divided else f"{os.path.basename(_place(source, split))}/{rest}"

  return [files.get(name) or path(name) for name in names]


def _divided(
  source: str, val_fraction: float, skipped: list[tuple[str, str]]
) -> dict[str, list[_Item]]:
  """The images of a folder of classes by split; which are whose depends on their names alone."""
  for name in (name for names in PLACES.values() for name in names):
    if os.path.exists(os.path.join(source, name)):
      raise UserError(
        f"--val_fraction={val_fraction:g} is for a folder of classes, and --source={source!r} holds"
        f" {name}"
      )
  classes = collections.defaultdict[str, list[_Item]](list)
  for item in _read_place(source, "source", skipped):
    if item.class_name:
      classes[item.class_name].append(item)
    else:
      skipped.append((f"source/{item.file_name}", "lies in no class"))
  if not classes:
    raise UserError(
      f"--source={source!r} has no images in folders of classes; they end in"
      f" {', '.join(EXTENSIONS)}{_of_tars(source)}"
    )
  items: dict[str, list[_Item]] = {split: [] for split in PLACES}
  for name, found in classes.items():
    if len(found) == 1:
      raise UserError(
        f"--val_fraction={val_fraction:g}: {os.path.join(source, name)} has one image, must have at"
        " least two"
      )
    found.sort(key=_hash_of_name)
    number = min(max(round(val_fraction * len(found)), 1), len(found) - 1)
    items["validation"] += found[:number]
    items["train"] += found[number:]
  return items


def _hash_of_name(item: _Item) -> bytes:
  name = f"{item.class_name}/{item.file_name}"
  return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _read_place(place: str, split: str, skipped: list[tuple[str, str]]) -> list[_Item]:
  read = _folder_items if os.path.isdir(place) else _tar_items
  try:
    return sorted(read(place, split, skipped), key=lambda item: item[:2])
  except OSError as error:
    raise UserError(f"{error.filename or place} cannot be read: {error.strerror}") from error


def _place(source: str, split: str) -> str:
  for name in PLACES[split]:
    if os.path.exists(os.path.join(source, name)):
      return os.path.join(source, name)
  hint, train = _of_tars(source), os.path.join(source, "train")
  if not hint and holds_classes(source):
    hint = "; it holds folders of images: --val_fraction=0.1 divides each"
  elif not hint and split != "train" and holds_classes(train):
    hint = f"; to divide the classes of train: --source={train} --val_fraction=0.1"
  raise UserError(f"--source={source!r} must hold one of {', '.join(PLACES[split])}{hint}")


def _of_tars(folder: str) -> str:
  """What to do where a folder holds the tar files of the classes."""
  if not glob.glob(os.path.join(glob.escape(folder), "*.tar")):
    return ""
  return "; it holds .tar files: unpack each to a folder of its name, or give the tar they came in"


def _folder_items(folder: str, split: str, skipped: list[tuple[str, str]]) -> Iterator[_Item]:
  with os.scandir(folder) as entries:
    for entry in entries:
      if entry.name.startswith("."):
        skipped.append((f"{split}/{entry.name}", "hidden"))
      elif entry.is_dir():
        yield from _class_items(entry.path, entry.name, split, skipped)
      elif _is_image(entry.name, f"{split}/{entry.name}", skipped):
        yield _Item("", entry.name, entry.path)


def _class_items(
  folder: str, class_name: str, split: str, skipped: list[tuple[str, str]]
) -> Iterator[_Item]:
  found = False
  with os.scandir(folder) as entries:
    for entry in entries:
      name = f"{split}/{class_name}/{entry.name}"
      if not entry.name.startswith(".") and entry.is_dir():
        skipped.append((name, "a folder within a class"))
      elif _is_image(entry.name, name, skipped):
        found = True
        yield _Item(class_name, entry.name, entry.path)
  if not found:  # passed over in silence it would shift the ids of the classes after it
    raise UserError(f"{folder} has no images; they end in {', '.join(EXTENSIONS)}")


def _tar_items(path: str, split: str, skipped: list[tuple[str, str]]) -> Iterator[_Item]:
  try:
    with tarfile.open(path, "r:") as outer:
      for member in outer:
        parts = [part for part in PurePosixPath(member.name).parts if part != "."]
        if parts and parts[0] in ("train", "val", "test"):
          del parts[0]
        if not parts or member.isdir():
          continue
        name = f"{split}/{'/'.join(parts)}"
        if not member.isfile():
          skipped.append((name, "a link within a tar file"))
        elif parts[-1].endswith(".tar"):
          yield from _inner_items(
            outer, member, parts[-1].removesuffix(".tar"), path, split, skipped
          )
        elif _is_image(parts[-1], name, skipped):
          folder = parts[-2] if len(parts) > 1 else ""
          yield _Item(folder, parts[-1], path, member.offset_data, member.size)
  except tarfile.TarError as error:
    raise UserError(f"{path} is no whole uncompressed tar file: {error}") from error


def _inner_items(
  outer: tarfile.TarFile,
  member: tarfile.TarInfo,
  class_name: str,
  path: str,
  split: str,
  skipped: list[tuple[str, str]],
) -> Iterator[_Item]:
  found = False
  with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
    for image in inner:
      name = PurePosixPath(image.name).name
      if image.isfile() and _is_image(name, f"{split}/{class_name}/{name}", skipped):
        found = True
        yield _Item(class_name, name, path, member.offset_data + image.offset_data, image.size)
  if not found:
    raise UserError(f"{path}: {member.name} has no images; they end in {', '.join(EXTENSIONS)}")


def _is_image(file_name: str, name: str, skipped: list[tuple[str, str]]) -> bool:
  """Whether a file is an image by its name; it is reported where not."""
  if file_name.startswith("."):
    skipped.append((name, "hidden"))
  elif not file_name.lower().endswith(EXTENSIONS):
    skipped.append((name, f"does not end in {', '.join(EXTENSIONS)}"))
  else:
    return True
  return False


def _flat_labels(place: str, items: list[_Item], labels_path: str) -> Iterable[str]:
  """The class name of each image."""
  is_imagenet = len(items) == 50_000 and all(
    re.fullmatch(r"ILSVRC2012_val_\d{8}\.JPEG", item.file_name) for item in items
  )
  if labels_path:
    title = f"--val_labels={labels_path!r}"
  elif is_imagenet:
    import tensorflow_datasets as tfds  # brings the list

    title = "ImageNet's validation labels"
    labels_path = os.fspath(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt"))
  else:
    raise UserError(
      f"{place} has its images in no folders of classes: name a file with the class name of each, a"
      " line for an image in order of file name, by --val_labels"
    )
  try:
    with open(labels_path, encoding="utf-8") as stream:
      names = [line.strip() for line in stream.read().strip().splitlines()]
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{title} cannot be read: {getattr(error, 'strerror', error)}") from error
  if len(names) != len(items):
    raise UserError(
      f"{title} has {len(names)} names, must have one for each of {len(items)} images"
    )
  return names
