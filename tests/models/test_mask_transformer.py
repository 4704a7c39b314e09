import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from dimo_jax.convert import maskgit
from dimo_jax.models.mask_transformer import MaskTransformer
from dimo_jax.processes.guidance import guided
from dimo_jax.teachers import build_teacher, build_tokenizer
from dimo_jax.types import UserError
from tests.helpers import state_dict, teacher, transformer

ATOL = 5e-5  # of logits: the recording differs from float64 by 9e-6


@pytest.fixture(scope="module")
def io(golden):
  return golden("01_masktransformer_io")


@pytest.fixture(scope="module")
def network(io):
  config = io["config"]
  return MaskTransformer(
    num_tokens=16,
    codebook_size=config["codebook_size"],
    num_classes=config["nclass"],
    hidden_dim=config["hidden_dim"],
    num_layers=config["depth"],
    num_heads=config["heads"],
    mlp_dim=config["mlp_dim"],
  )


@pytest.fixture(scope="module")
def params():
  return jax.device_put(maskgit.from_published(state_dict("01_masktransformer")))


@pytest.fixture(scope="module")
def tokens(io):
  return jnp.asarray(io["tokens"].reshape(4, 16), jnp.int32)


@pytest.fixture(scope="module")
def labels(io):
  return jnp.asarray(io["labels"], jnp.int32)


@pytest.fixture(scope="module")
def dropped_labels(io, labels):
  return jnp.where(io["drop_label"], io["config"]["nclass"], labels)


@pytest.fixture(scope="module")
def apply(network):
  """One compiled function for every call of the same shapes."""
  return jax.jit(lambda params, *args, **draws: network.apply({"params": params}, *args, **draws))


def test_logits(io, apply, params, tokens, labels, dropped_labels):
  logits = apply(params, tokens, dropped_labels)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, io["logits"], rtol=0, atol=ATOL)
  np.testing.assert_allclose(logits, io["logits_f64"], rtol=0, atol=ATOL)
  np.testing.assert_allclose(apply(params, tokens, labels), io["logits_nodrop"], rtol=0, atol=ATOL)


def test_logits_of_perturbed_embeddings(io, apply, params, tokens, dropped_labels):
  # The recording drew noise for the class position too, and discarded it.
  noise, sigma = jnp.asarray(io["noise_full"][:, :16]), io["config"]["noise_emb_perturb"]
  logits = apply(params, tokens, dropped_labels, noise=noise, sigma=sigma)
  errors = [abs(logits - io[name]).max() for name in ("logits_perturbed", "logits")]
  assert errors[0] <= ATOL < 0.1 < errors[1]


@pytest.mark.parametrize(
  ("recorded", "scale", "drop"),
  [
    ("logits_cfg", lambda io: io["config"]["cfg_scalar"], False),
    ("logits_cfg_tensor", lambda io: jnp.asarray(io["cfg_tensor"]), False),
    ("logits_cfg_drop", lambda io: io["config"]["cfg_scalar_drop"], True),
  ],
)
def test_guided_logits(
  io, network, apply, params, tokens, labels, dropped_labels, recorded, scale, drop
):
  null = jnp.full_like(labels, network.num_classes)
  logits = guided(
    lambda x, condition: apply(params, x, condition["class_id"]),
    tokens,
    {"class_id": dropped_labels if drop else labels},
    {"class_id": null},
    scale(io),
  )
  np.testing.assert_allclose(logits, io[recorded], rtol=0, atol=ATOL)


def test_a_scale_of_one_costs_one_conditional_pass():
  seen = []

  def predict(x, condition):
    seen.append(x.shape[0])
    return jnp.ones((x.shape[0], 2, 2)) * condition["class_id"][:, None, None]

  inputs, ones = jnp.zeros((3, 2)), {"class_id": jnp.ones(3, jnp.int32)}
  zeros = {"class_id": jnp.zeros(3, jnp.int32)}
  assert (guided(predict, inputs, ones, zeros, 1.0) == 1).all()
  assert (guided(predict, inputs, ones, zeros, 3.0) == 3).all()
  assert seen == [3, 6]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_gradients(io, network, params, tokens, dropped_labels, scan_layers):
  network = network.clone(scan_layers=scan_layers)
  if scan_layers:
    params = maskgit.stack_blocks(params, network.num_layers)
  cotangent = jnp.asarray(io["cotangent"])

  @jax.jit
  def gradient(params):
    return jax.grad(
      lambda p: (network.apply({"params": p}, tokens, dropped_labels) * cotangent).sum()
    )(params)

  gradients = maskgit.to_published(gradient(params))
  recorded = {key[5:]: value for key, value in io.items() if key.startswith("grad/")}
  assert gradients.keys() == recorded.keys()
  for key, wanted in recorded.items():
    atol = 1e-4 * abs(wanted).max()
    np.testing.assert_allclose(gradients[key], wanted, rtol=1e-4, atol=atol, err_msg=key)


def test_scanned_layers_give_the_same_logits(io, network, tokens, labels):
  scanned = network.clone(scan_layers=True)
  published = state_dict("01_masktransformer")
  params = jax.device_put(maskgit.from_published(published, scan_layers=True))
  made = jax.eval_shape(scanned.init, jax.random.key(0), tokens, labels)["params"]
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
  logits = jax.jit(scanned.apply)({"params": params}, tokens, labels)
  np.testing.assert_allclose(logits, io["logits_nodrop"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_dropout_changes_logits_only_where_it_is_active(scan_layers):
  network = transformer(dropout=0.5, scan_layers=scan_layers)
  tokens, labels = jnp.zeros((2, 9), jnp.int32), jnp.zeros(2, jnp.int32)
  params = jax.jit(network.init)(jax.random.key(0), tokens, labels)["params"]
  state, condition = teacher(network, params), {"class_id": labels}
  quiet = state.predict(tokens, condition)
  np.testing.assert_array_equal(quiet, state.predict(tokens, condition))
  plain = teacher(transformer(scan_layers=scan_layers), params).predict(tokens, condition)
  np.testing.assert_array_equal(quiet, plain)
  noisy = [state.predict(tokens, condition, dropout_key=jax.random.key(i)) for i in (0, 1, 0)]
  assert abs(noisy[0] - quiet).max() > 0.1
  assert abs(noisy[0] - noisy[1]).max() > 0.1
  np.testing.assert_array_equal(noisy[0], noisy[2])


def test_noise_from_a_key_depends_on_sigma(network, apply, params, tokens, labels):
  plain = apply(params, tokens, labels)
  np.testing.assert_array_equal(
    apply(params, tokens, labels, noise=jax.random.key(0), sigma=0.0), plain
  )
  other = apply(params, tokens, labels, noise=jax.random.key(0), sigma=0.5)
  assert abs(other - plain).max() > 0.1


@pytest.mark.parametrize("scan_layers", [False, True])
def test_published_names_round_trip(scan_layers):
  published = state_dict("01_masktransformer")
  ours = maskgit.from_published(published, scan_layers=scan_layers)
  assert ("blocks" in ours) == scan_layers
  back = maskgit.to_published(ours)
  assert back.keys() == published.keys()
  for key, value in published.items():
    assert back[key].flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_missing_and_unexpected_names_are_listed():
  published = state_dict("01_masktransformer")
  del published["tok_emb.weight"], published["transformer.layers.1.1.norm.bias"]
  published["foreign.weight"] = np.zeros(1)
  with pytest.raises(UserError) as error:
    maskgit.from_published(published)
  for name in ("tok_emb.weight", "transformer.layers.1.1.norm.bias", "foreign.weight"):
    assert name in str(error.value)
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="missing keys"):
    maskgit.from_published({})


def test_number_of_parameters_at_full_size():
  config = base.get_config()
  network = build_teacher(config, build_tokenizer(config, None)).network
  shapes = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros((1, 256), jnp.int32), jnp.zeros(1, jnp.int32)
  )
  d, mlp, vocabulary, positions = 768, 3072, 1024 + 1 + 1000 + 1, 256 + 1
  norm, square = 2 * d, d * d + d
  block = norm + 3 * square + square + norm + (d * mlp + mlp) + (mlp * d + d)
  ends = (norm + square + norm + square) + (norm + square + norm)
  embeddings = vocabulary * d + positions * d + positions * vocabulary
  wanted = embeddings + ends + 24 * block
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == wanted
  assert round(wanted / 1e6, 1) == 174.2  # published


def test_bfloat16_compute_keeps_float32_parameters_and_logits(io, network, params, tokens, labels):
  half = network.clone(dtype=jnp.bfloat16)
  logits = jax.jit(half.apply)({"params": params}, tokens, labels)
  assert logits.dtype == jnp.float32
  error = abs(logits - io["logits_nodrop"]).max()
  assert 1e-4 < error < 0.5  # measured 0.1 at a standard deviation of 4
