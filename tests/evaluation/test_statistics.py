"""Streaming sums: independent of batches, mergeable, resumable, and equal to the two-pass ones."""

import numpy as np
import pytest

from dimo_jax import types
from dimo_jax.evaluation import metrics, statistics
from dimo_jax.evaluation.statistics import RunningScore, RunningStatistics


@pytest.fixture(scope="module")
def features():
  rng = np.random.default_rng(0)
  mixing = rng.normal(size=(24, 24))
  return (rng.normal(size=(1000, 24)) @ mixing + 5).astype(np.float32)


def running(features, batch_size):
  result = RunningStatistics(features.shape[1])
  for start in range(0, len(features), batch_size):
    result.add(features[start : start + batch_size])
  return result


def test_same_as_two_passes(features):
  result, expected = (
    running(features, 64).result(),
    metrics.FeatureStatistics.from_features(features),
  )
  np.testing.assert_allclose(result.mean, expected.mean, rtol=1e-12)
  scale = np.abs(expected.covariance).max()
  np.testing.assert_allclose(result.covariance, expected.covariance, atol=1e-12 * scale)
  assert result.num == 1000


@pytest.mark.parametrize("batch_size", [1, 7, 255, 256, 1000])
def test_batches_do_not_change_a_bit(features, batch_size):
  result, expected = running(features, batch_size).result(), running(features, 64).result()
  assert np.array_equal(result.mean, expected.mean)
  assert np.array_equal(result.covariance, expected.covariance)


def test_parts_merge(features):
  parts = [running(features[rows], 50) for rows in (slice(0, 333), slice(333, None))]
  result, expected = parts[0].merge(parts[1]).result(), running(features, 64).result()
  np.testing.assert_allclose(result.mean, expected.mean, rtol=1e-12)
  scale = np.abs(expected.covariance).max()
  np.testing.assert_allclose(result.covariance, expected.covariance, atol=1e-12 * scale)
  assert result.num == expected.num


def test_going_on_from_a_state(features):
  first = running(features[:333], 50)
  state = {k: v.copy() for k, v in first.state().items()}
  first.add(features[333:])
  again = RunningStatistics.restored(state)
  assert again.num == 333
  again.add(features[333:])
  assert np.array_equal(again.result().covariance, first.result().covariance)
  with pytest.raises(types.UserError, match="at least 2"):
    running(features[:1], 1).result()


@pytest.mark.parametrize(("splits", "shuffle"), [(10, 1), (10, 0), (7, 1), (1, 0)])
@pytest.mark.parametrize("batch_size", [120, 13])
def test_inception_score_matches_golden(golden, splits, shuffle, batch_size):
  arrays = golden("11_metrics_math")
  logits = arrays["isc/logits"]
  score = RunningScore(len(logits), splits, 2020 if shuffle else None, logits.shape[1])
  for start in range(0, len(logits), batch_size):
    with pytest.raises(types.UserError, match="of 120 images"):
      score.result()
    score.add(logits[start : start + batch_size])
    state = score.state()
    score = RunningScore(len(logits), splits, 2020 if shuffle else None, logits.shape[1])
    score.restore(state)
  expected = arrays[f"isc/splits{splits}_shuffle{shuffle}_seed2020_mean_std"]
  np.testing.assert_allclose(score.result(), expected, rtol=1e-6, atol=1e-12)


def test_inception_score_of_known_distributions():
  certain = np.log(np.eye(4) + 1e-300)
  score = RunningScore(8, 1, None, 4)
  score.add(np.concatenate([certain, certain]))
  np.testing.assert_allclose(score.result(), (4.0, 0.0), rtol=1e-12)
  score = RunningScore(8, 2, None, 4)
  score.add(np.repeat(certain[:2], 4, axis=0))  # every split has one class
  np.testing.assert_allclose(score.result(), (1.0, 0.0), rtol=1e-12)
  with pytest.raises(types.UserError, match=r"splits=9 must lie in 1 \.\. 8"):
    RunningScore(8, 9, None, 4)


def test_classes_have_their_own_statistics(features):
  labels = np.arange(1000) % 3
  labels[0] = 9  # one image alone
  found = statistics.class_statistics(features, labels)
  assert set(found) == {0, 1, 2}
  expected = np.cov(features[labels == 1].T)
  np.testing.assert_allclose(found[1].covariance, expected, rtol=1e-10)
