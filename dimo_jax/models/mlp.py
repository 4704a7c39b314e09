"""A small network for tiny images, where convolutions cost more than they give on a CPU."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import DTypeLike

from dimo_jax.models.attention import row_matmul
from dimo_jax.models.unet import check_size, positional_embedding
from dimo_jax.types import Array, Float


class DenoisingMLP(nn.Module):
  """A residual MLP on the flattened image, conditioned as the U-Nets are.

  The first half of its blocks is the encoder; its bottleneck has one position, [b, 1, 1,
  hidden_dim].

  Attributes:
    img_resolution: height and width of the image.
    img_channels: channels of input and output.
    label_dim: classes; 0 for an unconditional network.
    augment_dim: length of the augmentation labels; 0 for none.
    hidden_dim: width of the residual stream and of the embedding.
    num_blocks: residual blocks of two layers each.
    dropout: rate inside the blocks when not deterministic.
    dtype: compute dtype; parameters, embeddings and statistics are float32.
  """

  img_resolution: int
  img_channels: int = 1
  label_dim: int = 0
  augment_dim: int = 0
  hidden_dim: int = 256
  num_blocks: int = 4
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w c"],
    noise_label: Float[Array, " b"],
    class_labels: Float[Array, "b k"],
    augment_labels: Float[Array, "b a"] | None = None,
    *,
    decode: bool = True,
    deterministic: bool = True,
  ) -> tuple[Float[Array, "b h w c"] | None, Float[Array, "b 1 1 d"]]:
    """The prediction (None unless `decode`) and the encoder's output; arguments as ADM's."""
    check_size(x, self.img_resolution, self.img_channels)
    shape, d = x.shape, self.hidden_dim
    dense = functools.partial(nn.Dense, dot_general=row_matmul)
    emb = positional_embedding(noise_label, d)
    if self.augment_dim and augment_labels is not None:
      emb = emb + dense(d, use_bias=False, name="map_augment")(augment_labels)
    emb = dense(d, name="map_layer1")(nn.silu(dense(d, name="map_layer0")(emb)))
    if self.label_dim:
      init: dict[str, Any] = {"use_bias": False, "kernel_init": initializers.normal(1.0)}
      emb = emb + dense(d, **init, name="map_label")(class_labels)
    emb = nn.silu(emb)

    dense = functools.partial(dense, dtype=self.dtype)
    norm = functools.partial(nn.LayerNorm, use_fast_variance=False, dtype=self.dtype)
    num_encoder = self.num_blocks // 2
    x = bottleneck = dense(d, name="enc_in")(x.reshape(len(x), -1))
    for i in range(self.num_blocks):
      encoding = i < num_encoder
      name = f"enc_block{i}" if encoding else f"dec_block{i - num_encoder}"
      if i == num_encoder and not decode:
        break
      scale, shift = jnp.split(
        nn.Dense(2 * d, name=f"{name}_affine")(emb).astype(self.dtype), 2, axis=-1
      )
      y = norm(name=f"{name}_norm")(dense(d, name=f"{name}_dense0")(x))
      y = nn.silu(y * (1 + scale) + shift)
      y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
      x = x + dense(d, name=f"{name}_dense1")(y)
      bottleneck = x if encoding else bottleneck
    bottleneck = bottleneck[:, None, None]
    if not decode:
      return None, bottleneck
    size = shape[1] * shape[2] * shape[3]
    x = dense(size, kernel_init=initializers.zeros, name="dec_out")(norm(name="dec_norm")(x))
    return x.reshape(shape), bottleneck
