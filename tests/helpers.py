"""Small networks, objectives and published weights that several tests share."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from configs import base
from dimo_jax.models.mask_transformer import MaskTransformer
from dimo_jax.objectives.dimo import Dimo
from dimo_jax.processes.masking import perturb
from dimo_jax.state import NetworkState
from dimo_jax.teachers.maskgit import MaskedTeacher

_NO_UPDATE = optax.set_to_zero()  # one object, so that jitted functions know it again
GOLDEN = pathlib.Path(__file__).parent / "golden"

# The toy problem: 9 tokens of 5 codes and the mask id, 3 classes and the null class.
NUM_TOKENS, CODEBOOK_SIZE, NUM_CLASSES = 9, 5, 3


def state_dict(name: str, prefix: str = "") -> dict[str, np.ndarray]:
  """The tensors of tests/golden/<name>.safetensors under a prefix, which is cut off."""
  tensors = load_file(GOLDEN / f"{name}.safetensors")
  return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def transformer(**options: Any) -> MaskTransformer:
  """A MaskTransformer for the toy problem."""
  defaults = {
    "num_tokens": NUM_TOKENS,
    "codebook_size": CODEBOOK_SIZE,
    "num_classes": NUM_CLASSES,
    "hidden_dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_dim": 32,
  }
  return MaskTransformer(**defaults | options)


def teacher(network: MaskTransformer, params: Any) -> NetworkState:
  """The network as a frozen teacher, without a tokenizer."""
  return MaskedTeacher(network).frozen_state(params, {})


def toy_apply(params, tokens, condition, *, noise=None, sigma=0.0, dropout_key=None):
  """A network that compiles fast and still depends on every input that a network has."""
  x = params["table"][tokens]
  if noise is not None:
    if jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
      noise = jax.random.normal(noise, x.shape)
    x = perturb(x, noise, sigma)
  x = x + params["classes"][condition["class_id"]][:, None]
  x = jnp.tanh(x + jnp.cumsum(x, axis=1) / 4)
  if dropout_key is not None:
    x = x * jax.random.bernoulli(dropout_key, 0.5, x.shape)
  return x @ params["out"]


def toy_params(seed: int, scale: float = 1.0) -> dict[str, jax.Array]:
  """Random parameters of `toy_apply`."""
  rng = np.random.default_rng(seed)
  shapes = {
    "table": (CODEBOOK_SIZE + 1, 8),
    "classes": (NUM_CLASSES + 1, 8),
    "out": (8, CODEBOOK_SIZE + 1),
  }
  return {
    name: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)
    for name, shape in shapes.items()
  }


def toy_null(condition):
  """The null class for every sample."""
  return {"class_id": jnp.full_like(condition["class_id"], NUM_CLASSES)}


def toy_state(seed: int, tx: Any = None, apply_fn: Any = toy_apply) -> NetworkState:
  """A toy network's state; without an optimiser it is a teacher's."""
  return NetworkState.create(
    apply_fn=apply_fn,
    params=toy_params(seed),
    tx=_NO_UPDATE if tx is None else tx,
    null_fn=toy_null,
  )


def dimo_fields(**options: Any) -> dict[str, Any]:
  """Fields of Dimo for the toy problem: the published defaults, changed by `options`."""
  grid = {"num_tokens": NUM_TOKENS, "codebook_size": CODEBOOK_SIZE, "mask_token_id": CODEBOOK_SIZE}
  return grid | base.get_config().dimo.to_dict() | options


def dimo(**options: Any) -> Dimo:
  """The objective on the toy problem."""
  return Dimo(**dimo_fields(**options))
