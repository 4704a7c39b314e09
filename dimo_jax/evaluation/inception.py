"""Inception-v3 as the Fréchet inception distance uses it, and its published weights.

It is TensorFlow's network of 5 December 2015, ported to PyTorch as `pt_inception-2015-12-05`, and
differs from torchvision's: average pools leave the padding out of the mean, the last block pools
by maximum, and there are 1008 logits. Everything runs in float32 at the highest matmul precision.

Source: arXiv:1512.00567 (the network), arXiv:1706.08500 (its use).
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dimo_jax.convert import files
from dimo_jax.types import Array, Float, Params, UserError

__all__ = ["TAPS", "Inception", "InceptionV3", "from_published"]

SIDE = 299  # pixels a side that the network was trained on
NUM_LOGITS = 1008
NUM_SPATIAL = 7  # channels of the spatial features: 7 of 17 x 17 make about as many as 2048
# Names of what the network gives, and their sizes, in the order of computation.
TAPS = {
  "64": 64,
  "192": 192,
  "spatial": 17 * 17 * NUM_SPATIAL,
  "768": 768,
  "2048": 2048,
  "logits_unbiased": NUM_LOGITS,
  "logits": NUM_LOGITS,
}
# Of the published file; its name carries the first eight digits.
PUBLISHED_SHA256 = "6726825d"
_EPSILON = 1e-3


class _Norm(nn.Module):
  """Batch normalisation by the stored mean and variance."""

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    c = x.shape[-1]
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale, var = self.param("scale", ones, (c,)), self.param("var", ones, (c,))
    bias, mean = self.param("bias", zeros, (c,)), self.param("mean", zeros, (c,))
    return (x - mean) * (scale * jax.lax.rsqrt(var + _EPSILON)) + bias


class _Conv(nn.Module):
  """Convolution without bias, normalisation, ReLU."""

  num_channels: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b hh ww k"]:
    x = nn.Conv(
      self.num_channels,
      self.kernel,
      self.stride,
      self.padding,
      use_bias=False,
      precision=jax.lax.Precision.HIGHEST,
      name="conv",
    )(x)
    return nn.relu(_Norm(name="bn")(x))


def _half_conv(num_channels: int, name: str) -> _Conv:
  return _Conv(num_channels, (3, 3), 2, "VALID", name=name)


def _half_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b hh ww c"]:
  return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def _mean_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
  return nn.max_pool(x, (3, 3), (1, 1), "SAME")


class _BlockA(nn.Module):
  """35 x 35: 1x1, 5x5, two 3x3, pool."""

  pool_channels: int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w k"]:
    five = _Conv(48, name="branch5x5_1")(x)
    three = _Conv(96, (3, 3), name="branch3x3dbl_2")(_Conv(64, name="branch3x3dbl_1")(x))
    branches = [
      _Conv(64, name="branch1x1")(x),
      _Conv(64, (5, 5), name="branch5x5_2")(five),
      _Conv(96, (3, 3), name="branch3x3dbl_3")(three),
      _Conv(self.pool_channels, name="branch_pool")(_mean_pool(x)),
    ]
    return jnp.concatenate(branches, axis=-1)


class _BlockB(nn.Module):
  """35 x 35 to 17 x 17."""

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b hh ww k"]:
    three = _Conv(96, (3, 3), name="branch3x3dbl_2")(_Conv(64, name="branch3x3dbl_1")(x))
    branches = [
      _half_conv(384, "branch3x3")(x),
      _half_conv(96, "branch3x3dbl_3")(three),
      _half_pool(x),
    ]
    return jnp.concatenate(branches, axis=-1)


class _BlockC(nn.Module):
  """17 x 17: 1x1, 7x7 and two 7x7 in rows and columns, pool; also the 1x1 branch alone."""

  width: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"]
  ) -> tuple[Float[Array, "b h w k"], Float[Array, "b h w r"]]:
    row, column, c = (1, 7), (7, 1), self.width
    one = _Conv(192, name="branch1x1")(x)
    seven = _Conv(c, row, name="branch7x7_2")(_Conv(c, name="branch7x7_1")(x))
    double = _Conv(c, name="branch7x7dbl_1")(x)
    for i, kernel in ((2, column), (3, row), (4, column)):
      double = _Conv(c, kernel, name=f"branch7x7dbl_{i}")(double)
    branches = [
      one,
      _Conv(192, column, name="branch7x7_3")(seven),
      _Conv(192, row, name="branch7x7dbl_5")(double),
      _Conv(192, name="branch_pool")(_mean_pool(x)),
    ]
    return jnp.concatenate(branches, axis=-1), one


class _BlockD(nn.Module):
  """17 x 17 to 8 x 8."""

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b hh ww k"]:
    seven = _Conv(192, (1, 7), name="branch7x7x3_2")(_Conv(192, name="branch7x7x3_1")(x))
    seven = _Conv(192, (7, 1), name="branch7x7x3_3")(seven)
    branches = [
      _half_conv(320, "branch3x3_2")(_Conv(192, name="branch3x3_1")(x)),
      _half_conv(192, "branch7x7x3_4")(seven),
      _half_pool(x),
    ]
    return jnp.concatenate(branches, axis=-1)


class _BlockE(nn.Module):
  """8 x 8: 1x1, 3x3 split into rows and columns, 3x3 before such a split, pool."""

  max_pool: bool

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w k"]:
    row, column = (1, 3), (3, 1)
    three = _Conv(384, name="branch3x3_1")(x)
    double = _Conv(384, (3, 3), name="branch3x3dbl_2")(_Conv(448, name="branch3x3dbl_1")(x))
    branches = [
      _Conv(320, name="branch1x1")(x),
      _Conv(384, row, name="branch3x3_2a")(three),
      _Conv(384, column, name="branch3x3_2b")(three),
      _Conv(384, row, name="branch3x3dbl_3a")(double),
      _Conv(384, column, name="branch3x3dbl_3b")(double),
      _Conv(192, name="branch_pool")(_max_pool(x) if self.max_pool else _mean_pool(x)),
    ]
    return jnp.concatenate(branches, axis=-1)


class InceptionV3(nn.Module):
  """The network; its submodules have the published names.

  Attributes:
    taps: which of `TAPS` to give; layers behind the last of them are not built.
  """

  taps: tuple[str, ...] = tuple(TAPS)

  @nn.compact
  def __call__(self, images: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b _"]]:
    """Features by tap of images in [-1, 1], `SIDE` pixels a side (64 and 192 take any size).

    "64" to "2048" are means over the positions behind the first and second pooling, the last
    block of 17 x 17 and the last block; "spatial" is what ADM's spatial distance takes: the first
    7 channels of the 1x1 branch of the fourth block of 17 x 17, position by position.
    """
    found: dict[str, Array] = {}
    last = max(list(TAPS).index(tap) for tap in self.taps)

    def done(name: str, value: Array) -> bool:
      if name in self.taps:
        found[name] = value.mean(axis=(1, 2)) if value.ndim == 4 else value
      return list(TAPS).index(name) >= last

    x = _half_conv(32, "Conv2d_1a_3x3")(images)
    x = _Conv(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
    x = _half_pool(_Conv(64, (3, 3), name="Conv2d_2b_3x3")(x))
    if done("64", x):
      return found
    x = _Conv(80, name="Conv2d_3b_1x1")(x)
    x = _half_pool(_Conv(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x))
    if done("192", x):
      return found
    for name, pool_channels in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
      x = _BlockA(pool_channels, name=name)(x)
    x = _BlockB(name="Mixed_6a")(x)
    for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160)):
      x, _ = _BlockC(width, name=name)(x)
    x, one = _BlockC(160, name="Mixed_6d")(x)
    spatial = one[..., :NUM_SPATIAL]
    if done("spatial", spatial.reshape(len(spatial), -1)):
      return found
    x, _ = _BlockC(192, name="Mixed_6e")(x)
    if done("768", x):
      return found
    x = _BlockD(name="Mixed_7a")(x)
    x = _BlockE(max_pool=False, name="Mixed_7b")(x)
    x = _BlockE(max_pool=True, name="Mixed_7c")(x)
    if done("2048", x):
      return found
    head = nn.Dense(NUM_LOGITS, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")
    logits = head(x.mean(axis=(1, 2)))
    if done("logits_unbiased", logits):
      return found
    done("logits", logits + self.param("fc_bias", nn.initializers.zeros, (NUM_LOGITS,)))
    return found


@functools.cache
def _shapes() -> dict[str, tuple[int, ...]]:
  """Shapes of the whole network's parameters by flat path."""
  images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  params = jax.eval_shape(InceptionV3().init, jax.random.key(0), images)["params"]
  return {k: v.shape for k, v in traverse_util.flatten_dict(params, sep="/").items()}


_RENAMED = {"running_mean": "mean", "running_var": "var", "weight": "scale", "bias": "bias"}


def _published_name(path: str) -> str:
  """The published key of one of our parameters."""
  if path.startswith("fc"):
    return "fc.bias" if path == "fc_bias" else "fc.weight"
  *scopes, leaf = path.split("/")
  back = {ours: theirs for theirs, ours in _RENAMED.items()} | {"kernel": "weight"}
  return ".".join([*scopes, back[leaf]])


def from_published(state_dict: Mapping[str, np.ndarray]) -> Params:
  """The linen parameters from a state dict with the published key names, float32.

  `*.num_batches_tracked` counters are passed over.

  Raises:
    UserError: keys are missing or unexpected, or arrays of another shape.
  """
  found = {k: v for k, v in state_dict.items() if not k.endswith(".num_batches_tracked")}
  wanted = {_published_name(path): (path, shape) for path, shape in _shapes().items()}
  missing, unexpected = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
  if missing or unexpected:
    raise UserError(
      f"not FID's Inception-v3: missing keys {_some(missing)}, unexpected keys {_some(unexpected)}"
    )
  flat = {}
  for name, (path, shape) in wanted.items():
    value = np.asarray(found[name], np.float32)
    value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    if value.shape != shape:
      raise UserError(f"not FID's Inception-v3: {name} has shape {np.shape(found[name])}")
    flat[path] = np.ascontiguousarray(value)
  return traverse_util.unflatten_dict(flat, sep="/")


def _some(keys: Sequence[str]) -> str:
  return (", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")) or "none"


def _digest(params: Params) -> str:
  digest = hashlib.sha256()
  for path, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
    digest.update(path.encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Inception:
  """Loaded weights with what identifies them.

  Attributes:
    params: of the whole `InceptionV3`.
    sha256: of paths and bytes of the parameters, whatever file they came in.
    published: whether they came in the published file, by the digits in its name.
  """

  params: Params
  sha256: str
  published: bool

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Inception":
    """From a `.pth` or safetensors file with the published names; nothing in it is executed.

    Raises:
      UserError: no such file, a damaged one, or another network's.
    """
    tensors = files.read(Path(path)).tensors
    with open(path, "rb") as stream:
      file_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
      return cls.from_state_dict(tensors, file_sha256)
    except UserError as error:
      raise UserError(f"inception={str(path)!r}: {error}") from error

  @classmethod
  def from_state_dict(
    cls, state_dict: Mapping[str, np.ndarray], file_sha256: str = ""
  ) -> "Inception":
    """From arrays with the published names; see `from_published`."""
    params = from_published(state_dict)
    published = file_sha256.startswith(PUBLISHED_SHA256)
    return cls(params, _digest(params), published)
