"""The two U-Nets of EDM: ADM (Dhariwal and Nichol) and Song et al.'s DDPM++ and NCSN++.

Both predict from a scaled image and a noise label; `models/edm.py` wraps them into denoisers.
Parameter paths follow the published names: `enc_16x16_block0/conv0/kernel`. Sources:
arXiv:2206.00364, appendix C and table 2; arXiv:2105.05233; arXiv:2011.13456.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import DTypeLike

from dimo_jax.models.attention import attention, row_matmul
from dimo_jax.models.remat import rematerialised
from dimo_jax.types import Array, Float, UserError, suggest

# Of one layer: its input size (fan-in) -> initialisers of kernel and bias.
Init = Callable[[int], dict[str, Any]]

_MAX_GROUPS, _MIN_CHANNELS_PER_GROUP = 32, 4  # of every GroupNorm
_FOURIER_SCALE = 16.0
_MAX_PERIOD = 10000  # of the positional embedding
_BOX_FILTER = (1, 1)
_ADM_EPSILON, _SONG_EPSILON = 1e-5, 1e-6  # of every GroupNorm

_KAIMING = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_XAVIER = initializers.xavier_uniform()
# The published network starts its output layers at 1e-5 of Xavier's range, and attention's input
# at sqrt(0.2) of it; `scale` is a variance.
_XAVIER_SMALL = initializers.variance_scaling(1e-10, "fan_avg", "uniform")
_XAVIER_ATTENTION = initializers.variance_scaling(0.2, "fan_avg", "uniform")


def _kaiming(fan_in: int) -> dict[str, Any]:
  """Weights and biases uniform within 1 / sqrt(fan_in)."""

  def bias_init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -1, 1) * fan_in**-0.5

  return {"kernel_init": _KAIMING, "bias_init": bias_init}


def _xavier(fan_in: int) -> dict[str, Any]:
  """Xavier-uniform weights, zero biases."""
  del fan_in
  return {"kernel_init": _XAVIER}


def positional_embedding(
  noise_label: Float[Array, " b"], channels: int, *, endpoint: bool = False
) -> Float[Array, "b c"]:
  """Cosines, then sines, of the label at periods up to 10000 (`endpoint`: reaching it)."""
  half = channels // 2
  frequencies = (1 / _MAX_PERIOD) ** (jnp.arange(half) / (half - endpoint))
  angles = noise_label[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


class FourierEmbedding(nn.Module):
  """Cosines, then sines, of the label at random frequencies, which are never trained."""

  channels: int

  @nn.compact
  def __call__(self, noise_label: Float[Array, " b"]) -> Float[Array, "b c"]:
    """The embedding; `freqs` gets no gradient, but freeze it where weight decay is on."""
    init = initializers.normal(_FOURIER_SCALE)
    freqs = jax.lax.stop_gradient(self.param("freqs", init, (self.channels // 2,)))
    angles = noise_label[:, None] * (2 * jnp.pi * freqs)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def _taps(resample_filter: tuple[int, ...]) -> tuple[list[float], int]:
  """A filter normalised to sum 1, and its padding on either side."""
  if len(resample_filter) % 2 or not resample_filter:
    raise UserError(f"denoiser.resample_filter={resample_filter} must have an even number of taps")
  return [tap / sum(resample_filter) for tap in resample_filter], len(resample_filter) // 2 - 1


def downsample(
  x: Float[Array, "b h w c"], resample_filter: tuple[int, ...] = _BOX_FILTER, *, pad: bool = True
) -> Float[Array, "b h2 w2 c"]:
  """Filters and keeps every second row and column; without `pad` the border is used up."""
  taps, padding = _taps(resample_filter)
  for axis in (1, 2):
    if pad and padding:
      x = jnp.pad(x, [(padding, padding) if i == axis else (0, 0) for i in range(4)])
    size = (x.shape[axis] - len(taps)) // 2 + 1
    x = functools.reduce(
      jnp.add,
      [tap * jax.lax.slice_in_dim(x, i, i + 2 * size - 1, 2, axis) for i, tap in enumerate(taps)],
    )
  return x


def upsample(
  x: Float[Array, "b h w c"], resample_filter: tuple[int, ...] = _BOX_FILTER
) -> Float[Array, "b h2 w2 c"]:
  """Four times the transpose of `downsample`: zeros between the pixels, then the filter."""
  taps, padding = _taps(resample_filter)
  for axis in (1, 2):
    size, reach = x.shape[axis], (padding + 1) // 2
    padded = jnp.pad(x, [(reach, reach) if i == axis else (0, 0) for i in range(4)])
    phases = []
    for phase in (0, 1):  # even and odd outputs each see every second tap
      terms = [
        2 * taps[i] * jax.lax.slice_in_dim(padded, reach + shift, reach + shift + size, 1, axis)
        for i in range(len(taps))
        for shift, odd in [divmod(phase + padding - i, 2)]
        if not odd
      ]
      phases.append(functools.reduce(jnp.add, terms))
    shape = tuple(2 * n if i == axis else n for i, n in enumerate(x.shape))
    x = jnp.stack(phases, axis=axis + 1).reshape(shape)
  return x


def _upsampled_conv(x, kernel, *arguments, **options):
  """For `nn.Conv(conv_general_dilated=...)`: a 3x3 convolution of the image repeated 2x2 times."""
  del arguments, options  # nn.Conv's are the plain ones

  def repeated(x, kernel):
    return _conv(upsample(x), kernel, "SAME")

  return jax.lax.platform_dependent(x, kernel, cpu=_phase_convs, default=repeated)


def _conv(x, kernel, padding):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _phase_convs(x, kernel):
  """The convolution of the repeated image, one output phase at a time.

  Each of the four output phases sees only 2x2 different pixels, so it convolves the small image
  with a kernel whose equal taps are summed: 4/9 of the operations. On a CPU core a training step
  of an ADM at 64 channels, 32x32, becomes 5% shorter.
  """
  rows = []
  for i in (0, 1):
    columns = []
    for j in (0, 1):
      taps = kernel
      for axis, phase in ((0, i), (1, j)):
        first, middle, last = jnp.split(taps, 3, axis)
        pair = [first + middle, last] if phase else [first, middle + last]
        taps = jnp.concatenate(pair, axis)
      columns.append(_conv(x, taps, [(1 - i, i), (1 - j, j)]))
    rows.append(jnp.stack(columns, axis=3))
  b, h, w, _ = x.shape
  return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1)


class GroupNorm(nn.Module):
  """Group normalisation with EDM's number of groups; float32 inside, returned in `dtype`.

  Groups are spread over their channels by a matrix product, and each image is multiplied and
  shifted per channel: XLA's CPU backend fuses anything else into slow code (linen's GroupNorm
  makes a forward pass of an ADM at 64 channels, 32x32, 20% longer, a training step 5%).
  """

  epsilon: float
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w c"],
    modulation: tuple[Float[Array, "b c"], Float[Array, "b c"]] | None = None,
  ) -> Float[Array, "b h w c"]:
    """Normalises each group; `modulation` (scale, shift) then maps y to y (1 + scale) + shift."""
    c = x.shape[-1]
    num_groups = min(_MAX_GROUPS, c // _MIN_CHANNELS_PER_GROUP)
    if not num_groups or c % num_groups:
      raise UserError(
        f"denoiser.model_channels gives a layer of {c} channels, which do not divide into"
        f" {num_groups} groups, min({_MAX_GROUPS}, channels // {_MIN_CHANNELS_PER_GROUP})"
      )

    size = c // num_groups
    spread = (jnp.arange(num_groups)[:, None] == jnp.arange(c) // size).astype(jnp.float32)

    def group_mean(y):
      grouped = y.mean((1, 2)).reshape(-1, num_groups, size).mean(-1)
      return jnp.matmul(grouped, spread, precision="highest")

    scale = self.param("scale", initializers.ones, (c,))
    shift = self.param("bias", initializers.zeros, (c,))
    x = x.astype(jnp.float32)
    mean = group_mean(x)
    variance = group_mean(jnp.square(x - mean[:, None, None]))
    scale = scale * jax.lax.rsqrt(variance + self.epsilon)
    shift = shift - mean * scale
    if modulation is not None:
      scale, shift = scale * (1 + modulation[0]), shift * (1 + modulation[0]) + modulation[1]
    return (x * scale[:, None, None] + shift[:, None, None]).astype(self.dtype)


def check_size(x: Float[Array, "b h w c"], resolution: int, channels: int, num_levels: int = 1):
  """Raises UserError where an image does not fit the network."""
  if x.shape[1:] != (resolution, resolution, channels):
    raise UserError(
      f"a network for images of shape {(resolution, resolution, channels)} does not fit images of"
      f" shape {x.shape[1:]}"
    )
  if resolution % (1 << num_levels - 1):
    raise UserError(
      f"denoiser.channel_mult has {num_levels} entries, and images of {resolution} pixels a side"
      f" cannot be halved {num_levels - 1} times"
    )


class Block(nn.Module):
  """Residual block: norm, convolution, embedding, norm, convolution; then attention.

  Attributes:
    resample: "up" or "down" by two, or None.
    num_heads: of the attention; 0 for none.
    adaptive_scale: the embedding scales and shifts; otherwise it is added.
    project: a 1x1 convolution on the skip of every resampling block, also at equal channels.
    skip_scale: factor after each residual.
    layer_init: of all layers but the ones below.
    out_init: of the kernels that end a residual branch.
    attention_init: of attention's input kernel; None for `layer_init`.
  """

  channels: int
  layer_init: Init
  out_init: Callable[..., Any]
  attention_init: Callable[..., Any] | None = None
  resample: Literal["up", "down"] | None = None
  resample_filter: tuple[int, ...] = _BOX_FILTER
  num_heads: int = 0
  dropout: float = 0.0
  adaptive_scale: bool = True
  project: bool = False
  skip_scale: float = 1.0
  epsilon: float = _ADM_EPSILON
  dtype: DTypeLike = jnp.float32

  def _resampled(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    if self.resample is None:
      return x
    return (upsample if self.resample == "up" else downsample)(x, self.resample_filter)

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"], deterministic: bool
  ) -> Float[Array, "b h2 w2 c2"]:
    """Applies the block."""
    norm = functools.partial(GroupNorm, self.epsilon, self.dtype)
    conv = functools.partial(nn.Conv, dtype=self.dtype)
    pointwise = functools.partial(nn.Dense, dtype=self.dtype, dot_general=row_matmul)
    c = self.channels

    y, options = nn.silu(norm(name="norm0")(x)), self.layer_init(9 * x.shape[-1])
    if self.resample == "up" and self.resample_filter == _BOX_FILTER:
      options["conv_general_dilated"] = _upsampled_conv
    else:
      y = self._resampled(y)
    y = conv(c, (3, 3), **options, name="conv0")(y)
    affine = nn.Dense(
      c * (1 + self.adaptive_scale), **self.layer_init(embedding.shape[-1]), name="affine"
    )
    modulation = affine(embedding)
    if self.adaptive_scale:
      scale, shift = jnp.split(modulation, 2, axis=-1)
      y = norm(name="norm1")(y, (scale, shift))
    else:
      y = norm(name="norm1")(y + modulation[:, None, None].astype(self.dtype))
    y = nn.silu(y)
    y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
    y = conv(c, (3, 3), kernel_init=self.out_init, name="conv1")(y)

    skip = self._resampled(x)
    if c != x.shape[-1] or (self.project and self.resample):
      skip = pointwise(c, **self.layer_init(x.shape[-1]), name="skip")(skip)
    x = (y + skip) * self.skip_scale
    if self.num_heads:
      b, h, w, _ = x.shape
      init = self.layer_init(c) | (
        {"kernel_init": self.attention_init} if self.attention_init else {}
      )
      qkv = pointwise(3 * c, **init, name="qkv")(norm(name="norm2")(x))
      qkv = qkv.reshape(b, h * w, self.num_heads, -1, 3)  # the published order of channels
      y = attention(*jnp.moveaxis(qkv, -1, 0)).reshape(b, h, w, c)
      y = pointwise(c, kernel_init=self.out_init, name="proj")(y)
      x = (x + y) * self.skip_scale
    return x


class ADM(nn.Module):
  """The U-Net of ADM as EDM trains it ("DhariwalUNet").

  Attributes:
    img_resolution: height and width of the image.
    img_channels: channels of input and output.
    label_dim: classes; 0 for an unconditional network.
    augment_dim: length of the augmentation labels; 0 for none.
    model_channels: channels at the highest resolution.
    channel_mult: factor on the channels at each resolution, highest first.
    channel_mult_emb: factor for the length of the embedding.
    num_blocks: residual blocks per resolution (one more in the decoder).
    attn_resolutions: resolutions whose blocks attend; the first decoder block always does.
    channels_per_head: of attention; must divide the channels of every attending block.
    dropout: rate inside the blocks when not deterministic.
    remat: what the blocks keep for the backward pass, one of REMAT.
    dtype: compute dtype; parameters, embeddings, softmax and statistics are float32.
  """

  img_resolution: int
  img_channels: int = 3
  label_dim: int = 0
  augment_dim: int = 0
  model_channels: int = 192
  channel_mult: tuple[int, ...] = (1, 2, 3, 4)
  channel_mult_emb: int = 4
  num_blocks: int = 3
  attn_resolutions: tuple[int, ...] = (32, 16, 8)
  channels_per_head: int = 64
  dropout: float = 0.1
  remat: str = "none"
  dtype: DTypeLike = jnp.float32

  def _num_heads(self, channels: int) -> int:
    if channels % self.channels_per_head:
      raise UserError(
        f"denoiser.channels_per_head={self.channels_per_head} must divide the {channels} channels"
        " of an attending block"
      )
    return channels // self.channels_per_head

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
  ) -> tuple[Float[Array, "b h w c"] | None, Float[Array, "b h2 w2 c2"]]:
    """The prediction (None unless `decode`) and the encoder's output.

    Args:
      x: the scaled image.
      noise_label: ln(sigma) / 4.
      class_labels: one-hot, zeros for no class.
      augment_labels: zeros or None for an image as it is.
    """
    check_size(x, self.img_resolution, self.img_channels, len(self.channel_mult))
    channels, size = self.model_channels, self.channel_mult_emb * self.model_channels
    emb = positional_embedding(noise_label, channels)
    if self.augment_dim and augment_labels is not None:
      init: dict[str, Any] = {"use_bias": False, "kernel_init": initializers.zeros}
      emb = emb + nn.Dense(channels, **init, name="map_augment")(augment_labels)
    emb = nn.silu(nn.Dense(size, **_kaiming(channels), name="map_layer0")(emb))
    emb = nn.Dense(size, **_kaiming(size), name="map_layer1")(emb)
    if self.label_dim:
      init = {"use_bias": False, "kernel_init": initializers.normal(1.0)}
      emb = emb + nn.Dense(size, **init, name="map_label")(class_labels)
    emb = nn.silu(emb)

    def block(name, x, channels, attend=False, resample=None):
      return rematerialised(Block, self.remat, 3)(
        channels,
        layer_init=_kaiming,
        out_init=initializers.zeros,
        resample=resample,
        num_heads=self._num_heads(channels) if attend else 0,
        dropout=self.dropout,
        dtype=self.dtype,
        name=name,
      )(x, emb, deterministic)

    res, conv = self.img_resolution, functools.partial(nn.Conv, dtype=self.dtype)
    init = _kaiming(9 * self.img_channels)
    x = conv(channels * self.channel_mult[0], (3, 3), **init, name=f"enc_{res}x{res}_conv")(x)
    skips = [x]
    for level, mult in enumerate(self.channel_mult):
      res = self.img_resolution >> level
      if level:
        x = block(f"enc_{res}x{res}_down", x, x.shape[-1], resample="down")
        skips.append(x)
      for i in range(self.num_blocks):
        attend = res in self.attn_resolutions
        x = block(f"enc_{res}x{res}_block{i}", x, channels * mult, attend)
        skips.append(x)
    bottleneck = x
    if not decode:
      return None, bottleneck

    x = block(f"dec_{res}x{res}_in0", x, x.shape[-1], True)
    x = block(f"dec_{res}x{res}_in1", x, x.shape[-1])
    for level, mult in reversed(list(enumerate(self.channel_mult))):
      res = self.img_resolution >> level
      if level < len(self.channel_mult) - 1:
        x = block(f"dec_{res}x{res}_up", x, x.shape[-1], resample="up")
      for i in range(self.num_blocks + 1):
        x = jnp.concatenate([x, skips.pop()], axis=-1)
        attend = res in self.attn_resolutions
        x = block(f"dec_{res}x{res}_block{i}", x, channels * mult, attend)
    x = nn.silu(GroupNorm(_ADM_EPSILON, self.dtype, name="out_norm")(x))
    return conv(self.img_channels, (3, 3), kernel_init=initializers.zeros, name="out_conv")(
      x
    ), bottleneck


_SONG_CHOICES = {
  "embedding_type": ("positional", "fourier"),
  "encoder_type": ("standard", "skip", "residual"),
  "decoder_type": ("standard", "skip"),
}


class SongUNet(nn.Module):
  """The U-Net of DDPM++ ("standard" encoder, "positional") and NCSN++ ("residual", "fourier").

  Attributes:
    img_resolution: height and width of the image.
    img_channels: channels of input and output.
    label_dim: classes; 0 for an unconditional network.
    augment_dim: length of the augmentation labels; 0 for none.
    model_channels: channels at the highest resolution.
    channel_mult: factor on the channels at each resolution, highest first.
    channel_mult_emb: factor for the length of the embedding.
    num_blocks: residual blocks per resolution (one more in the decoder).
    attn_resolutions: resolutions that attend (in the decoder only their last block does); the
      first decoder block always does. One head.
    dropout: rate inside the blocks when not deterministic.
    embedding_type: of the noise label, "positional" or "fourier".
    channel_mult_noise: factor for the length of the noise label's embedding.
    encoder_type: "standard"; "skip" and "residual" feed the downsampled image to every resolution.
    decoder_type: "standard"; "skip" sums an image from every resolution.
    resample_filter: separable, of even length.
    remat: what the blocks keep for the backward pass, one of REMAT.
    dtype: compute dtype; parameters, embeddings, softmax and statistics are float32.
  """

  img_resolution: int
  img_channels: int = 3
  label_dim: int = 0
  augment_dim: int = 0
  model_channels: int = 128
  channel_mult: tuple[int, ...] = (1, 2, 2, 2)
  channel_mult_emb: int = 4
  num_blocks: int = 4
  attn_resolutions: tuple[int, ...] = (16,)
  dropout: float = 0.1
  embedding_type: str = "positional"
  channel_mult_noise: int = 1
  encoder_type: str = "standard"
  decoder_type: str = "standard"
  resample_filter: tuple[int, ...] = _BOX_FILTER
  remat: str = "none"
  dtype: DTypeLike = jnp.float32

  def _embedding(self, noise_label, class_labels, augment_labels) -> Float[Array, "b e"]:
    channels, size = (
      self.model_channels * mult for mult in (self.channel_mult_noise, self.channel_mult_emb)
    )
    dense = functools.partial(nn.Dense, kernel_init=_XAVIER)
    if self.embedding_type == "fourier":
      emb = FourierEmbedding(channels, name="map_noise")(noise_label)
    else:
      emb = positional_embedding(noise_label, channels, endpoint=True)
    emb = jnp.roll(emb, channels // 2, axis=1)  # sines first
    if self.label_dim:
      emb = emb + dense(channels, name="map_label")(class_labels * self.label_dim**0.5)
    if self.augment_dim and augment_labels is not None:
      emb = emb + dense(channels, use_bias=False, name="map_augment")(augment_labels)
    emb = nn.silu(dense(size, name="map_layer0")(emb))
    return nn.silu(dense(size, name="map_layer1")(emb))

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
  ) -> tuple[Float[Array, "b h w c"] | None, Float[Array, "b h2 w2 c2"]]:
    """The prediction (None unless `decode`) and the encoder's output; arguments as ADM's."""
    check_size(x, self.img_resolution, self.img_channels, len(self.channel_mult))
    for name, known in _SONG_CHOICES.items():
      if getattr(self, name) not in known:
        value = getattr(self, name)
        raise UserError(f"denoiser.{name}={value!r} is unknown{suggest(value, known)}")
    emb = self._embedding(noise_label, class_labels, augment_labels)
    conv = functools.partial(nn.Conv, kernel_init=_XAVIER, dtype=self.dtype)
    pointwise = functools.partial(nn.Dense, kernel_init=_XAVIER, dtype=self.dtype)
    channels, taps = self.model_channels, self.resample_filter

    def block(name, x, channels, attend=False, resample=None):
      return rematerialised(Block, self.remat, 3)(
        channels,
        layer_init=_xavier,
        out_init=_XAVIER_SMALL,
        attention_init=_XAVIER_ATTENTION,
        resample=resample,
        resample_filter=taps,
        num_heads=int(attend),
        dropout=self.dropout,
        adaptive_scale=False,
        project=True,
        skip_scale=0.5**0.5,
        epsilon=_SONG_EPSILON,
        dtype=self.dtype,
        name=name,
      )(x, emb, deterministic)

    aux, res = x, self.img_resolution
    x = conv(channels, (3, 3), name=f"enc_{res}x{res}_conv")(x)
    skips = [x]
    for level, mult in enumerate(self.channel_mult):
      res = self.img_resolution >> level
      if level:
        x = block(f"enc_{res}x{res}_down", x, x.shape[-1], resample="down")
        if self.encoder_type == "skip":
          aux = downsample(aux, taps)
          x = x + pointwise(x.shape[-1], name=f"enc_{res}x{res}_aux_skip")(aux)
        elif self.encoder_type == "residual":
          # Convolution and filter are fused in the original: the image is padded once, for both.
          reach = len(taps) // 2
          aux = conv(x.shape[-1], (3, 3), padding=reach, name=f"enc_{res}x{res}_aux_residual")(aux)
          x = aux = (x + downsample(aux, taps, pad=False)) * 0.5**0.5
        skips.append(x)
      for i in range(self.num_blocks):
        attend = res in self.attn_resolutions
        x = block(f"enc_{res}x{res}_block{i}", x, channels * mult, attend)
        skips.append(x)
    bottleneck = x
    if not decode:
      return None, bottleneck

    x = block(f"dec_{res}x{res}_in0", x, x.shape[-1], True)
    x = block(f"dec_{res}x{res}_in1", x, x.shape[-1])
    out = None
    for level, mult in reversed(list(enumerate(self.channel_mult))):
      res = self.img_resolution >> level
      if level < len(self.channel_mult) - 1:
        x = block(f"dec_{res}x{res}_up", x, x.shape[-1], resample="up")
      for i in range(self.num_blocks + 1):
        x = jnp.concatenate([x, skips.pop()], axis=-1)
        attend = i == self.num_blocks and res in self.attn_resolutions
        x = block(f"dec_{res}x{res}_block{i}", x, channels * mult, attend)
      if self.decoder_type == "skip" or level == 0:
        y = nn.silu(GroupNorm(_SONG_EPSILON, self.dtype, name=f"dec_{res}x{res}_aux_norm")(x))
        name = f"dec_{res}x{res}_aux_conv"
        y = conv(self.img_channels, (3, 3), kernel_init=_XAVIER_SMALL, name=name)(y)
        out = y if out is None else upsample(out, taps) + y
    return out, bottleneck
