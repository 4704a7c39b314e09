"""Jobs on sets of images and generators, with a small linear network in Inception's place."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import linalg

from dimo_jax import types
from dimo_jax.data.sources import ArraySource
from dimo_jax.evaluation import extraction, image_sets, jobs, published, references
from dimo_jax.preemption import Preempted
from dimo_jax.sharding import make_mesh
from tests import tiny_inception

SIDE, NUM = 4, 96
PROTOCOL = published.PublishedProtocol(
  name="tiny",
  source="here",
  statistics="made here",
  image_size=SIDE,
  num_classes=3,
  rounding="nearest",
  resize="none",
  num_images=NUM,
  num_splits=3,
  num_kept=40,
)


NETWORK = tiny_inception.network(SIDE)


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
  tiny_inception.install(monkeypatch)


def levels(seed, num=NUM, side=SIDE):
  return np.random.default_rng(seed).integers(0, 256, (num, side, side, 3), dtype=np.uint8)


def save_folder(path, images, names="{:03d}.png"):
  path.mkdir(parents=True, exist_ok=True)
  for i, image in enumerate(images):
    Image.fromarray(image).save(path / names.format(i))
  return path


def save_npz(path, images, **more):
  np.savez(path, arr_0=images, **more)
  return path


@pytest.fixture
def statistics(tmp_path):
  """A statistics file of other images, made by the job."""
  images = image_sets.open_images(save_npz(tmp_path / "real.npz", levels(1, 150)))
  out = tmp_path / "statistics.npz"
  jobs.make_statistics(images, PROTOCOL, NETWORK, make_mesh(), out, batch_size=64)
  return out


def judge(statistics, *, batch_size=32, devices=8, network=NETWORK, protocol=PROTOCOL):
  mesh = make_mesh(devices=jax.devices()[:devices])
  reference = references.read_reference(statistics)
  return jobs.Judge(protocol, reference, network, mesh, batch_size)


def features(images, tap):
  return np.asarray(tiny_inception.features(NETWORK.params, images, "none", (tap,))[tap])


def gaussian_distance(a, b):
  """The textbook formula, by scipy's matrix square root."""
  root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
  return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)


def test_images_of_a_data_set_are_known_by_their_pixels():
  """Partial sums over those of another folder must not be gone on with."""
  labels = np.zeros(9, np.int32)
  one, same, other = (
    image_sets.SourceImages(ArraySource(levels(seed, 9), labels, 1, 256), "data train")
    for seed in (1, 1, 2)
  )
  assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_a_row_has_the_numbers_and_what_they_depend_on(tmp_path, statistics, capsys):
  images = save_npz(tmp_path / "fake.npz", levels(2))
  out = tmp_path / "results.jsonl"
  row = jobs.evaluate_images(judge(statistics), image_sets.open_images(images), out)
  assert [json.loads(line) for line in out.read_text().splitlines()] == [row]
  said = f"{images}: tiny (unverified: statistics): FID {row['fid']:.4g}, sFID {row['sfid']:.4g}, "
  assert capsys.readouterr().out.splitlines()[-1].startswith(said)
  a, b = (
    features(levels(seed, num).astype(np.float64), "2048") for seed, num in ((1, 150), (2, NUM))
  )
  assert row["fid"] == pytest.approx(gaussian_distance(a, b), rel=1e-4)
  assert 0 <= row["fid_low"] < row["fid"] < row["fid_high"]
  a, b = (features(levels(seed, num), "spatial") for seed, num in ((1, 150), (2, NUM)))
  assert row["sfid"] == pytest.approx(gaussian_distance(a, b), rel=1e-4)
  assert 1 < row["inception_score"] < 4
  names = ("kid", "kid_std", "precision", "recall", "density", "coverage", "authenticity")
  assert all(isinstance(row[name], float) for name in names)
  assert row["protocol"] == "tiny" and row["departures"] == {}
  assert row["unverified"] == ["statistics"]
  assert row["num_images"] == NUM and row["num_reference_images"] == 150
  assert row["statistics_sha256"] == references.file_sha256(statistics)
  assert row["inception_sha256"] == "abc"
  assert row["images"] == str(images)
  assert {"jax", "numpy", "device"} <= set(row["versions"])
  assert not list(tmp_path.glob("*.partial.npz")) and not list(tmp_path.glob("*.tmp"))


def test_weights_that_were_not_published_are_named(tmp_path, statistics):
  images = image_sets.open_images(save_npz(tmp_path / "fake.npz", levels(2)))
  one = judge(statistics, network=dataclasses.replace(NETWORK, published=False))
  row = jobs.evaluate_images(one, images, tmp_path / "results.jsonl")
  assert row["unverified"] == ["statistics", "inception"]


def test_a_folder_is_the_same_images(tmp_path, statistics):
  npz = image_sets.open_images(save_npz(tmp_path / "fake.npz", levels(2)))
  folder = image_sets.open_images(save_folder(tmp_path / "fake", levels(2)))
  out = tmp_path / "results.jsonl"
  rows = [jobs.evaluate_images(judge(statistics), images, out) for images in (npz, folder)]
  assert rows[0]["fid"] == rows[1]["fid"] and len(out.read_text().splitlines()) == 2


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 96), (1, 7), (8, 16), (8, 64)])
def test_devices_and_batches_do_not_change_the_numbers(tmp_path, statistics, devices, batch_size):
  images = image_sets.open_images(save_npz(tmp_path / "fake.npz", levels(2)))
  out = tmp_path / "results.jsonl"
  expected = jobs.evaluate_images(judge(statistics), images, out)
  found = jobs.evaluate_images(
    judge(statistics, devices=devices, batch_size=batch_size), images, out
  )
  for name in ("fid", "sfid", "inception_score", "kid", "precision", "recall"):
    assert found[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_killed_job_goes_on(tmp_path, statistics, monkeypatch, after):
  images = image_sets.open_images(save_npz(tmp_path / "fake.npz", levels(2)))
  out = tmp_path / "results.jsonl"
  expected = jobs.evaluate_images(
    judge(statistics, batch_size=16), images, tmp_path / "whole.jsonl"
  )
  calls = []

  def stop():
    calls.append(1)
    if len(calls) == after:
      raise Preempted("SIGTERM")

  monkeypatch.setattr(jobs.STOP, "raise_if_set", stop)
  with pytest.raises(Preempted):
    jobs.evaluate_images(judge(statistics, batch_size=16), images, out)
  assert not out.exists() and len(list(tmp_path.glob("*.partial.npz"))) == 1
  done = len(calls)
  read = []
  original = image_sets.ArrayImages.read
  monkeypatch.setattr(
    image_sets.ArrayImages, "read", lambda self, *at: read.append(at) or original(self, *at)
  )
  row = jobs.evaluate_images(judge(statistics, batch_size=16), images, out)
  assert row | {"pictures": ""} == expected | {"pictures": ""}
  first = [start for start, _ in read if start > 0] if after > 1 else [start for start, _ in read]
  assert min(first) == 16 * (done - 1)  # the batch under way is the only one computed again
  assert not list(tmp_path.glob("*.partial.npz"))


def test_what_is_left_of_another_job_is_not_used(tmp_path, statistics):
  sums = extraction.FeatureSums.of(PROTOCOL, spatial=True)
  sums.add({name: np.ones((8, size), np.float32) for name, size in tiny_inception.SIZES.items()})
  path = tmp_path / "partial.npz"
  sums.save(path, "a")
  again = extraction.FeatureSums.of(PROTOCOL, spatial=True)
  assert not again.restore(path, "b") and again.num == 0
  assert again.restore(path, "a") and again.num == 8
  path.write_bytes(path.read_bytes()[:-100])
  assert not extraction.FeatureSums.of(PROTOCOL, spatial=True).restore(path, "a")


@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
  """A generator of class-dependent noise; `bad` is the batch with a NaN."""

  mesh: jax.sharding.Mesh
  bad: int = -1
  image_shape: tuple = (SIDE, SIDE, 3)
  num_classes: int = 3
  name: str = "noise"
  rounding: str | None = None
  settings = {"name": "noise", "steps": 2, "temperature": 1.0}  # noqa: RUF012

  def batch(self, labels, seed, start):
    key = jax.random.fold_in(jax.random.key(seed), start)
    images = jax.random.normal(key, (len(labels), *self.image_shape)) / 2
    images = images + labels[:, None, None, None] / 4
    return images.at[0, 0, 0, 0].set(jnp.nan) if start == self.bad else images


def test_a_generator_is_rounded_and_recorded(tmp_path, statistics):
  one = judge(statistics)
  generator, out = Noise(one.mesh), tmp_path / "results.jsonl"
  row = jobs.evaluate_generator(one, generator, out, {"model": "student", "step": 7})
  labels = PROTOCOL.labels()
  assert set(labels) == {0, 1, 2}
  made = [np.asarray(generator.batch(labels[i : i + 32], 0, i)) for i in range(0, NUM, 32)]
  images = np.floor(np.clip(np.concatenate(made) * 127.5 + 128, 0, 255)).astype(np.uint8)
  same = image_sets.open_images(save_npz(tmp_path / "same.npz", images))
  assert jobs.evaluate_images(one, same, out)["fid"] == pytest.approx(row["fid"], rel=1e-6)
  assert row["sampler"]["temperature"] == 1.0 and row["steps"] == 2
  assert row["seed"] == 0 and row["model"] == "student" and row["step"] == 7
  assert row["images_per_second"] > 0


@pytest.mark.parametrize("bad", [0, 32, 64])
def test_a_generator_of_nan_is_refused(tmp_path, statistics, bad):
  one, out = judge(statistics), tmp_path / "results.jsonl"
  with pytest.raises(types.UserError, match=rf"noise: images {bad} \.\. {bad + 31} hold NaN"):
    jobs.evaluate_generator(one, Noise(one.mesh, bad=bad), out, {})
  assert not out.exists()


def test_a_killed_generation_goes_on(tmp_path, statistics, monkeypatch):
  one = judge(statistics)
  expected = jobs.evaluate_generator(one, Noise(one.mesh), tmp_path / "whole.jsonl", {})
  out, asked, looks = tmp_path / "results.jsonl", [], []

  class Counted(Noise):
    def batch(self, labels, seed, start):
      asked.append(start)
      return super().batch(labels, seed, start)

  def stop():
    looks.append(1)
    if len(looks) == 2:
      raise Preempted("SIGTERM")

  monkeypatch.setattr(jobs.STOP, "raise_if_set", stop)
  with pytest.raises(Preempted):
    jobs.evaluate_generator(one, Counted(one.mesh), out, {})
  assert not out.exists()
  asked.clear()
  row = jobs.evaluate_generator(one, Counted(one.mesh), out, {})
  # The first of the missing batches is also timed; the pictures are of the very first.
  assert asked == [32, 32, 32, 64, 0]
  same = {"pictures": "", "images_per_second": 0.0}
  assert row | same == expected | same


def test_a_generator_that_does_not_match(tmp_path, statistics):
  one, out = judge(statistics), tmp_path / "results.jsonl"
  with pytest.raises(types.UserError, match=r"noise has images \(8, 8, 3\), protocol='tiny'"):
    jobs.evaluate_generator(one, Noise(one.mesh, image_shape=(8, 8, 3)), out, {})
  with pytest.raises(types.UserError, match="noise has 10 classes, protocol='tiny' has 3"):
    jobs.evaluate_generator(one, Noise(one.mesh, num_classes=10), out, {})


def test_sets_that_do_not_match(tmp_path, statistics):
  out = tmp_path / "results.jsonl"
  few = image_sets.open_images(save_npz(tmp_path / "few.npz", levels(2, 95)))
  with pytest.raises(types.UserError, match="95 images, protocol='tiny' takes 96"):
    jobs.evaluate_images(judge(statistics), few, out)
  large = image_sets.open_images(save_npz(tmp_path / "large.npz", levels(2, side=8)))
  with pytest.raises(types.UserError, match=r"images \(8, 8, 3\), protocol='tiny' is for"):
    jobs.evaluate_images(judge(statistics), large, out)
  with pytest.raises(types.UserError, match=r"inception_sha256='abc'.* has 'xyz'"):
    judge(statistics, network=dataclasses.replace(NETWORK, sha256="xyz"))
  with pytest.raises(types.UserError, match=r"resize='none'.* has 'tf1_bilinear'"):
    judge(statistics, protocol=dataclasses.replace(PROTOCOL, resize="tf1_bilinear"))
  with pytest.raises(types.UserError, match=rf"image_size={PROTOCOL.image_size}; .* has 64"):
    judge(statistics, protocol=dataclasses.replace(PROTOCOL, image_size=64))
  with pytest.raises(types.UserError, match="batch_size=12"):
    judge(statistics, batch_size=12)
  assert not out.exists()


def test_what_one_device_made_is_split_over_all(monkeypatch):
  tiny_inception.install(monkeypatch)
  extractor = extraction.Extractor(NETWORK, "none", make_mesh(), 16)
  made = jax.device_put(levels(2, 16), jax.devices()[3])
  found = extractor(made)["2048"]
  assert len({shard.device for shard in found.addressable_shards}) == 8
  assert found.addressable_shards[0].data.shape[0] == 2
  np.testing.assert_allclose(found, features(levels(2, 16), "2048"), rtol=1e-5, atol=1e-6)


def test_a_departure_from_the_protocol_is_recorded(tmp_path, statistics, monkeypatch):
  monkeypatch.setitem(published.PUBLISHED, "tiny", PROTOCOL)
  images = image_sets.open_images(save_npz(tmp_path / "few.npz", levels(2, 50)))
  one = judge(statistics, protocol=PROTOCOL.with_images(50))
  row = jobs.evaluate_images(one, images, tmp_path / "results.jsonl")
  assert row["departures"] == {"num_images": 50} and row["num_images"] == 50
  with pytest.raises(types.UserError, match="num_images=2 must be 3"):
    PROTOCOL.with_images(2)


def test_statistics_with_images_give_the_metrics_of_features(tmp_path, statistics, monkeypatch):
  """ADM's files: images under arr_0, no features."""
  with np.load(statistics) as file:
    arrays = {key: file[key] for key in ("mu", "sigma", "mu_s", "sigma_s")}
  adm, plain = tmp_path / "adm.npz", tmp_path / "plain.npz"
  np.savez(adm, arr_0=levels(1, 150)[:40], **arrays)
  np.savez(plain, mu=arrays["mu"], sigma=arrays["sigma"])
  images = image_sets.open_images(save_npz(tmp_path / "fake.npz", levels(2)))
  opened, one = [], judge(adm)
  monkeypatch.setattr(
    jobs, "open_images", lambda path: opened.append(path) or image_sets.open_images(path)
  )
  fitted = one.fitted_to(Noise(one.mesh, rounding="nearest"))  # another judge, of other rounding
  assert fitted is not one
  for each in (one, one, fitted):  # the features of real images are computed once
    row = jobs.evaluate_images(each, images, tmp_path / "results.jsonl")
  assert opened == [adm]
  assert row["precision"] is not None and row["sfid"] is not None
  assert row["num_reference_images"] is None
  expected = row["fid"]
  row = jobs.evaluate_images(judge(plain), images, tmp_path / "results.jsonl")
  assert row["precision"] is None and row["kid"] is None and row["sfid"] is None
  assert row["fid"] == pytest.approx(expected, rel=1e-12)


def test_kept_features_are_those_of_their_images(statistics):
  whole = dataclasses.replace(PROTOCOL, num_images=150)
  found = references.read_reference(statistics).features
  wanted = features(levels(1, 150), "2048")[whole.kept()]
  # Sums of float32 products of either sign, in batches of another size: an error of their scale.
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
