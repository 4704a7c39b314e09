"""Statistics files and sets of images: what is read, and what is refused in one line."""

import numpy as np
import pytest
from PIL import Image

from dimo_jax import types
from dimo_jax.evaluation import image_sets, inception, published, references

NUM_FEATURES = 6


@pytest.fixture(autouse=True)
def few_features(monkeypatch):
  monkeypatch.setitem(inception.TAPS, "2048", NUM_FEATURES)
  monkeypatch.setitem(inception.TAPS, "spatial", 3)


def arrays(num=NUM_FEATURES):
  return {"mu": np.arange(num, dtype=np.float32), "sigma": np.eye(num)}


def test_both_published_styles_are_read(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, **arrays())
  reference = references.read_reference(path)
  assert reference.spatial is None and reference.pool.num == 0 and not reference.has_images
  assert reference.pool.mean.dtype == np.float64
  np.savez(path, **arrays(), mu_s=np.zeros(3), sigma_s=np.eye(3), arr_0=np.zeros(1))
  reference = references.read_reference(path)
  assert reference.spatial is not None and reference.has_images
  assert reference.sha256 == references.file_sha256(path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ({"mu": np.zeros(6)}, "needs mu and sigma"),
    (arrays(768), r"means \(768,\).*this network's are \(6,\)"),
    (arrays() | {"mu": np.full(6, np.nan)}, "NaN or infinite"),
    (arrays() | {"mu": np.array([None] * 6)}, "damaged"),
  ],
)
def test_other_files_are_refused(tmp_path, content, message):
  path = tmp_path / "a.npz"
  np.savez(path, **content)
  with pytest.raises(types.UserError, match=message) as error:
    references.read_reference(path)
  assert "\n" not in str(error.value)


def test_damaged_files_are_refused(tmp_path):
  path = tmp_path / "a.npz"
  with pytest.raises(types.UserError, match="does not exist"):
    references.read_reference(path)
  np.savez(path, **arrays())
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(types.UserError, match="not a readable"):
    references.read_reference(path)
  np.save(tmp_path / "a.npy", np.zeros(3))
  with pytest.raises(types.UserError, match="not a readable"):
    references.read_reference(tmp_path / "a.npy")
  np.savez(path, **arrays())
  content = bytearray(path.read_bytes())
  content[200] ^= 1  # in the data of mu: the archive's checksum finds it
  path.write_bytes(content)
  with pytest.raises(types.UserError, match="damaged"):
    references.read_reference(path)


def levels(num=5, side=4):
  return np.random.default_rng(0).integers(0, 256, (num, side, side, 3), dtype=np.uint8)


def save_folder(path, images):
  path.mkdir()
  for i, image in enumerate(images):
    Image.fromarray(image).save(path / f"{i}.png")
  return path


def test_a_folder_of_classes_has_labels(tmp_path):
  for name in ("b", "a"):
    save_folder(tmp_path / name, levels(2))
  images = image_sets.open_images(tmp_path)
  np.testing.assert_array_equal(images.labels, [0, 0, 1, 1])
  np.testing.assert_array_equal(images.read(1, 3), levels(2)[::-1])
  assert image_sets.open_images(tmp_path / "a").labels is None


def test_folders_are_checked_before_they_are_read(tmp_path):
  folder = save_folder(tmp_path / "images", levels())
  (folder / "empty").mkdir()
  with pytest.raises(types.UserError, match="has no images"):
    image_sets.open_images(folder / "empty")
  content = (folder / "3.png").read_bytes()
  for damaged in (content[:-20], content[:60] + b"x" + content[61:], b"", b"text"):
    (folder / "3.png").write_bytes(damaged)
    with pytest.raises(types.UserError, match=r"3\.png cannot be read as an image") as error:
      image_sets.open_images(folder)
    assert "\n" not in str(error.value)
  Image.fromarray(levels(1, 5)[0]).save(folder / "3.png")
  with pytest.raises(types.UserError, match=r"3\.png is 5x5 pixels, 0\.png 4x4"):
    image_sets.open_images(folder)
  cropped = image_sets.open_images(folder, 2)
  assert cropped.image_shape == (2, 2, 3) and cropped.read(0, 5).shape == (5, 2, 2, 3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_mapped_or_read(tmp_path, save):
  path = tmp_path / "images.npz"
  save(path, arr_0=levels(), arr_1=np.arange(5))
  images = image_sets.open_images(path)
  assert isinstance(images.images, np.memmap) == (save is np.savez)
  np.testing.assert_array_equal(images.read(1, 4), levels()[1:4])
  np.testing.assert_array_equal(images.labels, np.arange(5))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ({"x": levels()}, "holds x; needs images as arr_0 or images"),
    ({"images": np.full((2, 4, 4, 3), np.nan)}, "2 of 2 hold NaN"),
    ({"images": np.zeros((2, 4, 4, 3))}, "float64.*must be uint8"),
    ({"images": levels()[..., :1]}, "must be uint8"),
    ({"images": levels(), "labels": np.arange(4)}, "labels are"),
    ({"images": np.array([None])}, "damaged"),
  ],
)
def test_other_arrays_are_refused(tmp_path, content, message):
  path = tmp_path / "images.npz"
  np.savez(path, **content)
  with pytest.raises(types.UserError, match=message) as error:
    image_sets.open_images(path)
  assert "\n" not in str(error.value)


def test_protocols_are_whole():
  for name, protocol in published.PUBLISHED.items():
    assert protocol.name == name and not protocol.departures() and not protocol.verified
    labels = protocol.labels()
    assert labels.dtype == np.int32 and len(labels) == 50_000
    counts = np.bincount(labels, minlength=1000)
    assert (counts == 50).all() == (protocol.classes == "balanced")
    assert counts.min() > 0
    kept = protocol.kept()
    assert len(kept) == protocol.num_kept and (np.diff(kept) > 0).all()


def test_roundings():
  x = np.array([-2, -1, -1 + 1.6 / 255, 0, 1 - 0.8 / 255, 1, 2], np.float32)
  floor, nearest = (np.asarray(published.ROUNDINGS[name](x)) for name in ("floor", "nearest"))
  np.testing.assert_array_equal(floor, [0, 0, 0, 127, 254, 255, 255])
  np.testing.assert_array_equal(nearest, [0, 0, 1, 128, 255, 255, 255])
