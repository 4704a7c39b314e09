"""The continuous teacher: a denoiser of images (or latents) with its Gaussian process."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp

from dimo_jax.models.edm import EDMPrecond, Output, VPPrecond
from dimo_jax.models.remat import REMAT
from dimo_jax.processes.gaussian import GaussianProcess, Noised
from dimo_jax.teachers.network import GaussianNetwork
from dimo_jax.types import Array, Condition, Key, Params, UserError, choose

# Of the denoisers' fields, those that count something; each has some of them.
_SIZES = (
  "model_channels",
  "channel_mult_emb",
  "channel_mult_noise",
  "channels_per_head",
  "num_blocks",
  "hidden_dim",
)


@dataclasses.dataclass(frozen=True)
class GaussianTeacher(GaussianNetwork):
  """Network and process of a continuous teacher; parameters live in train states."""

  network: EDMPrecond | VPPrecond
  process: GaussianProcess

  def __post_init__(self):
    model = self.network.model
    for name in _SIZES:
      if getattr(model, name, 1) < 1:
        raise UserError(f"denoiser.{name}={getattr(model, name)} must be 1 or more")
    choose(dict.fromkeys(REMAT), getattr(model, "remat", "none"), "denoiser.remat")
    if model.augment_dim < 0:
      raise UserError(f"denoiser.augment_dim={model.augment_dim} must not be negative; 0 is none")
    if not 0 <= model.dropout < 1:
      raise UserError(f"denoiser.dropout={model.dropout} must lie in [0, 1)")

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of what it denoises."""
    model = self.network.model
    return model.img_resolution, model.img_resolution, model.img_channels

  @property
  def null_class(self) -> int:
    """The class id that stands for none: the first after the classes."""
    return self.network.model.label_dim

  def init(self, key: Key) -> Params:
    """Random parameters."""
    # Hundreds of initialisers compile several times faster with this generator.
    key = jax.random.wrap_key_data(jax.random.bits(key, (4,)), impl="unsafe_rbg")
    augment_dim = self.network.model.augment_dim
    arguments = (
      jnp.zeros((1, *self.image_shape)),
      jnp.ones(1),
      jnp.zeros(1, jnp.int32),
      jnp.zeros((1, augment_dim)) if augment_dim else None,
    )
    return jax.jit(self.network.init)(key, *arguments)["params"]

  def apply(
    self,
    params: Params,
    inputs: Noised,
    condition: Condition,
    *,
    output: Output = "x0",
    dropout_key: Key | None = None,
  ) -> Array:
    """x0, or the bottleneck's features, or both; dropout is active where its key is given."""
    denoised = self.network.apply(
      {"params": params},
      inputs.xt,
      inputs.sigma,
      condition["class_id"],
      output=output,
      deterministic=dropout_key is None,
      rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return cast(Array, denoised)  # not (output, state): nothing is mutable
