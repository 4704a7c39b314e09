"""Dense products and attention whose gradients XLA's CPU backend compiles well.

Left to automatic differentiation, that backend recomputes the residual stream's gradient in the
transposition of every layer, and the softmax in every product of attention's backward pass. On two
CPU cores the written-out gradients halve the time of a training step at 8 layers, 256 wide, 257
tokens (`python -m dimo_jax.benchmark --config=configs/benchmark.py`); values differ by rounding.
"""

import jax
import jax.numpy as jnp

from dimo_jax.types import Array, Float


@jax.custom_vjp
def _matmul(x: Float[Array, "*n d"], kernel: Float[Array, "d e"]) -> Float[Array, "*n e"]:
  return x @ kernel


def _matmul_forward(x, kernel):
  return x @ kernel, (x, kernel)


def _matmul_backward(residuals, gradient):
  x, kernel = residuals
  d, e = kernel.shape
  return gradient @ kernel.T, x.reshape(-1, d).T @ gradient.reshape(-1, e)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def row_matmul(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
  """For `nn.Dense(dot_general=...)`: the kernel's gradient transposes the saved input, not `g`."""
  del dimension_numbers, precision, preferred_element_type  # nn.Dense's are the plain ones
  return _matmul(x, kernel)


@jax.custom_vjp
def _attention(query, key, value):
  return _attention_forward(query, key, value)[0]


def _attention_forward(query, key, value):
  # Nothing but the exponential touches all pairs twice: the scale goes to the query, the
  # normalisation to the output.
  dtype = query.dtype
  query = query * query.shape[-1] ** -0.5
  scores = jnp.matmul(query, key.swapaxes(-1, -2), preferred_element_type=jnp.float32)
  weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  weights = weights.astype(dtype)
  output = jnp.matmul(weights, value, preferred_element_type=jnp.float32) / total
  return output.astype(dtype), (query, key, value, weights, total, output)


def _attention_backward(residuals, gradient):
  query, key, value, weights, total, output = residuals  # the query scaled, the weights not
  dtype = query.dtype
  # What softmax's gradient subtracts: the mean of d_weights by the weights.
  mean = jnp.sum(gradient * output, axis=-1, keepdims=True) / total
  transposed = (gradient.swapaxes(-1, -2) / total.swapaxes(-1, -2)).astype(dtype)
  gradient = (gradient / total).astype(dtype)
  d_weights = jnp.matmul(gradient, value.swapaxes(-1, -2), preferred_element_type=jnp.float32)
  d_scores = (weights * (d_weights - mean)).astype(dtype)
  d_query = (d_scores @ key) * query.shape[-1] ** -0.5
  d_key = (query.swapaxes(-1, -2) @ d_scores).swapaxes(-1, -2)
  d_value = (transposed @ weights).swapaxes(-1, -2)
  return d_query, d_key, d_value


_attention.defvjp(_attention_forward, _attention_backward)


def attention(
  query: Float[Array, "b n h d"], key: Float[Array, "b n h d"], value: Float[Array, "b n h d"]
) -> Float[Array, "b n h d"]:
  """Scaled dot-product attention over all positions, softmax in float32."""
  query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
  return _attention(query, key, value).swapaxes(1, 2)
