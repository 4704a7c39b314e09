"""Tokenizers: images to grids of codes and back. Parameters are arguments, never captured."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dimo_jax.types import Array, Float, Int, Params, UserError


@runtime_checkable
class Tokenizer(Protocol):
  """Between images and what a teacher models: tokens, or the images themselves.

  Attributes:
    codebook_size: number of codes; 0 where it makes no tokens.
    grid: (height, width) in tokens, row-major.
    image_shape: (height, width, channels) of the images, in [-1, 1]; None where the tokenizer
      knows tokens only.
    needs_images: whether its parameters are fitted on training images.
  """

  @property
  def codebook_size(self) -> int: ...

  @property
  def grid(self) -> tuple[int, int]: ...

  @property
  def image_shape(self) -> tuple[int, int, int] | None: ...

  @property
  def needs_images(self) -> bool: ...

  def fit(self, images: np.ndarray | None, seed: int) -> Params:
    """Its parameters, on training images [n, h, w, c] where it needs them, else on None."""
    ...

  def shapes(self) -> Params:
    """Shapes and types of its parameters."""
    ...

  def encode(self, params: Params, images: Float[Array, "b h w c"], /) -> Array:
    """What the teacher models: codes [b, l], or images."""
    ...

  def decode(self, params: Params, encoded: Any, /) -> Float[Array, "b h w c"]:
    """Images of it."""
    ...


@dataclasses.dataclass(frozen=True)
class PatchTokenizer:
  """Vector quantisation of square patches by k-means: the codebook is the whole of it.

  Attributes:
    patch_size: pixels along a token's side.
    grid_size: tokens along the image's side.
  """

  image_shape: tuple[int, int, int]
  patch_size: int
  grid_size: int
  codebook_size: int

  needs_images = True

  def __post_init__(self):
    height, width, _ = self.image_shape
    side = self.grid_size * self.patch_size
    if (height, width) != (side, side):
      raise UserError(
        f"tokenizer.grid_size={self.grid_size} times tokenizer.patch_size={self.patch_size} must be"
        f" the image's size, {height}x{width}{self._fitting()}"
      )
    if self.codebook_size < 2:
      raise UserError(f"tokenizer.codebook_size={self.codebook_size} must be 2 or more")

  def _fitting(self) -> str:
    height, width, _ = self.image_shape
    if height != width:
      return ", and that a square: data.image_size crops to one"
    if self.patch_size < 1 or height % self.patch_size:
      return ""
    return f"; patches of {self.patch_size} make a grid of {height // self.patch_size}"

  @property
  def grid(self) -> tuple[int, int]:
    """(height, width) in tokens."""
    return self.grid_size, self.grid_size

  def _patches(self, images: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
    (rows, columns), p = self.grid, self.patch_size
    patches = images.reshape(-1, rows, p, columns, p, self.image_shape[-1])
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), rows * columns, -1)

  def fit(self, images: np.ndarray | None, seed: int) -> Params:
    """{"codebook": float32 [codebook_size, patch_size^2 c]}, the same for the same seed.

    Raises:
      UserError: there are fewer distinct patches than codes.
    """
    assert images is not None  # `needs_images`
    patches = np.asarray(self._patches(jnp.asarray(images)))
    patches = patches.reshape(-1, patches.shape[-1])
    num_distinct = len(np.unique(patches, axis=0))
    if num_distinct < self.codebook_size:
      raise UserError(
        f"tokenizer.codebook_size={self.codebook_size} exceeds the {num_distinct} distinct patches"
        " of the training images"
      )
    from sklearn.cluster import KMeans  # slow to import, needed once in a run

    kmeans = KMeans(self.codebook_size, n_init=1, random_state=seed).fit(patches)
    return {"codebook": kmeans.cluster_centers_.astype(np.float32)}

  def shapes(self) -> Params:
    """Shapes and types of its parameters."""
    shape = self.codebook_size, self.patch_size**2 * self.image_shape[-1]
    return {"codebook": jax.ShapeDtypeStruct(shape, jnp.float32)}

  def encode(self, params: Params, images: Float[Array, "b h w c"]) -> Int[Array, "b l"]:
    """The nearest code of every patch."""
    codebook = params["codebook"]
    distance = jnp.sum(codebook**2, axis=-1) - 2 * self._patches(images) @ codebook.T
    return jnp.argmin(distance, axis=-1).astype(jnp.int32)

  def decode(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b h w c"]:
    """Every token's patch, put in its place."""
    (rows, columns), p = self.grid, self.patch_size
    patches = jnp.asarray(params["codebook"])[tokens].reshape(
      -1, rows, columns, p, p, self.image_shape[-1]
    )
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *self.image_shape)


@dataclasses.dataclass(frozen=True)
class PixelTokenizer:
  """Images as they are, for teachers that model pixels: nothing is fitted or stored."""

  image_shape: tuple[int, int, int]

  codebook_size = 0
  grid = (0, 0)
  needs_images = False

  def fit(self, images: np.ndarray | None, seed: int) -> Params:
    """Nothing to fit."""
    del images, seed
    return {}

  def shapes(self) -> Params:
    """There are no parameters."""
    return {}

  def encode(self, params: Params, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The images themselves."""
    del params
    return images

  def decode(self, params: Params, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The images, within [-1, 1]."""
    del params
    return jnp.clip(images, -1, 1)


@dataclasses.dataclass(frozen=True)
class NoTokenizer:
  """Tokens only, for training without pictures: it knows the grid and can neither encode nor
  decode.
  """

  grid_size: int
  codebook_size: int

  image_shape = None
  needs_images = False

  @property
  def grid(self) -> tuple[int, int]:
    """(height, width) in tokens."""
    return self.grid_size, self.grid_size

  def fit(self, images: np.ndarray | None, seed: int) -> Params:
    """Nothing to fit."""
    del images, seed
    return {}

  def shapes(self) -> Params:
    """There are no parameters."""
    return {}

  def encode(self, params: Params, images: Float[Array, "b h w c"]) -> Int[Array, "b l"]:
    """Raises UserError: there are no images."""
    raise UserError("tokenizer.name='none' cannot encode images; name a tokenizer that can")

  def decode(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b h w c"]:
    """Raises UserError: there are no images."""
    raise UserError("tokenizer.name='none' cannot decode tokens; name a tokenizer that can")
