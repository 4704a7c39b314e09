"""The feature network: accuracy, determinism, batching, and its file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from sklearn import datasets

from dimo_jax import types
from dimo_jax.evaluation import features

NUM_TRAIN = 1437


@pytest.fixture(scope="module")
def digits():
  images, labels = datasets.load_digits(return_X_y=True)
  images = (images.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
  order = np.random.default_rng(0).permutation(len(images))
  return images[order], labels[order]


@pytest.fixture(scope="module")
def classifier(digits):
  images, labels = digits
  return features.train_classifier(
    images[:NUM_TRAIN],
    labels[:NUM_TRAIN],
    10,
    seed=3,
    num_steps=150,
    batch_size=64,
    test_images=images[NUM_TRAIN:],
    test_labels=labels[NUM_TRAIN:],
  )


def test_short_training_classifies_digits(digits, classifier):
  images, labels = digits
  _, logits = classifier.features_and_logits(images[NUM_TRAIN:])
  accuracy = np.mean(logits.argmax(axis=1) == labels[NUM_TRAIN:])
  assert accuracy > 0.95
  assert classifier.test_accuracy == pytest.approx(accuracy)


def test_chunks_and_padding_leave_no_trace(digits, classifier, monkeypatch):
  """The batched outputs are the network's, and logits are a linear map of the features."""
  images, _ = digits
  image_features, logits = classifier.features_and_logits(images[:70])
  assert image_features.shape == (70, 32) and logits.shape == (70, 10)
  direct = classifier.module.apply({"params": classifier.params}, jnp.asarray(images[:70]))
  np.testing.assert_allclose(image_features, direct[0], rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(logits, direct[1], rtol=1e-5, atol=1e-4)
  head = classifier.params["Dense_1"]
  np.testing.assert_allclose(
    image_features @ head["kernel"] + head["bias"], logits, rtol=1e-5, atol=1e-4
  )
  monkeypatch.setattr(features, "CHUNK", 32)
  chunked = classifier.features_and_logits(images[:70])
  np.testing.assert_allclose(chunked[0], image_features, rtol=1e-5, atol=1e-4)


def test_training_is_deterministic_in_the_seed(digits):
  images, labels = digits[0][:200], digits[1][:200]

  def weight_hash(seed):
    return features.train_classifier(
      images, labels, 10, seed=seed, num_steps=3, batch_size=16
    ).weight_hash()

  assert weight_hash(0) == weight_hash(0)
  assert weight_hash(0) != weight_hash(1)


def test_weight_hash_sees_one_changed_weight(classifier):
  changed = jax.tree.map(np.array, classifier.params)
  changed["Dense_0"]["bias"][5] += 1e-6
  assert dataclasses.replace(classifier, params=changed).weight_hash() != classifier.weight_hash()


def test_save_and_load_round_trip(tmp_path, digits, classifier):
  path = tmp_path / "classifier.safetensors"
  path.write_bytes(b"an older file")
  classifier.save(path)
  loaded = features.Classifier.load(path)
  assert loaded.weight_hash() == classifier.weight_hash()
  for field in ("module", "image_shape", "seed", "test_accuracy"):
    assert getattr(loaded, field) == getattr(classifier, field)
  images = digits[0][:5]
  for a, b in zip(
    loaded.features_and_logits(images), classifier.features_and_logits(images), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no temporary left
  with safetensors.safe_open(path, framework="np") as file:
    metadata = json.loads(file.metadata()[features.METADATA_KEY])
  assert metadata["num_classes"] == 10 and metadata["image_shape"] == [8, 8, 1]


def test_failed_save_keeps_the_older_file(tmp_path, classifier, monkeypatch):
  path = tmp_path / "classifier.safetensors"
  path.write_bytes(b"older")
  monkeypatch.setattr(features.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
  with pytest.raises(OSError, match="full"):
    classifier.save(path)
  assert path.read_bytes() == b"older"
  assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_load_names_a_bad_file(tmp_path):
  with pytest.raises(types.UserError, match="no file"):
    features.Classifier.load(tmp_path / "missing")
  (tmp_path / "broken").write_bytes(b"not safetensors")
  safetensors.numpy.save_file({"x": np.zeros(2)}, tmp_path / "other")
  for name in ("broken", "other"):
    with pytest.raises(types.UserError, match=name):
      features.Classifier.load(tmp_path / name)


def test_bad_input_is_one_line(digits, classifier):
  images, labels = digits
  with pytest.raises(types.UserError, match="shape"):
    classifier.features_and_logits(images[:4, :7])
  with pytest.raises(types.UserError, match="labels span"):
    features.train_classifier(images, labels, 9, num_steps=1)
  with pytest.raises(types.UserError, match="not"):
    features.train_classifier(images, labels[:-1], 10, num_steps=1)


@pytest.mark.parametrize("shape", [(16, 16, 3), (64, 64, 3), (28, 28, 1)])
def test_other_sizes_end_at_four_pixels(shape):
  module = features.FeatureClassifier(num_classes=5)
  variables = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, *shape), np.float32))
  assert variables["params"]["Dense_0"]["kernel"].shape == (4 * 4 * 64, 32)


@pytest.mark.slow
def test_default_training_reaches_its_accuracy(digits):
  images, labels = digits
  trained = features.train_classifier(images[:NUM_TRAIN], labels[:NUM_TRAIN], 10, seed=0)
  assert trained.accuracy(images[NUM_TRAIN:], labels[NUM_TRAIN:]) >= 0.975
