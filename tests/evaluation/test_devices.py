"""Inception itself, with weights by a rule, over one device and over eight: the same distance."""

import jax
import numpy as np
import pytest

from dimo_jax.evaluation import extraction, image_sets, inception, jobs, metrics, published
from dimo_jax.evaluation.references import read_reference
from dimo_jax.evaluation.statistics import RunningStatistics
from dimo_jax.sharding import make_mesh
from tests.evaluation import pytorch_fid_reference as reference

RTOL = 1e-4
SMALLEST_SIDE = 75  # of an image that the network takes, instead of 299


@pytest.fixture(scope="module")
def network():
  return inception.Inception(inception.from_published(reference.weights()), "abc", published=False)


def images(seed, num, side=16):
  """Noise on squares of one level each."""
  random = np.random.default_rng(seed)
  level = random.integers(20 + 30 * seed, 200, (num, 1, 1, 3))
  return np.clip(level + random.normal(0, 25, (num, side, side, 3)), 0, 255).astype(np.uint8)


def test_distance_and_statistics_do_not_depend_on_the_devices(network, monkeypatch):
  monkeypatch.setattr(extraction, "SIDE", SMALLEST_SIDE)
  sets = [images(seed, 240) for seed in (0, 1)]

  def distance(devices, batch_size):
    mesh = make_mesh(devices=jax.devices()[:devices])
    extractor = extraction.Extractor(network, "tf1_bilinear", mesh, batch_size, ("192",))
    sides = []
    for levels in sets:
      running = RunningStatistics(192)
      for start in range(0, len(levels), batch_size):
        batch = levels[start : start + batch_size]
        running.add(np.asarray(extractor(batch)["192"])[: len(batch)])
      sides.append(running.result())
    return metrics.frechet_distance(*sides), sides

  expected, sides = distance(1, 64)
  assert expected > 0.01
  for devices, batch_size in ((8, 64), (8, 16)):
    found, others = distance(devices, batch_size)
    assert found == pytest.approx(expected, rel=RTOL)
    for one, other in zip(sides, others, strict=True):
      np.testing.assert_allclose(other.mean, one.mean, rtol=1e-5)


@pytest.mark.slow
def test_a_result_does_not_depend_on_the_devices(network, tmp_path):
  """At full size, from the files to the row."""
  protocol = published.PublishedProtocol(
    name="small",
    source="here",
    statistics="made here",
    image_size=32,
    num_classes=10,
    rounding="nearest",
    resize="clean_bicubic",
    num_images=48,
    num_splits=2,
    num_kept=48,
  )
  for name, seed in (("real", 0), ("fake", 1)):
    np.savez(tmp_path / f"{name}.npz", images(seed, 48, side=32))
  statistics = tmp_path / "statistics.npz"
  real, fake = (image_sets.open_images(tmp_path / f"{name}.npz") for name in ("real", "fake"))
  jobs.make_statistics(real, protocol, network, make_mesh(), statistics, batch_size=16)
  rows = []
  for devices, batch_size in ((1, 12), (8, 48)):
    mesh = make_mesh(devices=jax.devices()[:devices])
    judge = jobs.Judge(protocol, read_reference(statistics), network, mesh, batch_size)
    rows.append(jobs.evaluate_images(judge, fake, tmp_path / "results.jsonl"))
  for name in ("fid", "sfid", "inception_score", "kid"):
    assert rows[0][name] == pytest.approx(rows[1][name], rel=RTOL), name
  for name in ("precision", "recall", "density", "coverage", "authenticity"):
    assert rows[0][name] == pytest.approx(rows[1][name], abs=0.03), name
