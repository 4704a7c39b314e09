"""The resizes of published distances, each by its name: linear maps along rows and columns.

Two thirds of the quarrels about a Fréchet inception distance are about the resize, so nothing here
has a default. Levels are 0..255, and pixels outside the image repeat the border.

| name | what | used by |
| --- | --- | --- |
| `tf1_bilinear` | two neighbours; output `i` lies at `i * size / out` | TensorFlow 1: TTUR, ADM, EDM, torch-fidelity |
| `torch_bilinear` | two neighbours; pixel centres aligned | pytorch-fid |
| `clean_bicubic` | Pillow's bicubic filter, widened when shrinking; float, clipped to 0..255 | Clean-FID (arXiv:2104.11222) |
| `none` | as it is | images that have the network's size |
"""  # noqa: E501 (a table)

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dimo_jax.types import Array, Float, UserError, choose

__all__ = ["RESIZES", "resize"]

Matrix = Float[np.ndarray, "out size"]


def _two_neighbours(positions: Float[np.ndarray, " out"], size: int) -> Matrix:
  """Linear interpolation at positions between the pixels 0 .. size - 1."""
  low = np.floor(positions).astype(int)
  fraction = positions - low
  rows = np.arange(len(positions))
  matrix = np.zeros((len(positions), size))
  np.add.at(matrix, (rows, np.minimum(low, size - 1)), 1 - fraction)
  np.add.at(matrix, (rows, np.minimum(low + 1, size - 1)), fraction)
  return matrix


def _tf1_bilinear(size: int, out: int) -> Matrix:
  """TensorFlow 1's `ResizeBilinear`, neither corners nor centres aligned; positions in float32."""
  scale = np.float32(size) / np.float32(out)
  positions = np.arange(out, dtype=np.float32) * scale
  return _two_neighbours(positions.astype(np.float64), size)


def _torch_bilinear(size: int, out: int) -> Matrix:
  """PyTorch's `interpolate(mode="bilinear", align_corners=False)`; not antialiased."""
  positions = (np.arange(out) + 0.5) * (size / out) - 0.5
  return _two_neighbours(np.maximum(positions, 0), size)


def _clean_bicubic(size: int, out: int) -> Matrix:
  """Pillow's bicubic filter (a = -1/2) of float images: weights over the support, normalised."""
  scale = size / out
  width = max(scale, 1.0)  # the filter grows with the shrinking: antialiased
  matrix = np.zeros((out, size))
  for i in range(out):
    centre = (i + 0.5) * scale
    low = max(int(centre - 2 * width + 0.5), 0)
    high = min(int(centre + 2 * width + 0.5), size)
    weights = _cubic((np.arange(low, high) - centre + 0.5) / width)
    matrix[i, low:high] = weights / weights.sum()
  return matrix


def _cubic(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
  x = np.abs(x)
  near = (1.5 * x - 2.5) * x * x + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  return np.where(x < 1, near, np.where(x < 2, far, 0))


RESIZES: dict[str, Callable[[int, int], Matrix] | None] = {
  "tf1_bilinear": _tf1_bilinear,
  "torch_bilinear": _torch_bilinear,
  "clean_bicubic": _clean_bicubic,
  "none": None,
}


@functools.lru_cache(maxsize=16)
def _matrix(name: str, size: int, out: int) -> Matrix:
  function = RESIZES[name]
  assert function is not None
  return function(size, out).astype(np.float32)


def resize(
  images: Float[Array, "b h w c"], name: str, side: int
) -> Float[Array, "b side2 side2 c"]:
  """Images of levels 0..255 with `side` pixels a side, by one of `RESIZES`; float32.

  Raises:
    UserError: no such resize, or "none" and images of another size.
  """
  function = choose(RESIZES, name, "resize")
  _, height, width, _ = images.shape
  if function is None:
    if (height, width) != (side, side):
      raise UserError(f"resize='none': images are {width}x{height}, must be {side}x{side}")
    return images
  highest = jax.lax.Precision.HIGHEST
  rows, columns = _matrix(name, height, side), _matrix(name, width, side)
  images = jnp.einsum("ow,bhwc->bhoc", columns, images, precision=highest)
  images = jnp.einsum("oh,bhwc->bowc", rows, images, precision=highest)
  return jnp.clip(images, 0, 255) if name == "clean_bicubic" else images
