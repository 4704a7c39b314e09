"""One shard of a prepared data set: encoded images in, an array_record file out."""

import collections
import dataclasses
import functools
import io
import os
import warnings
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from dimo_jax.data.images import decode_image
from dimo_jax.data.listing import Entry
from dimo_jax.types import UserError

__all__ = ["Shard", "make_features", "write_shard"]

_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright


@dataclasses.dataclass(frozen=True)
class Shard:
  """What a worker is to write.

  Attributes:
    path: of the finished file.
    size: pixels a side of its images.
    num_classes: of the data set.
  """

  path: str
  entries: list[Entry]
  size: int
  num_classes: int


def make_features(size: int, classes: list[str] | int) -> Any:
  """The tfds features of a record; of `classes` their names, or their number."""
  import tensorflow_datasets as tfds  # takes most of a second

  named = {"num_classes": classes} if isinstance(classes, int) else {"names": classes}
  return tfds.features.FeaturesDict(
    {
      "file_name": tfds.features.Text(),
      "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
      "label": tfds.features.ClassLabel(**named),
    }
  )


_features = functools.lru_cache(make_features)


def write_shard(shard: Shard) -> dict[str, Any]:
  """Decodes, scales, crops and writes the images of a shard; the file is whole or not there.

  Its bytes depend on the images alone.

  Returns:
    {"labels": of the records, "num_bytes": of the file, "corrupt": [name, reason] of the images
    left out, "counts": of the others by kind}, ready for JSON.

  Raises:
    UserError: the source cannot be read.
  """
  features = _features(shard.size, shard.num_classes)
  labels, corrupt, counts = [], [], collections.Counter[str]()
  temporary = f"{shard.path}.{os.getpid()}.tmp"
  # PNGs do not compress further, and a group of one is what random access wants.
  writer = ArrayRecordWriter(temporary, "group_size:1,uncompressed")
  for entry in shard.entries:
    try:
      png, kinds = _convert(_read(entry), shard.size)
    except _CorruptError as error:
      corrupt.append([entry.name, str(error)])
      continue
    record = {"file_name": entry.name, "image": png, "label": entry.label}
    writer.write(_deterministic(features.serialize_example(record)))
    labels.append(entry.label)
    counts.update(kinds)
  writer.close()
  with open(temporary, "rb") as stream:
    os.fsync(stream.fileno())
  os.replace(temporary, shard.path)
  num_bytes = os.path.getsize(shard.path)
  return {"labels": labels, "num_bytes": num_bytes, "corrupt": corrupt, "counts": dict(counts)}


class _CorruptError(Exception):
  """An image that cannot be used, and why."""


def _read(entry: Entry) -> bytes:
  try:
    with open(entry.path, "rb") as stream:
      stream.seek(entry.offset)
      return stream.read(entry.num_bytes)
  except PermissionError as error:
    raise _CorruptError("may not be read") from error
  except OSError as error:  # of the disk or the network: the image may be fine
    raise UserError(
      f"{entry.path} cannot be read: {error.strerror}; mend it and run the same command again"
    ) from error


def _convert(data: bytes, size: int) -> tuple[io.BytesIO, list[str]]:
  """An encoded image as a PNG of size x size pixels, and what kinds of image it was."""
  if not data:
    raise _CorruptError("is empty")
  try:
    with warnings.catch_warnings(action="ignore"):  # of odd metadata, for every such file
      levels = decode_image(io.BytesIO(data), "it", image_size=size)
      kinds = _kinds(data, size)
  except UserError as error:
    raise _CorruptError(str(error).removeprefix("it ")) from error
  except MemoryError:
    raise
  except Exception as error:  # decoders raise whatever a damaged file leads them into
    raise _CorruptError(f"{type(error).__name__}: {error}") from error
  png = io.BytesIO()
  Image.fromarray(levels).save(png, "PNG", compress_level=1)  # 6: 7 % smaller, 2.5 times slower
  png.seek(0)
  return png, kinds


def _kinds(data: bytes, size: int) -> list[str]:
  with Image.open(io.BytesIO(data)) as image:
    kinds = [f"format {image.format}", f"mode {image.mode}"]
    if min(image.size) < size:
      kinds.append("enlarged")
    if "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1:
      kinds.append("EXIF rotation ignored")
  return kinds


def _deterministic(serialized: bytes) -> bytes:
  """The same tf.train.Example with its fields in a fixed order; protobuf's own is random."""
  from tensorflow_datasets.proto import tf_example_pb2

  return tf_example_pb2.Example.FromString(serialized).SerializeToString(deterministic=True)
