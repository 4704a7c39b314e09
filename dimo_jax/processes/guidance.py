"""Classifier-free guidance: one function over any network and any kind of condition."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dimo_jax.types import Array, Condition, Float

# Maps (inputs, condition) to outputs; parameters and everything else are bound already.
PredictFn = Callable[[Any, Condition], Array]


def drop_condition(
  condition: Condition, null_condition: Condition, u: Float[Array, " b"], rate: float
) -> Condition:
  """The condition, or no condition where the uniform `u` lies below `rate`: a network trained so
  knows both sides of its guidance.
  """
  dropped = u < rate
  return jax.tree.map(lambda c, null: jnp.where(dropped, null, c), condition, null_condition)


def guided(
  predict_fn: PredictFn,
  inputs: Any,
  condition: Condition,
  null_condition: Condition,
  scale: float | Float[Array, ""] | Float[Array, " b"],
) -> Array:
  """`u + scale (c - u)` in float32, by one forward pass over the doubled batch, in which a sample's
  two sides stay together: a batch that is split over devices needs no communication.

  A static scale of 1 means no guidance and costs one conditional pass. A traced or per-sample
  scale always takes both passes. Source: Ho and Salimans, arXiv:2207.12598.

  Args:
    inputs: token grids, or noisy images with their levels: a tree of [b, ...] arrays.
    condition: a tree of [b, ...] arrays.
    null_condition: another of the same structure.
    scale: guidance scale, one number or one per sample.
  """
  if isinstance(scale, int | float) and scale == 1:
    return predict_fn(inputs, condition).astype(jnp.float32)
  both = jax.tree.map(_interleaved, condition, null_condition)
  doubled = jax.tree.map(lambda x: _interleaved(x, x), inputs)
  outputs = predict_fn(doubled, both).astype(jnp.float32)
  outputs = outputs.reshape(-1, 2, *outputs.shape[1:])
  conditional, unconditional = outputs[:, 0], outputs[:, 1]
  scale = jnp.asarray(scale, jnp.float32)
  scale = scale.reshape(scale.shape + (1,) * (conditional.ndim - scale.ndim))
  return unconditional + scale * (conditional - unconditional)


def _interleaved(one: Array, other: Array) -> Array:
  """`one[0], other[0], one[1], other[1], ...` along the first axis."""
  return jnp.stack([one, other], axis=1).reshape(-1, *one.shape[1:])
