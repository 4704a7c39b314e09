"""Data sets made by `python -m dimo_jax.data.prepare`."""

import io
import json
import os
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int32

from dimo_jax.data.images import check_shape, decode_image, sample
from dimo_jax.types import UserError

__all__ = ["MANIFEST", "UNFINISHED", "PreparedSource", "labels_file", "load_prepared"]

MANIFEST = "prepared.json"  # written last: a folder that has it is whole
UNFINISHED = "unfinished"  # a folder within one that is not


def labels_file(split: str) -> str:
  """The file of a split's class ids, int32 [n]."""
  return f"{split}.labels.npy"


@dataclass(frozen=True, eq=False)
class PreparedSource:
  """Images of one size, decoded when they are asked for; the labels are in memory.

  Attributes:
    records: random access to {"image": encoded bytes, "label": integer, ...}.
    name: what an error calls the split.
  """

  records: Any
  labels: Int32[np.ndarray, " n"]
  name: str
  num_classes: int
  image_shape: tuple[int, int, int]
  num_levels: int = 256

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: SupportsIndex, /) -> dict[str, np.ndarray]:
    record, name = self.records[index], f"{self.name}, record {index.__index__()}"
    levels = decode_image(io.BytesIO(record["image"]), name, image_size=0)
    check_shape(levels, self.image_shape, name)
    return sample(levels, self.labels[index], self.num_levels)


def load_prepared(split: str, path: str | None, image_size: int = 0) -> PreparedSource:
  """A split of the folder `path`; "test" is the validation images.

  Raises:
    UserError: no such folder, not whole, or images of another side than `image_size`, unless 0.
  """
  folder, field = path or "", f"data.path={path or ''!r}"
  own_split = "train" if split == "train" else "validation"
  if path and os.path.isdir(os.path.join(path, UNFINISHED)):
    raise UserError(f"{field} is not finished: run the command that prepares it again")
  if not os.path.exists(os.path.join(folder, MANIFEST)):
    raise UserError(
      f"{field} must be a folder that python -m dimo_jax.data.prepare made, with"
      " data.name='prepared'; the command takes --source, --size and --out"
    )
  try:
    with open(os.path.join(folder, MANIFEST), encoding="utf-8") as stream:
      manifest = json.load(stream)
    labels = np.load(os.path.join(folder, labels_file(own_split)), allow_pickle=False)
  except (OSError, ValueError) as error:
    raise UserError(f"{field} is not whole, {error}: copy it again or prepare anew") from error
  if image_size not in (0, manifest["size"]):
    raise UserError(
      f"data.image_size={image_size} must be {manifest['size']}, as the images of {field} are; or 0"
    )
  # Imported here because it takes most of a second and other sources do without.
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(folder)
  except Exception as error:  # of many kinds, most of several lines
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{field} is not whole, {reason}: copy it again or prepare anew") from error
  for file in builder.info.splits[own_split].filepaths:
    if not file.exists():
      raise UserError(f"{field} is not whole, {file} is missing: copy it again or prepare anew")
  records = builder.as_data_source(own_split, decoders={"image": tfds.decode.SkipDecoding()})
  if not len(records) == len(labels) == manifest["splits"][own_split]:
    raise UserError(
      f"{field} is not whole: {len(records)} records and {len(labels)} labels of {own_split!r},"
      f" must be {manifest['splits'][own_split]} each; copy it again or prepare anew"
    )
  return PreparedSource(
    records=records,
    labels=labels,
    name=f"{field}, split {own_split!r}",
    num_classes=manifest["num_classes"],
    image_shape=(manifest["size"], manifest["size"], 3),
  )
