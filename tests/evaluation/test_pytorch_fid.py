"""The distance at 192 features on 2,000 images against pytorch-fid with the same weights."""

import jax
import numpy as np
import pytest

from dimo_jax.evaluation import inception, metrics
from dimo_jax.evaluation.statistics import RunningStatistics
from tests.evaluation import pytorch_fid_reference as reference

BATCH = 250


def distance_of(case):
  params, tap = inception.from_published(reference.weights()), str(case.num_features)
  network = inception.InceptionV3((tap,))
  used = {name: params[name] for name in params if tap == "2048" or name.startswith("Conv2d")}

  @jax.jit
  def features(params, levels):
    return network.apply({"params": params}, levels / np.float32(127.5) - 1)[tap]

  sides = []
  for seed in (0, 1):
    images, running = reference.images(seed, case), RunningStatistics(case.num_features)
    for start in range(0, len(images), BATCH):
      batch = images[start : start + BATCH].astype(np.float32)
      running.add(np.asarray(features(used, batch)))
    sides.append(running.result())
  return metrics.frechet_distance(*sides)


@pytest.fixture(scope="module")
def distance():
  return distance_of(reference.Case())


def test_distance_of_pytorch_fid_as_recorded(golden, distance):
  assert distance == pytest.approx(float(golden("11_pytorch_fid_192")["fid"]), rel=1e-3)
  assert distance > 0.1


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_distance_of_the_installed_pytorch_fid(distance):
  pytest.importorskip("pytorch_fid")
  assert distance == pytest.approx(reference.reference_distance(reference.Case()), rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_distance_of_the_installed_pytorch_fid_at_full_size():
  pytest.importorskip("pytorch_fid")
  case = reference.Case(num_features=2048, num_images=10_000, side=75)
  ours, theirs = distance_of(case), reference.reference_distance(case)
  print(f"ours {ours!r}, pytorch-fid {theirs!r}")
  assert ours == pytest.approx(theirs, rel=1e-3)
