"""GELU and layer norm with written-out gradients.

Left to automatic differentiation, XLA's CPU backend keeps several arrays of the size of the
activations for each of them, and computes the complementary error function where the error function
will do. On accelerators the formulas fuse as well as the derived ones.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import DTypeLike

from dimo_jax.types import Array, Float


def _normal_cdf(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
  return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


@jax.custom_vjp
def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
  """`x Phi(x)`, Phi being the normal distribution function: the exact GELU."""
  return x * _normal_cdf(x)


def _gelu_forward(x):
  return gelu(x), x


def _gelu_backward(x, gradient):
  density = jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5
  return (gradient * (_normal_cdf(x) + x * density),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x, scale, bias, epsilon):
  return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
  mean = jnp.mean(x, axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + epsilon)
  return (x - mean) * inverse * scale + bias, (x, mean, inverse, scale)


def _layer_norm_backward(epsilon, residuals, gradient):
  del epsilon
  x, mean, inverse, scale = residuals
  normal, scaled = (x - mean) * inverse, gradient * scale
  shared = jnp.mean(scaled, axis=-1, keepdims=True)
  along = jnp.mean(scaled * normal, axis=-1, keepdims=True)
  rows = tuple(range(x.ndim - 1))
  return (
    inverse * (scaled - shared - normal * along),
    jnp.sum(gradient * normal, axis=rows),
    jnp.sum(gradient, axis=rows),
  )


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
  """Normalises the last axis: linen's parameters, float32 inside, returned in `dtype`."""

  epsilon: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """The normalised array, scaled and shifted."""
    d = x.shape[-1]
    scale = self.param("scale", initializers.ones, (d,))
    bias = self.param("bias", initializers.zeros, (d,))
    return _layer_norm(x.astype(jnp.float32), scale, bias, self.epsilon).astype(self.dtype)
