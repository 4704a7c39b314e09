"""Rematerialised blocks: the same gradients, fewer arrays kept for the backward pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from configs import debug
from dimo_jax.build import build_models
from dimo_jax.models.remat import REMAT, REMAT_POLICIES
from dimo_jax.models.unet import ADM, SongUNet
from dimo_jax.types import UserError
from tests.helpers import transformer

KEY = jax.random.key(0)
UNET = {
  "img_resolution": 4,
  "label_dim": 3,
  "model_channels": 16,
  "channel_mult": (1,),
  "num_blocks": 1,
  "attn_resolutions": (4,),
  "dropout": 0.5,
}


def arguments(network):
  labels = jnp.asarray([0, 2])
  if isinstance(network, ADM | SongUNet):
    image = jax.random.normal(KEY, (2, 4, 4, 3))
    return image, jnp.asarray([0.1, 0.7]), jax.nn.one_hot(labels, 3)
  return jnp.arange(18).reshape(2, 9) % 6, labels


def loss(network, params):
  """Of an output that depends on every layer, dropout on."""
  rngs = {"dropout": jax.random.key(1)}
  outputs = network.apply({"params": params}, *arguments(network), deterministic=False, rngs=rngs)
  return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))


@functools.cache
def parameters(network):
  """Random, the layers that start at zero too."""
  shapes = jax.eval_shape(network.init, KEY, *arguments(network))["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), shapes)


@functools.cache
def gradient(network):
  return jax.jit(jax.grad(functools.partial(loss, network)))(parameters(network))


def kept(network):
  """Bytes kept for the backward pass."""
  vjp = lambda params: jax.vjp(functools.partial(loss, network), params)[1]  # noqa: E731
  jaxpr = jax.make_jaxpr(vjp)(parameters(network)).jaxpr
  values = {v for v in jaxpr.outvars if isinstance(v, core.Var)} - set(jaxpr.invars)
  return sum(v.aval.size * v.aval.dtype.itemsize for v in values)


def assert_same(one, other):
  largest = max(np.abs(x).max() for x in jax.tree.leaves(other))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize(
  ("remat", "scan_layers"), [*((name, True) for name in REMAT_POLICIES), ("full", False)]
)
def test_the_transformers_gradients_are_the_same(remat, scan_layers):
  options = {"num_layers": 2, "dropout": 0.5, "scan_layers": scan_layers}
  plain, network = (transformer(remat=name, **options) for name in ("none", remat))
  assert jax.tree.structure(parameters(plain)) == jax.tree.structure(parameters(network))
  assert_same(gradient(network), gradient(plain))


def test_less_is_kept_of_the_transformers_blocks():
  options = {"num_layers": 3, "scan_layers": True}
  sizes = {name: kept(transformer(remat=name, **options)) for name in REMAT}
  order = ("full", "dots_with_no_batch_dims_saveable", "dots_saveable", "none")
  for smaller, larger in itertools.pairwise(order):
    assert sizes[smaller] < sizes[larger], sizes


def test_a_deeper_stack_keeps_only_the_inputs_of_its_blocks():
  shallow, deep = (
    kept(transformer(remat="full", num_layers=depth, scan_layers=True)) for depth in (4, 9)
  )
  stream = 2 * 10 * 16 * 4  # float32 [b, n, d]
  assert deep - shallow == 5 * stream


def test_the_program_of_scanned_layers_does_not_grow_with_their_number():
  def equations(num_layers, scan_layers):
    network = transformer(num_layers=num_layers, scan_layers=scan_layers)
    step = jax.grad(functools.partial(loss, network))
    text = jax.jit(step).lower(parameters(network)).as_text()
    return text.count(" = ")

  assert equations(8, True) == equations(2, True)
  assert equations(8, False) > 2 * equations(2, False)


@pytest.mark.ci
def test_adm_keeps_less_for_the_same_gradients():
  plain, network = (ADM(**UNET, channels_per_head=8, remat=name) for name in ("none", "full"))
  assert jax.tree.structure(parameters(plain)) == jax.tree.structure(parameters(network))
  assert kept(network) < 0.6 * kept(plain)
  assert_same(gradient(network), gradient(plain))


def test_song_keeps_less():
  plain, network = (SongUNet(**UNET, remat=name) for name in ("none", "full"))
  assert jax.tree.structure(parameters(plain)) == jax.tree.structure(parameters(network))
  assert kept(network) < 0.6 * kept(plain)


@pytest.mark.parametrize(
  ("variant", "section", "fields"),
  [("dimo", "model", {}), ("dmd2", "denoiser", {"name": "adm"})],
)
def test_an_unknown_policy_is_refused(variant, section, fields):
  config = debug.get_config(variant)
  config[section].update(fields, remat="dot_saveable")
  with pytest.raises(UserError, match=rf"{section}\.remat='dot_saveable' is unknown; did you mean"):
    build_models(config, (8, 8, 1))
