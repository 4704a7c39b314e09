"""FID's Inception-v3 against the features of its public ports, with weights made by a rule."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimo_jax import types
from dimo_jax.evaluation import inception
from dimo_jax.evaluation.resize import resize
from tests.evaluation.inception_rule import rule_weights

ATOL = 2e-5


@pytest.fixture(scope="module")
def arrays(golden):
  return golden("11_inception_features")


@pytest.fixture(scope="module")
def state_dict(arrays):
  shapes = {
    str(name): tuple(json.loads(str(shape)))
    for name, shape in zip(arrays["weight_table_names"], arrays["weight_shapes"], strict=True)
  }
  counters = {k: np.zeros((), np.int64) for k in shapes if k.endswith("num_batches_tracked")}
  return rule_weights({k: v for k, v in shapes.items() if k not in counters}) | counters


@pytest.fixture(scope="module")
def params(state_dict):
  return inception.from_published(state_dict)


def test_weights_are_those_of_the_reference(arrays, state_dict):
  for name, row in zip(
    arrays["weight_table_names"], arrays["weight_table_l2_sum_absmax_dot"], strict=True
  ):
    value = state_dict[str(name)].astype(np.float64)
    found = [np.sqrt((value**2).sum()), value.sum(), np.abs(value).max()]
    np.testing.assert_allclose(found, row[:3], rtol=1e-5, atol=1e-5, err_msg=str(name))


@pytest.fixture(scope="module")
def features(arrays, params):
  """Taps by resize, in one compiled call."""
  images = arrays["images_uint8"].transpose(0, 2, 3, 1).astype(np.float32)

  @jax.jit
  def apply(params, images):
    levels = [resize(images, name, inception.SIDE) for name in ("tf1_bilinear", "torch_bilinear")]
    inputs = jnp.concatenate([(levels[0] - 128) / 128, levels[1] / 127.5 - 1])
    return inception.InceptionV3().apply({"params": params}, inputs)

  found = jax.device_get(apply(params, images))
  return {name: (value[:3], value[3:]) for name, value in found.items()}


@pytest.mark.parametrize("tap", ["64", "192", "768", "2048", "logits_unbiased", "logits"])
def test_features_of_torch_fidelity(arrays, features, tap):
  expected = arrays[f"torch_fidelity/float32/{tap}"]
  np.testing.assert_allclose(features[tap][0], expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("tap", ["64", "192", "768", "2048"])
def test_features_of_pytorch_fid(arrays, features, tap):
  expected = arrays[f"pytorch_fid/{tap}_spatial_mean"]
  np.testing.assert_allclose(features[tap][1], expected, rtol=0, atol=ATOL)


def test_taps_have_their_sizes_and_stop_the_network(features):
  assert {name: value[0].shape[1] for name, value in features.items()} == inception.TAPS
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  module = inception.InceptionV3(("192",))
  names = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
  assert max(names) == "Conv2d_4a_3x3"


def test_foreign_weights_are_refused(state_dict):
  with pytest.raises(types.UserError, match=r"missing keys fc\.bias, unexpected keys fc2\.bias"):
    renamed = {("fc2.bias" if k == "fc.bias" else k): v for k, v in state_dict.items()}
    inception.from_published(renamed)
  with pytest.raises(types.UserError, match=r"fc\.bias has shape \(1000,\)"):
    inception.from_published(state_dict | {"fc.bias": np.zeros(1000, np.float32)})


def test_weights_have_an_identity(state_dict):
  a = inception.Inception.from_state_dict(state_dict, "6726825d" + "0" * 56)
  changed = state_dict | {"fc.bias": state_dict["fc.bias"] + 1}
  b = inception.Inception.from_state_dict(changed)
  assert a.published and not b.published
  assert a.sha256 != b.sha256 == inception.Inception.from_state_dict(changed).sha256
