"""Optimisers whose learning rate follows an explicit clock, and the moving average's rate."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from dimo_jax.types import Array, Float, Int, UserError


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
  """One optimiser, as `configs/base.py` describes it under `optim`."""

  name: str  # "adam" or "adamw"
  learning_rate: float
  b1: float
  b2: float
  eps: float
  weight_decay: float  # AdamW only
  clip_norm: float  # global norm; 0 turns clipping off
  schedule: str  # "constant" or "cosine"
  num_warmup: int  # updates of linear warm-up from 0
  final_fraction: float  # of the learning rate, where a cosine ends
  mean_dtype: str = "float32"  # of Adam's mean: or "bfloat16"

  def learning_rate_fn(self, num_updates: int) -> optax.Schedule:
    """The learning rate as a function of the clock, over `num_updates` of it."""
    start = 0.0 if self.num_warmup else self.learning_rate
    if self.schedule == "constant":
      return optax.warmup_constant_schedule(start, self.learning_rate, self.num_warmup)
    return optax.warmup_cosine_decay_schedule(
      start,
      self.learning_rate,
      self.num_warmup,
      num_updates,
      self.final_fraction * self.learning_rate,
    )

  def check(self, num_updates: int, field: str) -> None:
    """Raises UserError where a value cannot work; `field` is the config section's name."""
    if self.name not in ("adam", "adamw"):
      raise UserError(f"{field}.name={self.name!r} is unknown; known: adam, adamw")
    if self.schedule not in ("constant", "cosine"):
      raise UserError(f"{field}.schedule={self.schedule!r} is unknown; known: constant, cosine")
    if self.name == "adam" and self.weight_decay:
      raise UserError(
        f"{field}.weight_decay={self.weight_decay} has no effect with {field}.name='adam';"
        " use 'adamw' or 0"
      )
    if self.mean_dtype not in ("float32", "bfloat16"):
      raise UserError(
        f"{field}.mean_dtype={self.mean_dtype!r} is unknown; known: float32, bfloat16"
      )
    if not 0 < self.learning_rate < 1:
      raise UserError(f"{field}.learning_rate={self.learning_rate} must lie in (0, 1)")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(f"{field}.{name}={getattr(self, name)} must lie in [0, 1)")
    if not 0 <= self.final_fraction <= 1:
      raise UserError(f"{field}.final_fraction={self.final_fraction} must lie in [0, 1]")
    for name in ("clip_norm", "weight_decay", "num_warmup"):
      if getattr(self, name) < 0:
        raise UserError(f"{field}.{name}={getattr(self, name)} must not be negative; 0 is off")
    if self.eps <= 0:
      raise UserError(f"{field}.eps={self.eps} must be positive")
    if self.schedule == "cosine" and self.num_warmup >= num_updates:
      raise UserError(
        f"{field}.num_warmup={self.num_warmup} must be below the {num_updates} updates of the run"
      )

  def build(self, num_updates: int) -> optax.GradientTransformationExtraArgs:
    """Clip, Adam, decay, then the learning rate at the clock given to `update`.

    Di[M]O's release replaces NaN gradients by 0 and infinite ones by 1e5; here such an update is
    skipped (`NetworkState.apply_gradients`).
    """
    parts = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
    parts.append(optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.mean_dtype))
    if self.name == "adamw":
      parts.append(optax.add_decayed_weights(self.weight_decay))
    return optax.chain(*parts, scale_by_clock(self.learning_rate_fn(num_updates)))


def scale_by_clock(learning_rate_fn: optax.Schedule) -> optax.GradientTransformationExtraArgs:
  """Descends with the learning rate at `clock`, an extra argument of `update`.

  Both methods' schedules advance on fake-score updates, also where the generator rests, so the
  optimiser's own count would be the wrong clock.
  """

  def update(updates, state, params=None, *, clock, **_):
    del params
    rate = learning_rate_fn(clock)
    return jax.tree.map(lambda u: -rate * u, updates), state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def ema_rate(decay: float, num_updates: Int[Array, ""] | int) -> Float[Array, ""]:
  """Rate of the moving average: `min(decay, (1 + k) / (10 + k))`, so 0.1 at the first update."""
  k = jnp.asarray(num_updates, jnp.float32)
  return jnp.minimum(decay, (1 + k) / (10 + k))
