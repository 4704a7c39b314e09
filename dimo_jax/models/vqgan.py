"""VQGAN: a convolutional encoder, a codebook, a convolutional decoder.

Parameter paths follow the published names: `decoder/up_0_block_1/conv1/kernel`. Source: Esser,
Rombach and Ommer, arXiv:2012.09841, and its release; the defaults are its ImageNet model with
16x16 tokens for 256x256 pixels and 1024 codes.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import DTypeLike

from dimo_jax.models.attention import attention
from dimo_jax.types import Array, Float, Int

NUM_GROUPS = 32  # of every GroupNorm; divides the channels everywhere
_NORM_EPSILON = 1e-6


def _norm(dtype: DTypeLike, name: str) -> nn.GroupNorm:
  return nn.GroupNorm(
    NUM_GROUPS, epsilon=_NORM_EPSILON, use_fast_variance=False, dtype=dtype, name=name
  )


class _ResidualBlock(nn.Module):
  channels: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    conv = functools.partial(nn.Conv, self.channels, dtype=self.dtype)
    y = conv((3, 3), name="conv1")(nn.silu(_norm(self.dtype, "norm1")(x)))
    y = conv((3, 3), name="conv2")(nn.silu(_norm(self.dtype, "norm2")(y)))
    if x.shape[-1] != self.channels:
      x = conv((1, 1), name="nin_shortcut")(x)
    return x + y


class _AttentionBlock(nn.Module):
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    conv = functools.partial(nn.Conv, c, (1, 1), dtype=self.dtype)
    y = _norm(self.dtype, "norm")(x)
    query, key, value = (conv(name=name)(y).reshape(b, h * w, 1, c) for name in "qkv")
    return x + conv(name="proj_out")(attention(query, key, value).reshape(x.shape))


class _Pyramid(nn.Module):
  """What encoder and decoder share; fields as in VQGAN."""

  resolution: int
  channels: int
  channel_mult: tuple[int, ...]
  num_res_blocks: int
  attn_resolutions: tuple[int, ...]
  out_channels: int
  dtype: DTypeLike

  def _level(self, x: Array, direction: str, level: int, num_blocks: int) -> Array:
    channels = self.channels * self.channel_mult[level]
    for i in range(num_blocks):
      x = _ResidualBlock(channels, self.dtype, name=f"{direction}_{level}_block_{i}")(x)
      if self.resolution >> level in self.attn_resolutions:
        x = _AttentionBlock(self.dtype, name=f"{direction}_{level}_attn_{i}")(x)
    return x

  def _middle(self, x: Array) -> Array:
    x = _ResidualBlock(x.shape[-1], self.dtype, name="mid_block_1")(x)
    x = _AttentionBlock(self.dtype, name="mid_attn_1")(x)
    return _ResidualBlock(x.shape[-1], self.dtype, name="mid_block_2")(x)

  def _out(self, x: Array) -> Array:
    x = nn.silu(_norm(self.dtype, "norm_out")(x))
    return nn.Conv(self.out_channels, (3, 3), dtype=self.dtype, name="conv_out")(x)


class _Encoder(_Pyramid):
  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 z"]:
    x = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv_in")(x)
    num_levels = len(self.channel_mult)
    for level in range(num_levels):
      x = self._level(x, "down", level, self.num_res_blocks)
      if level < num_levels - 1:
        padding = ((0, 1), (0, 1))  # below and on the right alone
        x = nn.Conv(
          x.shape[-1], (3, 3), 2, padding, dtype=self.dtype, name=f"down_{level}_downsample"
        )(x)
    return self._out(self._middle(x))


class _Decoder(_Pyramid):
  @nn.compact
  def __call__(self, x: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
    channels = self.channels * self.channel_mult[-1]
    x = self._middle(nn.Conv(channels, (3, 3), dtype=self.dtype, name="conv_in")(x))
    for level in reversed(range(len(self.channel_mult))):
      x = self._level(x, "up", level, self.num_res_blocks + 1)
      if level:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        x = nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, name=f"up_{level}_upsample")(x)
    return self._out(x)


class VQGAN(nn.Module):
  """Images to codes and back.

  Attributes:
    resolution: pixels along an image's side; it counts only for where attention is.
    channels: at full resolution.
    channel_mult: times `channels` at each resolution; each one halves the one before.
    num_res_blocks: at each resolution of the encoder; the decoder has one more.
    attn_resolutions: where each of them is followed by attention; the middle always has it.
    z_channels: of the encoder's output and the decoder's input.
    codebook_size, code_dim: number and length of the codes.
    image_channels: of the images.
    dtype: of the decoder's activations. The encoder computes in float32 at the highest matmul
      precision, so that an image's codes depend on the parameters alone.
  """

  resolution: int = 256
  channels: int = 128
  channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2
  attn_resolutions: tuple[int, ...] = (16,)
  z_channels: int = 256
  codebook_size: int = 1024
  code_dim: int = 256
  image_channels: int = 3
  dtype: DTypeLike = jnp.float32

  @property
  def grid_size(self) -> int:
    """Tokens along an image's side."""
    return self.resolution >> len(self.channel_mult) - 1

  def setup(self):
    """The parts, by their published names."""
    sizes = {
      name: getattr(self, name)
      for name in ("resolution", "channels", "channel_mult", "num_res_blocks", "attn_resolutions")
    }
    self.encoder = _Encoder(**sizes, out_channels=self.z_channels, dtype=jnp.float32)
    self.quant_conv = nn.Conv(self.code_dim, (1, 1))
    bound = 1 / self.codebook_size
    self.codebook = self.param(
      "codebook",
      lambda key, shape: initializers.uniform(2 * bound)(key, shape) - bound,
      (self.codebook_size, self.code_dim),
    )
    self.post_quant_conv = nn.Conv(self.z_channels, (1, 1), dtype=self.dtype)
    self.decoder = _Decoder(**sizes, out_channels=self.image_channels, dtype=self.dtype)

  def latents(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    """What is quantised."""
    with jax.default_matmul_precision("highest"):  # of convolutions and attention as well
      return self.quant_conv(self.encoder(images.astype(jnp.float32)))

  def encode(self, images: Float[Array, "b h w c"]) -> Int[Array, "b h2 w2"]:
    """The code nearest to each latent, of images in [-1, 1]."""
    products = jnp.einsum("bhwd,nd->bhwn", self.latents(images), self.codebook, precision="highest")
    return jnp.argmin(jnp.sum(self.codebook**2, axis=-1) - 2 * products, axis=-1).astype(jnp.int32)

  def decode(self, codes: Int[Array, "b h w"]) -> Float[Array, "b h2 w2 c"]:
    """Images of codes, in float32; they may leave [-1, 1] a little."""
    x = self.decoder(self.post_quant_conv(self.codebook[codes]))
    return x.astype(jnp.float32)

  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Reconstructions."""
    return self.decode(self.encode(images))
