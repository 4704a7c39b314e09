"""Metrics against the reference implementations' numbers, closed forms and plain loops."""

import numpy as np
import pytest

from dimo_jax import types
from dimo_jax.evaluation import metrics

SETS = ("full", "lowrank", "small_dim")


@pytest.fixture(scope="module")
def arrays(golden):
  return golden("11_metrics_math")


@pytest.mark.parametrize("name", SETS)
def test_statistics_match_golden(arrays, name):
  for i in (1, 2):
    statistics = metrics.FeatureStatistics.from_features(arrays[f"{name}/features_{i}"])
    np.testing.assert_allclose(statistics.mean, arrays[f"{name}/mu_{i}"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(statistics.covariance, arrays[f"{name}/sigma_{i}"], atol=1e-10)
    assert statistics.num == len(arrays[f"{name}/features_{i}"])


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("reference", ["fid_pytorch_fid", "fid_torch_fidelity"])
def test_frechet_distance_matches_golden(arrays, name, reference):
  a, b = (metrics.FeatureStatistics.from_features(arrays[f"{name}/features_{i}"]) for i in (1, 2))
  expected = arrays[f"{name}/{reference}"]
  rtol = 1e-3 if name == "lowrank" else 1e-5
  np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=rtol)
  np.testing.assert_allclose(metrics.frechet_distance(b, a), expected, rtol=rtol)


@pytest.mark.parametrize("dim", [1, 5])
@pytest.mark.parametrize("num_zero", [0, 1])
def test_frechet_distance_of_commuting_covariances(dim, num_zero):
  """With common eigenvectors it is |difference of means|^2 + sum (sqrt(a) - sqrt(b))^2."""
  rng = np.random.default_rng(0)
  vectors, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
  values_a, values_b = rng.uniform(0.1, 2, (2, dim))
  values_a[:num_zero] = 0
  mean_a, mean_b = rng.normal(size=(2, dim))
  a = metrics.FeatureStatistics(mean_a, (vectors * values_a) @ vectors.T, 10)
  b = metrics.FeatureStatistics(mean_b, (vectors * values_b) @ vectors.T, 10)
  expected = np.sum((mean_a - mean_b) ** 2)
  expected += np.sum((np.sqrt(values_a) - np.sqrt(values_b)) ** 2)
  np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=1e-6)
  assert 0 <= metrics.frechet_distance(a, a) < 1e-7


def test_statistics_reject_what_has_no_distance():
  with pytest.raises(types.UserError, match="at least 2"):
    metrics.FeatureStatistics.from_features(np.zeros((1, 3)))
  a, b = (metrics.FeatureStatistics.from_features(np.eye(dim)) for dim in (3, 4))
  with pytest.raises(types.UserError, match="3 against 4"):
    metrics.frechet_distance(a, b)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("block_rows", [7, 1024])
def test_precision_recall_matches_golden(arrays, monkeypatch, name, k, block_rows):
  monkeypatch.setattr(metrics, "BLOCK_ROWS", block_rows)
  result = metrics.precision_recall(arrays[f"{name}/features_1"], arrays[f"{name}/features_2"], k)
  expected = arrays[f"{name}/prdc_k{k}_precision_recall_density_coverage"]
  np.testing.assert_allclose(result, expected, rtol=1e-12)


def test_precision_recall_of_known_lines():
  """Real points at 0, 1, 2, 10; radii with k=1 are 1, 1, 1, 8 and balls are open."""
  real = np.array([[0.0], [1.0], [2.0], [10.0]])
  fake = np.array([[-1.0], [0.5], [18.0]])  # on an edge, inside two balls, on an edge
  result = metrics.precision_recall(real, fake, k=1)
  assert result == (1 / 3, 1.0, 2 / 3, 0.5)  # the radii of fake are 1.5, 1.5 and 17.5
  with pytest.raises(types.UserError, match="k=3"):
    metrics.precision_recall(real, fake, k=3)


def test_class_agreement_counts_matches():
  logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
  assert metrics.class_agreement(logits, np.array([1, 0, 0, 1])) == 0.5


def test_token_entropy_of_known_distributions():
  uniform = np.arange(8)
  constant = np.full(8, 7)
  skewed = np.array([0, 0, 0, 0, 0, 0, 3, 3])  # 3/4 and 1/4
  skewed_entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
  tokens = np.stack([uniform, constant, skewed], axis=1)
  expected = (np.log(8) + 0 + skewed_entropy) / 3
  np.testing.assert_allclose(metrics.token_entropy(tokens, 8), expected, rtol=1e-12)
  for bad in (tokens - 1, tokens + 1):
    with pytest.raises(types.UserError, match="codebook_size=8"):
      metrics.token_entropy(bad, 8)


def test_nearest_distances_match_a_loop(monkeypatch):
  monkeypatch.setattr(metrics, "BLOCK_ROWS", 4)
  rng = np.random.default_rng(0)
  samples, references = rng.normal(size=(10, 3, 3, 2)), rng.normal(size=(7, 3, 3, 2))
  samples[3] = references[5]
  expected = [min(np.sqrt(np.sum((s - r) ** 2)) for r in references) for s in samples]
  result = metrics.nearest_distances(samples, references)
  np.testing.assert_allclose(result, expected, rtol=1e-12)
  assert result[3] == 0


def test_num_distinct_counts_rows():
  tokens = np.array([[1, 2], [2, 1], [1, 2], [1, 1]])
  assert metrics.num_distinct(tokens) == 3
  assert metrics.num_distinct(tokens[:, :, None, None]) == 3


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("k", [3, 5])
def test_closed_balls_match_torch_fidelity(arrays, name, k):
  result = metrics.precision_recall(
    arrays[f"{name}/features_1"], arrays[f"{name}/features_2"], k, "closed"
  )
  expected = arrays[f"{name}/torch_fidelity_prc_k{k}_precision_recall_f"][:2]
  np.testing.assert_allclose(result[:2], expected, rtol=1e-7)


def test_closed_balls_hold_their_edge():
  real = np.array([[0.0], [1.0], [2.0], [10.0]])
  fake = np.array([[-1.0], [0.5], [18.0]])
  assert metrics.precision_recall(real, fake, k=1, balls="closed") == (1.0, 1.0, 4 / 3, 0.75)
  with pytest.raises(types.UserError, match="balls='half'"):
    metrics.precision_recall(real, fake, k=1, balls="half")


@pytest.mark.parametrize("metric", ["precision_recall", "authenticity", "nearest_distances"])
def test_many_features_by_matrix_product(arrays, monkeypatch, metric):
  real, fake = arrays["full/features_1"], arrays["full/features_2"].copy()
  fake[0] = real[3]
  expected = getattr(metrics, metric)(real, fake)
  monkeypatch.setattr(metrics, "DIRECT_FEATURES", 8)
  np.testing.assert_allclose(getattr(metrics, metric)(real, fake), expected, rtol=1e-9, atol=0)


KID = {"full": 90, "lowrank": 10, "small_dim": 20}


@pytest.mark.parametrize("name", SETS)
def test_kernel_distance_matches_golden(arrays, name):
  a, b = (arrays[f"{name}/features_{i}"] for i in (1, 2))
  result = metrics.kernel_distance(a, b, num_subsets=10, subset_size=KID[name])
  expected = arrays[f"{name}/kid_mean_std_subsets10_size{KID[name]}_seed2020"]
  np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_kernel_distance_of_the_whole_sets_matches_golden(arrays):
  a, b = (arrays[f"full/features_{i}"][:180] for i in (1, 2))
  result = metrics.kernel_distance(a, b, num_subsets=2, subset_size=180)
  np.testing.assert_allclose(result.mean, arrays["full/mmd2_poly_unbiased_first_m"], rtol=1e-6)
  assert result.std < 1e-9
  with pytest.raises(types.UserError, match=r"2 \.\. 180"):
    metrics.kernel_distance(a, b, subset_size=181)


def test_authenticity_of_copies_and_of_new_images():
  rng = np.random.default_rng(0)
  train = rng.normal(size=(400, 8))
  assert metrics.authenticity(train, train[:100] + 1e-3) == 0
  assert 0.4 < metrics.authenticity(train, rng.normal(size=(400, 8))) < 0.7
  line = np.array([[0.0], [1.0], [5.0]])
  assert metrics.authenticity(line, np.array([[0.5], [5.0], [8.9], [9.1]])) == 0.25
  with pytest.raises(types.UserError, match="at least 2"):
    metrics.authenticity(line[:1], line)


@pytest.mark.parametrize(
  ("scales", "shift"), [((1.0, 1.5, 0.5), 0.3), ((1.0, 1.0, 0.1), 0.0)]
)  # of the second only the narrow direction moves the distance
def test_the_interval_is_that_of_resampling_the_images(scales, shift):
  rng = np.random.default_rng(0)
  reference = metrics.FeatureStatistics.from_features(rng.normal(size=(5000, 3)))
  features = rng.normal(size=(1500, 3)) * scales + [shift, 0, 0]
  generated = metrics.FeatureStatistics.from_features(features)
  distances = []
  for _ in range(400):
    again = features[rng.integers(0, 1500, 1500)]
    again = metrics.FeatureStatistics.from_features(again)
    distances.append(metrics.frechet_distance(reference, again))
  width = np.quantile(distances, 0.975) - np.quantile(distances, 0.025)
  interval = metrics.frechet_interval(reference, generated, features)
  assert interval.high - interval.low == pytest.approx(width, rel=0.15)
  assert interval.low < metrics.frechet_distance(reference, generated) < interval.high
  part = metrics.frechet_interval(reference, generated, features[:500])
  assert part.high - part.low == pytest.approx(width, rel=0.2)
  few = metrics.FeatureStatistics.from_features(features[:3])
  assert metrics.frechet_interval(reference, few, features[:3]) is None
