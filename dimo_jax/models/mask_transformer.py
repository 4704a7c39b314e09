"""The bidirectional transformer of MaskGIT, as published for ImageNet by Besnier and Chen.

One table embeds codes, the mask id, classes and the null class; the output layer is tied to that
table and adds a bias per position. Sources: arXiv:2202.04200, arXiv:2310.14400.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import DTypeLike

from dimo_jax.models.attention import attention, row_matmul
from dimo_jax.models.layers import LayerNorm, gelu
from dimo_jax.models.remat import rematerialised
from dimo_jax.processes.masking import perturb
from dimo_jax.types import Array, Float, Int, Key

# The kernel initialisation of the published network: uniform within 1 / sqrt(fan_in).
_KERNEL_INIT = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# MaskGIT's own; the PyTorch reproduction starts token embeddings at 1, where the tied output layer
# begins with logits of size sqrt(hidden_dim) and small teachers end far worse.
_EMBEDDING_STD = 0.02
_NORM_EPSILON = 1e-5  # inside the blocks
_STEM_NORM_EPSILON = 1e-12  # in the first and last layers


class Block(nn.Module):
  """Pre-norm attention and MLP, each with a residual."""

  num_heads: int
  mlp_dim: int
  dropout: float
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], deterministic: bool
  ) -> tuple[Float[Array, "b n d"], None]:
    """Returns the updated stream, and None for `nn.scan`."""
    dense = functools.partial(
      nn.Dense, dtype=self.dtype, kernel_init=_KERNEL_INIT, dot_general=row_matmul
    )
    norm = functools.partial(LayerNorm, _NORM_EPSILON, self.dtype)
    dropout = functools.partial(nn.Dropout, self.dropout, deterministic=deterministic)
    b, n, d = x.shape

    y = norm(name="attention_norm")(x)
    qkv = dense(3 * d, kernel_init=initializers.xavier_uniform(), name="attention_qkv")(y)
    # Split, not indexed: the gradient is then one concatenation.
    query, key, value = (x.reshape(b, n, self.num_heads, -1) for x in jnp.split(qkv, 3, axis=-1))
    if deterministic or self.dropout == 0:
      y = attention(query, key, value)
    else:  # dropout on the attention weights, as torch's multi-head attention has it
      y = nn.dot_product_attention(
        query,
        key,
        value,
        dropout_rate=self.dropout,
        dropout_rng=self.make_rng("dropout"),
        broadcast_dropout=False,
        deterministic=False,
      )
    x = x + dense(d, name="attention_out")(y.reshape(b, n, d))

    y = norm(name="mlp_norm")(x)
    y = dropout()(gelu(dense(self.mlp_dim, name="mlp_in")(y)))
    return x + dropout()(dense(d, name="mlp_out")(y)), None


class MaskTransformer(nn.Module):
  """Logits of every token of a partly masked grid, given a class.

  Token ids: codes 0 .. codebook_size - 1, then the mask id `codebook_size`. Class ids: 0 ..
  num_classes - 1, then the null class `num_classes`. Logits cover codes and the mask id.

  Attributes:
    num_tokens: tokens in the grid, row-major.
    dropout: rate on activations and attention weights when not deterministic.
    scan_layers: run the blocks by `nn.scan` over stacked parameters (compile time independent of
      depth) instead of one after the other.
    remat: what the blocks keep for the backward pass, one of REMAT.
    dtype: compute dtype; parameters and logits are float32.
  """

  num_tokens: int
  codebook_size: int
  num_classes: int
  hidden_dim: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  dropout: float = 0.0
  scan_layers: bool = False
  remat: str = "none"
  dtype: DTypeLike = jnp.float32

  @property
  def forward_flops(self) -> int:
    """Floating-point operations of one sample's forward pass, matrix products only."""
    d, n, num_outputs = self.hidden_dim, self.num_tokens + 1, self.codebook_size + 1
    block = 2 * n * (4 * d * d + 2 * d * self.mlp_dim) + 4 * n * n * d
    stem = 2 * n * 2 * d * d
    head = 2 * self.num_tokens * (d * d + d * num_outputs)
    return self.num_layers * block + stem + head

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "b l"],
    class_id: Int[Array, " b"],
    *,
    noise: Float[Array, "b l d"] | Key | None = None,
    sigma: Float[Array, ""] | float = 0.0,
    deterministic: bool = True,
  ) -> Float[Array, "b l v"]:
    """Applies the network.

    Args:
      tokens: codes or the mask id.
      class_id: class, or `num_classes` for the null class.
      noise: standard normal perturbation of the image tokens' embeddings, or the key to draw it
        with, or None for none.
      sigma: strength of the perturbation in [0, 1].
      deterministic: dropout off.
    """
    d, table_size = self.hidden_dim, self.codebook_size + 1 + self.num_classes + 1
    dense = functools.partial(
      nn.Dense, d, dtype=self.dtype, kernel_init=_KERNEL_INIT, dot_general=row_matmul
    )
    norm = functools.partial(LayerNorm, _STEM_NORM_EPSILON, self.dtype)
    dropout = functools.partial(nn.Dropout, self.dropout, deterministic=deterministic)
    embedding_init = initializers.truncated_normal(_EMBEDDING_STD)
    table = self.param("token_embedding", embedding_init, (table_size, d))
    position = self.param("position_embedding", embedding_init, (self.num_tokens + 1, d))
    bias = self.param("output_bias", initializers.zeros, (self.num_tokens + 1, table_size))

    image = table[tokens]
    if noise is not None:
      if jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
        noise = jax.random.normal(noise, image.shape, image.dtype)
      image = perturb(image, noise, sigma)
    label = table[self.codebook_size + 1 + class_id][:, None]
    x = (jnp.concatenate([image, label], axis=1) + position).astype(self.dtype)

    x = dropout()(norm(name="first_norm_1")(x))
    x = gelu(dense(name="first_dense_1")(x))
    x = dropout()(norm(name="first_norm_2")(x))
    x = dense(name="first_dense_2")(x)

    kind = rematerialised(Block, self.remat, 2, in_scan=self.scan_layers)
    block = functools.partial(
      kind, num_heads=self.num_heads, mlp_dim=self.mlp_dim, dropout=self.dropout, dtype=self.dtype
    )
    if self.scan_layers:
      stack = nn.scan(
        kind,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=self.num_layers,
      )
      x, _ = stack(**block.keywords, name="blocks")(x, deterministic)
    else:
      for i in range(self.num_layers):
        x, _ = block(name=f"block_{i}")(x, deterministic)

    x = x[:, : self.num_tokens]  # the class position has no output
    x = dropout()(norm(name="last_norm_1")(x))
    x = gelu(dense(name="last_dense")(x))
    x = norm(name="last_norm_2")(x)
    num_outputs = self.codebook_size + 1
    logits = jnp.einsum(
      "bld,vd->blv",
      x,
      table[:num_outputs].astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    return logits + bias[: self.num_tokens, :num_outputs]
