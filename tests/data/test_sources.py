import dataclasses
import io
import os
import shlex
import shutil
import subprocess
import sys
import zlib

import jaxtyping
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits

from dimo_jax.data.pipeline import image_batches
from dimo_jax.data.preparation import prepare
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


@pytest.mark.parametrize("name", ["digits", "arrays", "prepared", "folder", "tfds", "noise"])
def test_elements_keep_the_protocol(name, tmp_path):
  fields = {}
  if name == "arrays":
    fields["path"] = str(tmp_path / "a.npz")
    write(fields["path"])
  elif name == "prepared":
    fields["path"] = str(tmp_path / "prepared")
    write_folder(tmp_path / "folder")
    prepare(str(tmp_path / "folder"), fields["path"], 4, num_workers=1)
  elif name == "folder":
    fields["path"] = str(tmp_path)
    write_folder(tmp_path)
  elif name == "tfds":
    fields |= {"path": str(tmp_path), "tfds_name": "tiny"}
    write_tfds(tmp_path)
  elif name == "noise":
    fields |= {"image_size": 4, "num_classes": 7}
  source = load_source(name, "train", **fields)
  element = source[np.int64(3)]
  assert set(element) == {"image", "class_id"}
  assert element["image"].dtype == np.float32
  assert element["image"].shape == source.image_shape
  assert element["class_id"].dtype == np.int32
  assert element["class_id"].shape == ()
  assert element["class_id"] == source.labels[3]
  assert source.labels.dtype == np.int32
  assert source.labels.shape == (len(source),)


def test_arrays_scale_and_split(tmp_path):
  path = str(tmp_path / "a.npz")
  arrays = write(path)
  for split in ("train", "test"):
    source = load_source("arrays", split, path)
    wanted = arrays[f"images_{split}"] / 127.5 - 1
    assert np.abs(all_images(source) - wanted).max() < 1e-6
    assert source.labels.tolist() == arrays[f"labels_{split}"].tolist()
    assert (source.num_classes, source.num_levels) == (3, 256)


def test_noise_is_uniform_and_a_function_of_split_and_index():
  sources = {
    split: load_source("noise", split, image_size=8, num_classes=7) for split in ("train", "test")
  }
  images = {split: np.stack([s[i]["image"] for i in range(64)]) for split, s in sources.items()}
  again = load_source("noise", "train", image_size=8, num_classes=7)
  np.testing.assert_array_equal(again[63]["image"], images["train"][63])
  everything = np.concatenate([*images.values()]).reshape(128, -1)
  assert len(np.unique(everything, axis=0)) == 128
  levels = np.round((everything + 1) * 127.5).astype(int)
  assert stats.chisquare(np.bincount(levels.ravel(), minlength=256)).pvalue > 1e-3
  assert sources["train"].image_shape == (8, 8, 3)
  assert np.bincount(sources["train"].labels).min() > 7000


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_classes": 7}, "data.image_size=0 must be positive with data.name='noise'"),
    ({"image_size": 8, "num_classes": 0}, "data.num_classes=0 must be positive"),
    ({"image_size": 8, "num_classes": 7, "path": "x"}, "data.path='x' has no use with"),
  ],
)
def test_noise_needs_a_size_and_classes(fields, message):
  with pytest.raises(UserError) as error:
    load_source("noise", "train", **fields)
  assert str(error.value).startswith(message)


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
    (("folder", "train"), "data.path='' must be the folder that holds train and val or test"),
    (("folder", "train", "/no/such"), "data.path='/no/such' must be the folder that holds train"),
    (("prepared", "train"), "data.path='' must be a folder that python -m dimo_jax.data.prepare"),
    (("tfds", "train"), "data.tfds_name='' must be name, name/config or either with :version"),
  ],
)
def test_bad_arguments_are_one_line(arguments, message):
  with pytest.raises(UserError) as error:
    load_source(*arguments)
  assert str(error.value).startswith(message)


def test_shapes_are_checked_in_tests():
  with pytest.raises(jaxtyping.TypeCheckError):
    ArraySource(np.zeros((2, 8, 8), np.uint8), np.zeros(2, np.int32), 1, 256)


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    (
      "digits",
      {"image_size": 8},
      "data.image_size=8 has no use with data.name='digits'; leave it 0",
    ),
    ("arrays", {"tfds_name": "mnist"}, "data.tfds_name='mnist' has no use with data.name='arrays'"),
    ("folder", {"tfds_name": "mnist"}, "data.tfds_name='mnist' has no use with data.name='folder'"),
    ("folder", {"image_size": -1}, "data.image_size=-1 must be positive, or 0 for images of one"),
    ("tfds", {"tfds_name": "huggingface:mnist"}, "data.tfds_name='huggingface:mnist' must be name"),
  ],
)
def test_fields_that_do_not_fit_are_one_line(name, fields, message):
  with pytest.raises(UserError) as error:
    load_source(name, "train", "" if name == "digits" else "x", **fields)
  assert str(error.value).startswith(message)


def noise(seed, h=4, w=5, c=3):
  return np.random.default_rng(seed).integers(256, size=(h, w, c), dtype=np.uint8)


def save(path, levels):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(levels).save(path)


def write_folder(root, test="val"):
  """Two training images of each of the classes "b" and "a", one of each for the test split."""
  for seed, name in enumerate(["train/b/2", "train/b/10", "train/a/y", "train/a/x"]):
    save(root / f"{name}.png", noise(seed))
  for seed, name in enumerate(["a/0", "b/0"], 4):
    save(root / test / f"{name}.png", noise(seed))


def levels_of(element):
  return np.round((element["image"] + 1) * 127.5).astype(int)


@pytest.mark.parametrize("test", ["val", "test"])
def test_folder_is_sorted_by_class_and_name(test, tmp_path):
  write_folder(tmp_path, test)
  for name in ("train/.hidden/x.png", "train/a/.x.png", "train/a/notes.txt", "train/readme.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("no image")
  for split, seeds, labels in [("train", [3, 2, 1, 0], [0, 0, 1, 1]), ("test", [4, 5], [0, 1])]:
    source = load_source("folder", split, str(tmp_path))
    assert (source.num_classes, source.image_shape, source.num_levels) == (2, (4, 5, 3), 256)
    assert source.labels.tolist() == labels
    for _ in range(2):  # in any order, as often as one likes
      for i in reversed(range(len(seeds))):
        assert np.array_equal(levels_of(source[i]), noise(seeds[i]))
        assert np.abs(source[i]["image"] - (noise(seeds[i]) / 127.5 - 1)).max() < 1e-6


def test_val_goes_before_test(tmp_path):
  """ImageNet has both, and its test images have no classes."""
  write_folder(tmp_path, "val")
  save(tmp_path / "test/0.png", noise(9))
  assert len(load_source("folder", "test", str(tmp_path))) == 2


def test_folder_converts_every_kind_of_image_to_rgb(tmp_path):
  write_folder(tmp_path)
  folder = tmp_path / "train" / "a"
  shutil.rmtree(folder)
  grey, alpha, plain = noise(0, c=1)[:, :, 0], noise(1, c=4), Image.fromarray(noise(2))
  save(folder / "0.png", grey)
  save(folder / "1.png", alpha)
  plain.save(folder / "2.webp", lossless=True)
  plain.save(folder / "3.JPEG", quality=90)
  plain.save(folder / "4.JpG", quality=90)
  plain.convert("CMYK").save(folder / "5.jpeg", quality=100)
  source = load_source("folder", "train", str(tmp_path))
  images = [levels_of(source[i]) for i in range(6)]
  assert np.array_equal(images[0], np.repeat(grey[:, :, None], 3, 2))
  assert np.array_equal(images[1], alpha[:, :, :3])
  assert np.array_equal(images[2], noise(2))
  assert np.array_equal(images[3], np.asarray(Image.open(folder / "3.JPEG")))
  assert np.array_equal(images[3], images[4])
  assert images[5].shape == (4, 5, 3)


def cropped(levels, size, tmp_path):
  write_folder(tmp_path)
  save(tmp_path / "train/a/0.png", levels)
  source = load_source("folder", "train", str(tmp_path), image_size=size)
  assert source.image_shape == (size, size, 3)
  return levels_of(source[0])


def test_an_image_of_the_right_size_is_left_alone(tmp_path):
  assert np.array_equal(cropped(noise(0, 4, 4), 4, tmp_path), noise(0, 4, 4))


def test_the_centre_is_what_remains(tmp_path):
  wide, high = noise(0, 4, 7), noise(1, 9, 4)
  assert np.array_equal(cropped(wide, 4, tmp_path), wide[:, 1:5])  # 3 to cut: 1 left, 2 right
  assert np.array_equal(cropped(high, 4, tmp_path), high[2:6])


def test_twice_the_size_is_the_mean_of_squares(tmp_path):
  """Rounded once along each axis."""
  means = noise(0, 8, 8).reshape(4, 2, 4, 2, 3).mean((1, 3))
  assert np.abs(cropped(noise(0, 8, 8), 4, tmp_path) - means).max() <= 1


def test_scaling_halves_then_filters_then_crops(tmp_path):
  """19x37: halved by box filter twice, to 9x18 and 4x9, then nothing is left to scale."""
  levels = noise(0, 19, 37)
  image = Image.fromarray(levels).resize((18, 9), Image.Resampling.BOX)
  image = image.resize((9, 4), Image.Resampling.BOX)
  assert np.array_equal(cropped(levels, 4, tmp_path), np.asarray(image)[:, 2:6])
  levels = noise(1, 7, 10)  # not halved; 10 * 4 / 7 = 5.7
  image = Image.fromarray(levels).resize((6, 4), Image.Resampling.BICUBIC)
  assert np.array_equal(cropped(levels, 4, tmp_path), np.asarray(image)[:, 1:5])
  assert cropped(noise(2, 2, 3), 4, tmp_path).shape == (4, 4, 3)  # enlarged


def remove(name):
  return lambda root: shutil.rmtree(root / name)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (remove("train"), "data.path='{}' must have a folder 'train'"),
    (remove("val"), "data.path='{}' must have a folder 'val' or 'test'"),
    (lambda root: [remove(f"train/{c}")(root) for c in "ab"], "{}/train has no folders, must have"),
    (remove("train/a"), "data.path='{}' must have one set of classes: only {}/val has a"),
    (remove("val/b"), "data.path='{}' must have one set of classes: only {}/train has b"),
    (
      lambda root: (root / "val/b").rename(root / "val/c"),
      "data.path='{}' must have one set of classes: only {}/train has b; only {}/val has c",
    ),
    (
      lambda root: [path.unlink() for path in (root / "train/b").iterdir()],
      "{}/train/b has no images, must have some of .png, .jpg, .jpeg, .webp",
    ),
    (
      lambda root: (root / "train/a/x.png").write_text("no image"),
      "{}/train/a/x.png cannot be read as an image: cannot identify image file",
    ),
    (
      lambda root: Image.new("RGB", (5, 7)).save(root / "train/b/x.png"),
      "{}/train/b/x.png has 5x7 pixels, not ",
    ),
  ],
)
def test_bad_folders_are_one_line(change, message, tmp_path):
  write_folder(tmp_path)
  change(tmp_path)
  with pytest.raises(UserError) as error:
    load_source("folder", "train", str(tmp_path))
  assert str(error.value).startswith(message.replace("{}", str(tmp_path)))
  assert "\n" not in str(error.value)


def damage(path, kind):
  if kind == "text":
    path.write_text("no image")
  elif kind == "empty":
    path.write_bytes(b"")
  elif kind == "cut":
    path.write_bytes(path.read_bytes()[:-40])
  elif kind == "flipped":
    data = bytearray(path.read_bytes())
    data[40:60] = bytes(20)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "flipped"])
def test_a_damaged_image_is_named_when_it_is_read(kind, tmp_path):
  write_folder(tmp_path)
  path = tmp_path / "train/b/10.png"
  damage(path, kind)
  source = load_source("folder", "train", str(tmp_path))
  source[0]
  with pytest.raises(UserError) as error:
    source[2]
  assert str(error.value).startswith(f"{path} cannot be read as an image: ")
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match=r"b/10\.png cannot be read"):  # and through grain's thread
    list(image_batches(source, batch_size=4, seed=0, start_step=0, num_steps=1))


def test_images_of_several_sizes_need_image_size(tmp_path):
  write_folder(tmp_path)
  save(tmp_path / "val/b/0.png", noise(0, 5, 5))
  with pytest.raises(
    UserError, match=r"val/b/0\.png has 5x5 pixels, not 5x4 .* data\.image_size=0"
  ):
    load_source("folder", "test", str(tmp_path))
  source = load_source("folder", "test", str(tmp_path), image_size=4)
  assert all_images(source).shape == (2, 4, 4, 3)


def png(levels):
  stream = io.BytesIO()
  Image.fromarray(levels).save(stream, "PNG")
  stream.seek(0)
  return stream


def write_tfds(root, name="tiny/1.0.0", splits=("train", "validation"), h=4, w=5, shape=None):
  """A data set as tfds prepares it, written by tfds: five records a split, of classes 2 1 0 2 1.

  tfds needs TensorFlow to run a builder or to encode pixels; its writers of records and metadata do
  without, given encoded images.
  """
  import tensorflow_datasets as tfds
  from array_record.python.array_record_module import ArrayRecordWriter

  folder = root / name
  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict(
    {
      "file_name": tfds.features.Text(),
      "image": tfds.features.Image(shape=shape or (h, w, 3)),
      "label": tfds.features.ClassLabel(num_classes=3),
    }
  )
  infos, dataset = [], name.split("/")[0]
  for number, split in enumerate(splits):
    for shard, rows in enumerate([range(3), range(3, 5)]):
      path = folder / f"{dataset}-{split}.array_record-{shard:05d}-of-00002"
      writer = ArrayRecordWriter(str(path), "group_size:1")
      for row in rows:
        image = noise(10 * number + row, h, w)
        record = {"file_name": f"{row}.png", "image": png(image), "label": (2 - row) % 3}
        writer.write(features.serialize_example(record))
      writer.close()
    template = tfds.core.ShardedFileTemplate(
      dataset_name=dataset, data_dir=str(folder), split=split, filetype_suffix="array_record"
    )
    infos.append(
      tfds.core.SplitInfo(name=split, shard_lengths=[3, 2], num_bytes=1, filename_template=template)
    )
  tfds.folder_dataset.write_metadata(
    data_dir=str(folder), features=features, split_infos=infos, check_data=False
  )
  return folder


@pytest.mark.parametrize("other", ["validation", "test"])
def test_tfds_reads_what_was_prepared(other, tmp_path):
  write_tfds(tmp_path, splits=("train", other))
  for number, split in enumerate(["train", "test"]):
    source = load_source("tfds", split, str(tmp_path), tfds_name="tiny")
    assert (source.num_classes, source.image_shape, source.num_levels) == (3, (4, 5, 3), 256)
    assert source.labels.tolist() == [2, 1, 0, 2, 1]
    for i in reversed(range(5)):
      assert np.array_equal(levels_of(source[i]), noise(10 * number + i))
      assert source[i]["class_id"] == source.labels[i]


def test_tfds_reads_a_data_set_that_tfds_has_code_for(tmp_path):
  write_tfds(tmp_path, "imagenet_resized/64x64/0.1.0", h=64, w=64)
  source = load_source("tfds", "test", str(tmp_path), tfds_name="imagenet_resized/64x64")
  assert (source.num_classes, source.image_shape, len(source)) == (1000, (64, 64, 3), 5)
  assert np.array_equal(levels_of(source[3]), noise(13, 64, 64))
  # Its labels 0, 1, 2 are kit fox, English setter and Siberian husky of published classifiers.
  assert source.labels.tolist() == [250, 212, 278, 250, 212]
  assert source[3]["class_id"] == 250
  small = load_source(
    "tfds", "test", str(tmp_path), tfds_name="imagenet_resized/64x64", image_size=32
  )
  means = noise(13, 64, 64).reshape(32, 2, 32, 2, 3).mean((1, 3))
  assert np.abs(levels_of(small[3]) - means).max() <= 1


def test_tfds_reads_its_default_folder_without_tensorflow(tmp_path):
  write_tfds(tmp_path)
  code = (
    "import sys; from dimo_jax.data.sources import load_source;"
    " source = load_source('tfds', 'train', '', tfds_name='tiny');"
    " print(source[0]['class_id'], source.labels.tolist(), 'tensorflow' in sys.modules)"
  )
  result = subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"TFDS_DATA_DIR": str(tmp_path)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.stdout == "2 [2, 1, 0, 2, 1] False\n", result.stderr


def test_tfds_validation_goes_before_test(tmp_path):
  """ImageNet's test images have no labels."""
  write_tfds(tmp_path, splits=("test", "train", "validation"))
  source = load_source("tfds", "test", str(tmp_path), tfds_name="tiny")
  assert np.array_equal(levels_of(source[0]), noise(20))


class Counted:
  """Records over and over, which must be read many at a time, and not too many."""

  def __init__(self, records, length):
    self.records, self.length, self.reads = records, length, 0

  def __len__(self):
    return self.length

  def __getitems__(self, rows):
    assert len(rows) <= 1024
    self.reads += len(rows)
    records = self.records.__getitems__([row % 5 for row in rows])
    return [{"image": b"no image", "label": record["label"]} for record in records]


def test_tfds_labels_are_read_once_and_without_the_images(tmp_path):
  write_tfds(tmp_path)
  source = load_source("tfds", "train", str(tmp_path), tfds_name="tiny")
  records = Counted(source.records, 2500)
  many = dataclasses.replace(source, records=records)
  for _ in range(2):
    assert many.labels.tolist() == [2, 1, 0, 2, 1] * 500
  assert records.reads == 2500
  with pytest.raises(UserError, match=r"has the label 2, must lie in 0 to 1"):
    _ = dataclasses.replace(source, num_classes=2).labels


def test_tfds_crops_as_folders_do(tmp_path):
  write_tfds(tmp_path, h=9, w=8, shape=(None, None, 3))
  source = load_source("tfds", "train", str(tmp_path), image_size=3, tfds_name="tiny")
  assert source.image_shape == (3, 3, 3)
  assert np.array_equal(levels_of(source[1]), cropped(noise(1, 9, 8), 3, tmp_path / "folder"))
  with pytest.raises(
    UserError, match=r"data\.image_size=0 needs images of one size, and data\.tfds"
  ):
    load_source("tfds", "train", str(tmp_path), tfds_name="tiny")


def test_tfds_keeps_grey_images_grey(tmp_path):
  write_tfds(tmp_path, shape=(4, 5, 1))
  source = load_source("tfds", "train", str(tmp_path), tfds_name="tiny")
  grey = np.asarray(Image.fromarray(noise(3)).convert("L"))
  assert np.array_equal(levels_of(source[3])[:, :, 0], grey)


@pytest.mark.parametrize("name", ["imagenet_resized/64x64", "imagenet2012"])
def test_missing_tfds_data_say_what_to_run(name, tmp_path):
  with pytest.raises(UserError) as error:
    load_source("tfds", "train", str(tmp_path / "tf"), image_size=64, tfds_name=name)
  message = str(error.value)
  assert message.startswith(f"data.tfds_name='{name}' is not prepared in {tmp_path}/tf/{name}/")
  command = message.partition(" run: ")[2]
  assert shlex.split(command) == [
    "python",
    "-c",
    f"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='{tmp_path}/tf',"
    " file_format='array_record').download_and_prepare()",
  ]
  assert "\n" not in message
  assert not list(tmp_path.iterdir())  # nothing was made


def rewrite(name, old, new):
  return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda folder: (folder / "tiny-train.array_record-00001-of-00002").unlink(),
      "data.tfds_name='tiny' is not whole, {}/tiny-train.array_record-00001-of-00002 is missing",
    ),
    (
      rewrite("dataset_info.json", '"array_record"', '"tfrecord"'),
      "data.tfds_name='tiny' lies in {} in a format without random access; where TensorFlow is"
      " installed, run: tfds convert_format --dataset_version_dir={} --out_file_format=array_rec",
    ),
    (
      rewrite("dataset_info.json", '"train"', '"training"'),
      "data.tfds_name='tiny' must have a split 'train', has training, validation",
    ),
    (
      rewrite("dataset_info.json", '"validation"', '"other"'),
      "data.tfds_name='tiny' must have a split 'validation' or 'test', has other, train",
    ),
    (
      rewrite("features.json", '"label"', '"target"'),
      "data.tfds_name='tiny' must have the features 'image' (uint8, 1 or 3 channels) and 'label'"
      " (a class), has file_name, image, target",
    ),
    (
      rewrite("features.json", '"uint8"', '"uint16"'),
      "data.tfds_name='tiny' must have the features 'image' (uint8, 1 or 3 channels) and 'label'",
    ),
    (
      shutil.rmtree,
      "data.tfds_name='tiny' is nothing that tfds knows or data.path='{root}' holds: Dataset tiny",
    ),
  ],
)
def test_bad_tfds_data_are_one_line(change, message, tmp_path):
  folder = write_tfds(tmp_path)
  change(folder)
  with pytest.raises(UserError) as error:
    load_source("tfds", "train", str(tmp_path), tfds_name="tiny")
  wanted = message.replace("{root}", str(tmp_path)).replace("{}", str(folder))
  assert str(error.value).startswith(wanted)
  assert "\n" not in str(error.value)


def test_a_wrong_tfds_image_is_named(tmp_path):
  write_tfds(tmp_path)
  source = load_source("tfds", "train", str(tmp_path), tfds_name="tiny")
  broken = dataclasses.replace(source, records=[{"image": b"no image", "label": 0}])
  with pytest.raises(UserError, match=r"tfds_name='tiny', split 'train', record 0 cannot be read"):
    broken[0]
  other = dataclasses.replace(source, image_shape=(4, 4, 3))
  with pytest.raises(UserError, match=r"tfds_name='tiny', split 'train', record 2 has 5x4 pixels"):
    other[2]
