"""Prepared image data sets of TensorFlow Datasets, read without TensorFlow."""

import functools
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int32

from dimo_jax.data.images import check_shape, decode_image, sample
from dimo_jax.data.listing import is_imagenet
from dimo_jax.types import UserError

__all__ = ["TfdsSource", "load_tfds"]

LABELS_AT_ONCE = 1024  # records read together where only their labels are wanted


@dataclass(frozen=True, eq=False)
class TfdsSource:
  """A split, its images decoded when they are asked for.

  Pillow decodes: tfds takes OpenCV where it is installed, whose JPEGs differ in the last bits.

  Attributes:
    records: random access to {"image": encoded bytes, "label": integer, ...}.
    name: what an error calls the split.
    class_ids: of the labels of the records.
    image_size: as in `decode_image`.
  """

  records: Any
  name: str
  num_classes: int
  class_ids: Int32[np.ndarray, " num_labels"]
  image_shape: tuple[int, int, int]
  image_size: int
  num_levels: int = 256

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: SupportsIndex, /) -> dict[str, np.ndarray]:
    record, name = self.records[index], f"{self.name}, record {index.__index__()}"
    levels = decode_image(
      io.BytesIO(record["image"]),
      name,
      image_size=self.image_size,
      channels=self.image_shape[2],
    )
    check_shape(levels, self.image_shape, name)
    return sample(levels, self._labels([record])[0], self.num_levels)

  @functools.cached_property
  def labels(self) -> Int32[np.ndarray, " n"]:
    """Reads every record, once, and decodes no image."""
    rows = range(len(self))
    chunks = (rows[start : start + LABELS_AT_ONCE] for start in rows[::LABELS_AT_ONCE])
    return np.concatenate([self._labels(self.records.__getitems__(list(c))) for c in chunks])

  def _labels(self, records: Sequence[Any]) -> Int32[np.ndarray, " n"]:
    labels = np.array([record["label"] for record in records], np.int32)
    wrong = labels[(labels < 0) | (labels >= self.num_classes)]
    if wrong.size:
      raise UserError(
        f"{self.name} has the label {wrong[0]}, must lie in 0 to {self.num_classes - 1}"
      )
    return self.class_ids[labels]


def load_tfds(split: str, path: str | None, image_size: int, tfds_name: str) -> TfdsSource:
  """A split of a data set with features "image" and "label", prepared beforehand.

  The split "test" is "validation" where there is one (ImageNet's own "test" has no labels).
  ImageNet's classes are numbered in order of their synsets' names, as published teachers have them;
  imagenet_resized has them in another order.

  Args:
    path: tfds's data_dir; None is its default, TFDS_DATA_DIR or ~/tensorflow_datasets.
  """
  # Namespaces ("huggingface:mnist") would reach for the network.
  if not re.fullmatch(r"\w+(/[^:]+)?(:\d[\w.]*)?", tfds_name):
    raise UserError(
      f"data.tfds_name={tfds_name!r} must be name, name/config or either with :version, such as"
      " 'imagenet_resized/64x64', with data.name='tfds'"
    )
  # Imported here because it takes most of a second and other sources do without.
  import tensorflow_datasets as tfds

  field = f"data.tfds_name={tfds_name!r}"
  try:
    builder = tfds.builder(tfds_name, data_dir=path)
  except Exception as error:  # of many kinds, most of several lines
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f"{field} is nothing that tfds knows or data.path={path or ''!r} holds: {reason}"
    ) from error
  info, data_dir = builder.info, os.fspath(builder.data_dir)
  if not info.splits:
    where = f"data_dir={path!r}, " if path else ""
    raise UserError(
      f"{field} is not prepared in {data_dir}; where TensorFlow is installed, run:"
      f' python -c "import tensorflow_datasets as tfds; tfds.builder({tfds_name!r}, {where}'
      "file_format='array_record').download_and_prepare()\""
    )
  test = "validation" if "validation" in info.splits else "test"
  for name, wanted in (("train", "'train'"), (test, "'validation' or 'test'")):
    if name not in info.splits:
      raise UserError(f"{field} must have a split {wanted}, has {', '.join(sorted(info.splits))}")
  features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
  if (
    not {"image", "label"} <= {*features}
    or not isinstance(features["image"], tfds.features.Image)
    or not isinstance(features["label"], tfds.features.ClassLabel)
    or features["image"].np_dtype != np.uint8
    or features["image"].shape[2] not in (1, 3)
  ):
    raise UserError(
      f"{field} must have the features 'image' (uint8, 1 or 3 channels) and 'label' (a class), has"
      f" {', '.join(sorted(features))}"
    )
  h, w, channels = features["image"].shape
  if image_size:
    h = w = image_size
  elif h is None or w is None:
    raise UserError(
      f"data.image_size=0 needs images of one size, and {field} has many: set it to the pixels a"
      " side that they are to have"
    )
  own_split = "train" if split == "train" else test
  class_ids = np.arange(features["label"].num_classes, dtype=np.int32)
  if is_imagenet(sorted(features["label"].names)):
    class_ids[np.argsort(features["label"].names)] = class_ids.copy()
  try:
    records = builder.as_data_source(own_split, decoders={"image": tfds.decode.SkipDecoding()})
  except NotImplementedError as error:
    raise UserError(
      f"{field} lies in {data_dir} in a format without random access; where TensorFlow is"
      f" installed, run: tfds convert_format --dataset_version_dir={data_dir}"
      " --out_file_format=array_record"
    ) from error
  for file in info.splits[own_split].filepaths:
    if not file.exists():
      raise UserError(f"{field} is not whole, {file} is missing: copy or prepare it again")
  return TfdsSource(
    records=records,
    name=f"{field}, split {own_split!r}",
    num_classes=features["label"].num_classes,
    class_ids=class_ids,
    image_shape=(h, w, channels),
    image_size=image_size,
  )
