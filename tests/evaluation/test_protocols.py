"""Protocols: what is fixed, the metrics they gather, and the errors that users see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimo_jax import types
from dimo_jax.evaluation import features, metrics, protocols

KEYS = {
  "frechet_distance",
  "frechet_distance_low",
  "frechet_distance_high",
  "frechet_distance_normalized",
  "class_agreement",
  "precision",
  "recall",
  "density",
  "coverage",
  "authenticity",
  "token_entropy",
  "nearest_distance",
  "num_distinct",
  "num_images",
}
PROTOCOL = protocols.PROTOCOLS["digits"]
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def classifier():
  """Random weights: the protocol does not care what the features mean."""
  module = features.FeatureClassifier(num_classes=10)
  params = module.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))["params"]
  return features.Classifier(module, jax.device_get(params), SHAPE, seed=0)


def make_images(seed, num):
  return np.random.default_rng(seed).uniform(-1, 1, (num, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def reference(classifier):
  return PROTOCOL.reference(classifier, make_images(0, 120), np.arange(120) % 10)


def test_registry_names_agree():
  assert all(name == protocol.name for name, protocol in protocols.PROTOCOLS.items())


def test_labels_keep_the_class_counts():
  labels = np.array([2, 0, 1, 1])
  protocol = dataclasses.replace(PROTOCOL, num_images=4)
  np.testing.assert_array_equal(protocol.labels(labels), labels)
  protocol = dataclasses.replace(PROTOCOL, num_images=6)
  np.testing.assert_array_equal(protocol.labels(labels), [2, 0, 1, 1, 2, 0])


def test_rounding_keeps_levels_and_clips():
  levels = (np.arange(17) / 8 - 1).astype(np.float32)
  np.testing.assert_array_equal(PROTOCOL.round_images(levels), levels)
  for shift in (-0.06, 0.06):  # just under half a level
    np.testing.assert_array_equal(PROTOCOL.round_images(levels + shift), levels)
  np.testing.assert_array_equal(PROTOCOL.round_images(levels[:-1] + 0.065), levels[1:])
  np.testing.assert_array_equal(PROTOCOL.round_images(np.array([-3.0, 7.0])), [-1, 1])


def test_evaluate_gathers_the_metrics(classifier, reference):
  images, labels = make_images(1, 60), np.arange(60) % 10
  images[1] = images[0]
  tokens = np.random.default_rng(2).integers(0, 5, (60, 4))
  result = reference.evaluate(images, labels, tokens, 5)
  assert set(result) == KEYS
  rounded = PROTOCOL.round_images(images)
  fake_features, logits = classifier.features_and_logits(rounded)
  real_features, _ = classifier.features_and_logits(reference.images)
  a, b = map(metrics.FeatureStatistics.from_features, (real_features, fake_features))
  distance = metrics.frechet_distance(a, b)
  neighbors = metrics.precision_recall(real_features, fake_features, 3)
  nearest = [np.sqrt(((reference.images - x) ** 2).sum((1, 2, 3)).min()) for x in rounded]
  low, high = metrics.frechet_interval(a, b, fake_features)
  assert low < distance < high
  expected = {
    "frechet_distance": distance,
    "frechet_distance_low": low,
    "frechet_distance_high": high,
    "frechet_distance_normalized": distance / np.trace(a.covariance),
    "class_agreement": np.mean(logits.argmax(1) == labels),
    **neighbors._asdict(),
    "authenticity": metrics.authenticity(real_features, fake_features),
    "token_entropy": metrics.token_entropy(tokens, 5),
    "nearest_distance": np.median(nearest),
    "num_distinct": 59,
    "num_images": 60,
  }
  assert result == pytest.approx(expected, rel=1e-6)


def test_no_tokens_are_needed(reference):
  result = reference.evaluate(jnp.asarray(make_images(1, 60)), np.arange(60) % 10)
  assert set(result) == KEYS and result["token_entropy"] is None


def test_a_copy_of_the_reference_is_perfect(reference):
  result = reference.evaluate(reference.images, np.arange(120) % 10)
  assert result["frechet_distance"] < 1e-6
  assert result["precision"] == result["recall"] == 1
  assert result["nearest_distance"] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_pixels_that_are_not_finite(reference, bad):
  images = make_images(1, 60)
  images[7, 3, 3, 0] = bad
  with pytest.raises(types.UserError, match="1 of 60 hold NaN"):
    reference.evaluate(images, np.zeros(60, int))


@pytest.mark.parametrize(
  ("num", "shape", "labels", "tokens", "codebook_size", "message"),
  [
    (60, (8, 9, 1), np.zeros(60, int), None, None, "shape"),
    (60, (8, 8), np.zeros(60, int), None, None, "shape"),
    (32, SHAPE, np.zeros(32, int), None, None, "at least 33"),
    (60, SHAPE, np.zeros(59, int), None, None, "one integer for each"),
    (60, SHAPE, np.zeros(60), None, None, "one integer for each"),
    (60, SHAPE, np.full(60, 10), None, None, "labels span 10 to 10"),
    (60, SHAPE, np.full(60, -1), None, None, "labels span -1 to -1"),
    (60, SHAPE, np.zeros(60, int), np.zeros((60, 4), int), None, "codebook_size"),
    (60, SHAPE, np.zeros(60, int), np.zeros((59, 4), int), 5, "tokens are"),
    (60, SHAPE, np.zeros(60, int), np.full((60, 4), 5), 5, "tokens span"),
  ],
)
def test_bad_input_is_one_line(reference, num, shape, labels, tokens, codebook_size, message):
  with pytest.raises(types.UserError, match=message) as error:
    reference.evaluate(np.zeros((num, *shape)), labels, tokens, codebook_size)
  assert "\n" not in str(error.value)


def test_a_bad_reference_is_named(classifier):
  with pytest.raises(types.UserError, match="reference images"):
    PROTOCOL.reference(classifier, make_images(0, 20), np.zeros(20, int))
