"""Small networks, objectives and published weights that several tests share."""

import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from configs import base
from dimo_jax.models.mask_transformer import MaskTransformer
from dimo_jax.objectives.dimo import Dimo
from dimo_jax.objectives.dmd2 import Dmd2
from dimo_jax.processes.gaussian import Edm, per_sample, preconditioning
from dimo_jax.processes.masking import perturb
from dimo_jax.state import NetworkState, copy_tree
from dimo_jax.teachers.maskgit import MaskedTeacher

_NO_UPDATE = optax.set_to_zero()  # one object, so that jitted functions know it again
GOLDEN = pathlib.Path(__file__).parent / "golden"

# The toy problem: 9 tokens of 5 codes and the mask id, 3 classes and the null class.
NUM_TOKENS, CODEBOOK_SIZE, NUM_CLASSES = 9, 5, 3

# The continuous one: images of 3x3 pixels and 2 channels, the same classes.
IMAGE_SHAPE = (3, 3, 2)


def state_dict(name: str, prefix: str = "") -> dict[str, np.ndarray]:
  """The tensors of tests/golden/<name>.safetensors under a prefix, which is cut off."""
  return with_prefix(load_file(GOLDEN / f"{name}.safetensors"), prefix)


def with_prefix(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  """The arrays whose names begin so, without the prefix."""
  return {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The recorded rule for random weights."""
  random = np.random.RandomState(zlib.crc32(name.encode()))
  return random.standard_normal(shape).astype(np.float32)


def perturbed(tensors: dict[str, np.ndarray], tag: str) -> dict[str, np.ndarray]:
  """Other weights than the teacher's: a tenth of each tensor's spread, and a floor."""
  return {
    key: w
    if key.endswith("resample_filter")
    else w + np.float32(0.1 * w.std(dtype=np.float64) + 0.01) * normal(f"{tag}/{key}", w.shape)
    for key, w in tensors.items()
  }


def head_tensors(channels: int = 64) -> dict[str, np.ndarray]:
  """The recorded rule for the critic's weights."""
  shapes = {"0": (channels, channels, 4, 4), "3": (channels, channels, 4, 4)}
  shapes["6"] = (1, channels, 1, 1)
  tensors = {}
  for layer in ("0", "1", "3", "4", "6"):
    shape = shapes.get(layer, (channels,))
    weight = normal(f"cls_pred_branch.{layer}.weight", shape)
    norm = len(shape) == 1
    tensors[f"{layer}.weight"] = (
      1 + np.float32(0.1) * weight if norm else weight / np.float32(np.prod(shape[1:]) ** 0.5)
    )
    tensors[f"{layer}.bias"] = np.float32(0.1) * normal(f"cls_pred_branch.{layer}.bias", shape[:1])
  return tensors


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


def toy_denoise(params, inputs, condition, *, output="x0", dropout_key=None):
  """A denoiser that compiles fast and still depends on every input that a denoiser has."""
  scales = preconditioning(inputs.sigma)
  c_skip, c_out, c_in = (per_sample(c, inputs.xt) for c in scales[:3])
  x = (c_in * inputs.xt) @ params["in"] + params["classes"][condition["class_id"]][:, None, None]
  x = x + per_sample(scales.c_noise, x) * params["level"]
  x = jnp.tanh(x + jnp.mean(x, axis=(1, 2), keepdims=True))
  if dropout_key is not None:
    x = x * jax.random.bernoulli(dropout_key, 0.5, x.shape)
  if output == "bottleneck":
    return x
  x0 = c_skip * inputs.xt + c_out * (x @ params["out"])
  return (x0, x) if output == "both" else x0


def toy_denoiser_params(seed: int) -> dict[str, jax.Array]:
  """Random parameters of `toy_denoise`."""
  rng = np.random.default_rng(seed)
  channels = IMAGE_SHAPE[-1]
  shapes = {
    "in": (channels, 8),
    "classes": (NUM_CLASSES + 1, 8),
    "level": (8,),
    "out": (8, channels),
  }
  return {
    name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()
  }


def toy_denoiser(seed: int, params: Any = None, tx: Any = None) -> NetworkState:
  """A toy denoiser's state; without an optimiser it is a teacher's."""
  return NetworkState.create(
    apply_fn=toy_denoise,
    params=toy_denoiser_params(seed) if params is None else params,
    tx=_NO_UPDATE if tx is None else tx,
    null_fn=toy_null,
  )


def dmd2_fields(**options: Any) -> dict[str, Any]:
  """Fields of Dmd2 for the toy problem: the published defaults, changed by `options`."""
  fields = {"process": Edm(), "image_shape": IMAGE_SHAPE, "num_classes": NUM_CLASSES}
  # The toy's 8 features divide into 4 groups.
  return fields | base.get_config().dmd2.to_dict() | {"critic_groups": 4} | options


def dmd2(**options: Any) -> Dmd2:
  """The objective on the toy problem."""
  return Dmd2(**dmd2_fields(**options))


NO_GAN = {"gan_generator_weight": 0.0, "gan_critic_weight": 0.0}
FOUR_STEPS = (80.0, 24.0, 6.0, 1.0)


# Recorded trainings.

_EXACT = 2e-6  # of a parameter after an update, for 99.9 % of the elements


def keep_history(num_updates: int) -> optax.GradientTransformationExtraArgs:
  """Hands gradients on, and keeps them and the parameters of every update."""

  def init(params):
    empty = jax.tree.map(lambda p: jnp.zeros((num_updates, *p.shape)), params)
    return {
      "count": jnp.zeros((), jnp.int32),
      "gradients": empty,
      "parameters": copy_tree(empty),
    }

  def update(grads, old, params=None, **_):
    def keep(kept, now):
      return jax.tree.map(lambda k, n: k.at[old["count"]].set(n), kept, now)

    return grads, {
      "count": old["count"] + 1,
      "gradients": keep(old["gradients"], grads),
      "parameters": keep(old["parameters"], params),
    }

  return optax.GradientTransformationExtraArgs(init, update)


def check_parameters(
  ours: dict[str, np.ndarray],
  wanted: dict[str, np.ndarray],
  largest: float,
  key_bias: Callable[[str, np.ndarray], np.ndarray | None],
) -> None:
  """99.9 % of the elements of the wanted tensors within 2e-6, all within `largest`.

  Left out, but for twice `largest`: the biases of attention's keys, which `key_bias(name, tensor)`
  marks (None: no such tensor). Softmax does not see them, so their gradient is zero in exact
  arithmetic, and Adam turns its rounding noise into moves of the size of the learning rate, on both
  sides.
  """
  assert wanted
  errors = []
  for name, value in wanted.items():
    error = abs(ours[name] - value)
    assert error.max() <= 2 * largest, (name, error.max())
    marked = key_bias(name, error)
    error = error.ravel() if marked is None else error[~marked]
    assert error.max() <= largest, (name, error.max())
    errors.append(error)
  errors = np.concatenate(errors)
  assert (errors > _EXACT).mean() <= 1e-3, np.sort(errors)[-10:]


# A VQGAN of 8x8 RGB pixels and 4x4 tokens.
VQGAN_SIZES = {
  "channels": 32,
  "channel_mult": (1, 1),
  "num_res_blocks": 1,
  "attn_resolutions": (),
  "z_channels": 8,
  "code_dim": 4,
}
