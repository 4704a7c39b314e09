"""Denoising losses: the teacher's pre-training and the fake score's training.

Sources: MaskGIT (arXiv:2202.04200); its PyTorch reproduction (arXiv:2310.14400) trains on all
positions with Bernoulli masks, Di[M]O's fake score on masked positions with exact counts. Gaussian:
EDM (arXiv:2206.00364), DMD2 (arXiv:2405.14867).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from dimo_jax.processes import gaussian, masking
from dimo_jax.processes.guidance import drop_condition
from dimo_jax.state import NetworkState
from dimo_jax.types import (
  Array,
  Batch,
  Bool,
  Condition,
  Float,
  Int,
  Key,
  Metrics,
  Params,
  UserError,
  choose,
)


def masked_mean(values: Float[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, ""]:
  """Mean over the masked positions of the batch."""
  return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def cross_entropy(
  logits: Float[Array, "b l v"], tokens: Int[Array, "b l"], label_smoothing: float
) -> Float[Array, "b l"]:
  """Cross-entropy per token in nats; the smoothing's mass is spread over all outputs."""
  log_probability = jax.nn.log_softmax(logits.astype(jnp.float32))
  hard = -jnp.take_along_axis(log_probability, tokens[..., None], axis=-1)[..., 0]
  smooth = -jnp.mean(log_probability, axis=-1)
  return (1 - label_smoothing) * hard + label_smoothing * smooth


def soft_cross_entropy(
  logits: Float[Array, "b l v"], target_logits: Float[Array, "b l v"], temperature: float
) -> Float[Array, "b l"]:
  """`T^2 KL(target || model)` at temperature T, averaged over the vocabulary, as Di[M]O has it."""
  target = jax.nn.log_softmax(target_logits.astype(jnp.float32) / temperature)
  model = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
  return temperature**2 * jnp.mean(jnp.exp(target) * (target - model), axis=-1)


def weighted_error(
  prediction: Float[Array, "b h w c"], x0: Float[Array, "b h w c"], weight: Float[Array, " b"]
) -> Float[Array, ""]:
  """Mean of `weight (prediction - x0)^2` over batch and pixels, in float32."""
  error = jnp.square(prediction.astype(jnp.float32) - x0.astype(jnp.float32))
  return jnp.mean(gaussian.per_sample(weight, error) * error)


class PretrainDraws(struct.PyTreeNode):
  """Every random number of one pre-training update of a masked teacher."""

  mask_u: Float[Array, " b"]  # uniform on [0, 1): decides the mask ratio
  mask_order: Float[Array, "b l"]  # uniform on [0, 1): decides the positions
  drop_u: Float[Array, " b"]  # uniform on [0, 1): decides who loses the condition
  dropout_key: Key


@dataclasses.dataclass(frozen=True)
class MaskedDenoising:
  """Pre-training of a masked teacher; fields as in `configs/base.py` under `teacher.pretrain`."""

  num_tokens: int
  mask_token_id: int
  mask_schedule: str
  mask_kind: str
  loss_positions: str
  label_smoothing: float
  condition_drop_rate: float
  dropout: bool

  def __post_init__(self):
    choose(masking.MASK_SCHEDULES, self.mask_schedule, "teacher.pretrain.mask_schedule")
    if self.mask_kind not in ("exact", "bernoulli"):
      raise UserError(
        f"teacher.pretrain.mask_kind={self.mask_kind!r} is unknown; known: exact, bernoulli"
      )
    if self.loss_positions not in ("masked", "all"):
      raise UserError(
        f"teacher.pretrain.loss_positions={self.loss_positions!r} is unknown; known: masked, all"
      )
    for name in ("label_smoothing", "condition_drop_rate"):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(f"teacher.pretrain.{name}={getattr(self, name)} must lie in [0, 1)")

  def draw(self, key: Key, batch_size: int) -> PretrainDraws:
    """Draws for one update."""
    u_key, order_key, drop_key, dropout_key = jax.random.split(key, 4)
    return PretrainDraws(
      mask_u=jax.random.uniform(u_key, (batch_size,)),
      mask_order=jax.random.uniform(order_key, (batch_size, self.num_tokens)),
      drop_u=jax.random.uniform(drop_key, (batch_size,)),
      dropout_key=dropout_key,
    )

  def loss(
    self,
    params: Params,
    network: NetworkState,
    tokens: Int[Array, "b l"],
    batch: Batch,
    draws: PretrainDraws,
  ) -> tuple[Float[Array, ""], Metrics]:
    """Masked cross-entropy and its metrics; deterministic given the draws."""
    ratio = masking.mask_ratio(draws.mask_u, self.mask_schedule)
    if self.mask_kind == "exact":
      mask = masking.exact_mask(draws.mask_order, masking.num_masked(ratio, self.num_tokens))
    else:
      mask = draws.mask_order < ratio[:, None]
    inputs = masking.corrupt(tokens, mask, self.mask_token_id)
    given: Condition = {"class_id": batch["class_id"]}
    condition = drop_condition(
      given, network.null_fn(given), draws.drop_u, self.condition_drop_rate
    )
    dropout = {"dropout_key": draws.dropout_key} if self.dropout else {}
    logits = network.replace(params=params).predict(inputs, condition, **dropout)
    counted = mask if self.loss_positions == "masked" else jnp.ones_like(mask)
    loss = masked_mean(cross_entropy(logits, tokens, self.label_smoothing), counted)
    correct = (jnp.argmax(logits, axis=-1) == tokens).astype(jnp.float32)
    return loss, {"teacher/loss": loss, "teacher/token_accuracy": masked_mean(correct, mask)}


class GaussianPretrainDraws(struct.PyTreeNode):
  """Every random number of one pre-training update of a Gaussian teacher."""

  sigma: Float[Array, " b"]
  noise: Float[Array, "b h w c"]  # standard normal
  drop_u: Float[Array, " b"]  # uniform on [0, 1): decides who loses the condition
  dropout_key: Key


@dataclasses.dataclass(frozen=True)
class GaussianDenoising:
  """Pre-training of a Gaussian teacher; fields as in `configs/base.py` under `teacher.pretrain`.

  Attributes:
    noise_levels: "log_normal" (EDM: `ln sigma ~ N(noise_mean, noise_std^2)`) or "table" (uniform
      over the process's levels, as DDPM).
  """

  process: gaussian.GaussianProcess
  image_shape: tuple[int, int, int]
  noise_levels: str
  noise_mean: float
  noise_std: float
  condition_drop_rate: float
  dropout: bool

  def __post_init__(self):
    if self.noise_levels not in ("log_normal", "table"):
      raise UserError(
        f"teacher.pretrain.noise_levels={self.noise_levels!r} is unknown; known: log_normal, table"
      )
    if self.noise_std <= 0:
      raise UserError(f"teacher.pretrain.noise_std={self.noise_std} must be positive")
    if not 0 <= self.condition_drop_rate < 1:
      raise UserError(
        f"teacher.pretrain.condition_drop_rate={self.condition_drop_rate} must lie in [0, 1)"
      )

  def draw(self, key: Key, batch_size: int) -> GaussianPretrainDraws:
    """Draws for one update."""
    level_key, noise_key, drop_key, dropout_key = jax.random.split(key, 4)
    if self.noise_levels == "log_normal":
      normal = jax.random.normal(level_key, (batch_size,))
      sigma = gaussian.log_normal_sigma(normal, self.noise_mean, self.noise_std)
    else:
      index = jax.random.randint(level_key, (batch_size,), 0, self.process.num_levels)
      sigma = jnp.asarray(self.process.sigmas())[index]
    return GaussianPretrainDraws(
      sigma=sigma,
      noise=jax.random.normal(noise_key, (batch_size, *self.image_shape)),
      drop_u=jax.random.uniform(drop_key, (batch_size,)),
      dropout_key=dropout_key,
    )

  def loss(
    self,
    params: Params,
    network: NetworkState,
    x0: Float[Array, "b h w c"],
    batch: Batch,
    draws: GaussianPretrainDraws,
  ) -> tuple[Float[Array, ""], Metrics]:
    """Weighted error of x0 and its metrics; deterministic given the draws."""
    given: Condition = {"class_id": batch["class_id"]}
    condition = drop_condition(
      given, network.null_fn(given), draws.drop_u, self.condition_drop_rate
    )
    dropout = {"dropout_key": draws.dropout_key} if self.dropout else {}
    inputs = gaussian.add_noise(x0, draws.noise, draws.sigma)
    prediction = network.replace(params=params).predict(inputs, condition, **dropout)
    loss = weighted_error(prediction, x0, self.process.loss_weight(draws.sigma))
    error = jnp.sqrt(jnp.mean(jnp.square(prediction - x0)))
    return loss, {"teacher/loss": loss, "teacher/x0_error": error}
