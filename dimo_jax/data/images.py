"""Encoded images to arrays: decoding, and ADM's scaling with a crop of the centre."""

import io
import re

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dimo_jax.types import UserError

__all__ = ["centre_crop", "check_shape", "decode_image", "sample"]

_MAX_ASPECT = 100  # of the sides; scaling the shorter one of a narrower image would make a huge one


def decode_image(
  file: str | io.BytesIO, name: str, *, image_size: int, channels: int = 3
) -> UInt8[np.ndarray, "h w {channels}"]:
  """A PNG, JPEG or WebP file as levels 0..255.

  Args:
    name: what an error calls the image.
    image_size: pixels a side, by `centre_crop`; 0 leaves the size as it is.
    channels: 3 is RGB, 1 grey; other images are converted, without their transparency.

  Raises:
    UserError: no image, or a damaged one.
  """
  try:
    with Image.open(file) as encoded:
      if encoded.mode[0] in "IF":  # which Pillow would clip to white
        raise ValueError("more than 8 bits a pixel and channel")
      if image_size and max(encoded.size) > _MAX_ASPECT * min(encoded.size):
        raise ValueError(f"{encoded.width}x{encoded.height} pixels are too narrow for a square")
      image = encoded.convert("L" if channels == 1 else "RGB")
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise UserError(f"{name} cannot be read as an image: {_first_line(error)}") from error
  if image_size:
    image = centre_crop(image, image_size)
  levels = np.asarray(image)
  return levels[:, :, None] if channels == 1 else levels


def centre_crop(image: Image.Image, size: int) -> Image.Image:
  """The central square, scaled to [size, size].

  The shorter side is halved by box filter while it stays at least `size`, then scaled by bicubic
  filter. Source: `center_crop_arr` of ADM, arXiv:2105.05233; EDM's ImageNet-64 was made so.
  """
  while min(image.size) >= 2 * size:
    width, height = image.size
    image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
  scale = size / min(image.size)
  width, height = (round(side * scale) for side in image.size)
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = (width - size) // 2, (height - size) // 2
  return image.crop((left, top, left + size, top + size))


def check_shape(
  levels: UInt8[np.ndarray, "h w c"], image_shape: tuple[int, int, int], name: str
) -> None:
  """Raises UserError where an image is not of the size that the others have."""
  if levels.shape != image_shape:
    size, wanted = (f"{shape[1]}x{shape[0]}" for shape in (levels.shape, image_shape))
    raise UserError(
      f"{name} has {size} pixels, not {wanted} as the others: data.image_size=0 needs images of one"
      " size; set it to the pixels a side that they are to have"
    )


def sample(
  levels: UInt8[np.ndarray, "h w c"], class_id: np.integer, num_levels: int
) -> dict[str, np.ndarray]:
  """What a source gives: {"image": float32 [h, w, c] in [-1, 1], "class_id": scalar}."""
  scale = np.float32(2 / (num_levels - 1))
  image = levels.astype(np.float32) * scale - np.float32(1)
  return {"image": image, "class_id": np.asarray(class_id)}


def _first_line(error: Exception) -> str:
  # Pillow names the file, or the buffer's address.
  lines = re.sub(r" (<_io\.BytesIO object at \w+>|'.*'$)", "", str(error)).splitlines()
  return lines[0] if lines else type(error).__name__
