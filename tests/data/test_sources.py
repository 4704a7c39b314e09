import zlib

import jaxtyping
import numpy as np
import pytest
from sklearn.datasets import load_digits

from dimo_jax.data.sources import ArraySource, load_source
from dimo_jax.types import UserError


def write(path, **changes):
  """A small valid file of arrays with some of them replaced, or dropped where None."""
  rng = np.random.default_rng(0)
  arrays = {
    "images_train": rng.integers(256, size=(6, 3, 2, 1), dtype=np.uint8),
    "labels_train": np.array([0, 1, 2, 0, 1, 2]),
    "images_test": rng.integers(256, size=(2, 3, 2, 1), dtype=np.uint8),
    "labels_test": np.array([1, 0], np.uint8),
  }
  arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
  np.savez(path, **arrays)
  return arrays


def all_images(source):
  return np.stack([source[i]["image"] for i in range(len(source))])


def test_digits_are_the_published_pixels():
  published = load_digits()
  wanted = (published.images / 8 - 1).astype(np.float32)[..., None]
  rows = {image.tobytes(): row for row, image in enumerate(wanted)}
  seen = []
  for split, count in [("train", 1437), ("test", 360)]:
    source = load_source("digits", split)
    assert len(source) == len(source.labels) == count
    assert (source.num_classes, source.image_shape, source.num_levels) == (10, (8, 8, 1), 17)
    for i, label in enumerate(source.labels):
      row = rows[source[i]["image"].tobytes()]
      assert published.target[row] == label == source[i]["class_id"]
      seen.append(row)
  assert sorted(seen) == list(range(1797))  # each image in exactly one split


def test_digits_split_is_fixed_and_stratified():
  train, test = load_source("digits", "train"), load_source("digits", "test")
  # The split every published figure of this project refers to.
  assert zlib.crc32(all_images(test).tobytes()) == 1112073485
  share = np.bincount(test.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
  assert np.abs(share - 0.2).max() < 0.005


@pytest.mark.parametrize("name", ["digits", "arrays"])
def test_elements_keep_the_protocol(name, tmp_path):
  path = None
  if name == "arrays":
    path = str(tmp_path / "a.npz")
    write(path)
  source = load_source(name, "train", path)
  element = source[np.int64(3)]
  assert set(element) == {"image", "class_id"}
  assert element["image"].dtype == np.float32
  assert element["image"].shape == source.image_shape
  assert element["class_id"].dtype == np.int32
  assert element["class_id"].shape == ()
  assert source.labels.dtype == np.int32


def test_arrays_scale_and_split(tmp_path):
  path = str(tmp_path / "a.npz")
  arrays = write(path)
  for split in ("train", "test"):
    source = load_source("arrays", split, path)
    wanted = arrays[f"images_{split}"] / 127.5 - 1
    assert np.abs(all_images(source) - wanted).max() < 1e-6
    assert source.labels.tolist() == arrays[f"labels_{split}"].tolist()
    assert (source.num_classes, source.num_levels) == (3, 256)


def test_levels_reach_both_ends():
  levels = np.array([0, 255], np.uint8).reshape(1, 2, 1, 1)
  image = ArraySource(levels, np.zeros(1, np.int32), num_classes=1, num_levels=256)[0]["image"]
  assert image.ravel().tolist() == [-1, 1]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"labels_train": None}, "no array named 'labels_train'"),
    ({"images_train": np.zeros((6, 3, 2, 1))}, "images_train is float64 [6, 3, 2, 1], must be"),
    ({"images_train": np.zeros((6, 3, 2), np.uint8)}, "images_train is uint8 [6, 3, 2], must be"),
    ({"images_train": np.zeros((0, 3, 2, 1), np.uint8)}, "and not empty"),
    ({"labels_train": np.zeros(6)}, "labels_train is float64 [6], must be integer [6]"),
    ({"labels_train": np.zeros(5, int)}, "labels_train is int64 [5], must be integer [6]"),
    ({"labels_train": np.array([0, 1, -1, 0, 1, 2])}, "labels_train spans -1 to 2, must lie in"),
    ({"images_train": np.array([None])}, "is no .npz file of plain arrays"),
  ],
)
def test_bad_arrays_are_one_line(changes, message, tmp_path):
  path = tmp_path / "a.npz"
  write(path, **changes)
  with pytest.raises(UserError) as error:
    load_source("arrays", "train", str(path))
  assert message in str(error.value)
  assert str(path) in str(error.value)
  assert "\n" not in str(error.value)


def test_test_labels_beyond_the_training_classes(tmp_path):
  path = tmp_path / "a.npz"
  write(path, labels_test=np.array([1, 3]))
  with pytest.raises(UserError, match="labels_test spans 1 to 3, must lie in 0 to 2"):
    load_source("arrays", "test", str(path))


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 cut short"])
def test_other_files_are_one_line(content, tmp_path):
  path = tmp_path / "a.npz"
  path.write_bytes(content)
  with pytest.raises(UserError, match=r"a\.npz' is no \.npz file of plain arrays") as error:
    load_source("arrays", "train", str(path))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("digit", "train"), "data.name='digit' is unknown; did you mean 'digits'?"),
    (("digits", "val"), "split='val' is unknown; known: train, test"),
    (("digits", "train", "x.npz"), "data.path='x.npz' has no use with data.name='digits'"),
    (("arrays", "train"), "data.name='arrays' needs data.path"),
    (("arrays", "train", "/no/such.npz"), "data.path='/no/such.npz' cannot be read: No such file"),
  ],
)
def test_bad_arguments_are_one_line(arguments, message):
  with pytest.raises(UserError) as error:
    load_source(*arguments)
  assert str(error.value).startswith(message)


def test_shapes_are_checked_in_tests():
  with pytest.raises(jaxtyping.TypeCheckError):
    ArraySource(np.zeros((2, 8, 8), np.uint8), np.zeros(2, np.int32), 1, 256)
