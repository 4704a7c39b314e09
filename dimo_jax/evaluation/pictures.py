"""Picture grids as PNG files."""

import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from dimo_jax.types import Array, Float, UInt8, UserError

_MIN_SIDE = 32  # pixels; smaller images are enlarged by whole factors
_MAX_COLUMNS, _MAX_WIDTH = 10, 1280  # of a grid, in images and in pixels without gaps
_GAP = 2
_CAPTION = 16
_PAPER = (255, 255, 255)


def to_uint8(images: Float[Array, "*n h w c"]) -> UInt8[Array, "*n h w c"]:
  """Pixels 0 .. 255 of images in [-1, 1]."""
  return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def grid(images: Float[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "height width 3"]:
  """Images in [-1, 1], row by row, with thin gaps; grey ones become RGB.

  Ten in a row, or as many as fit: five of 256 pixels.
  """
  return tile(np.asarray(to_uint8(jnp.asarray(images))))


def tile(pixels: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "height width 3"]:
  """As `grid`, of pixels.

  Raises:
    UserError: neither grey images nor RGB.
  """
  n, h, w, c = pixels.shape
  if c not in (1, 3):
    raise UserError(
      f"images of {c} channels cannot be drawn, only of 1 or 3; their numbers are what"
      " dimo_jax.load(...).sample returns"
    )
  factor = max(1, -(-_MIN_SIDE // max(h, w)))
  pixels = np.repeat(pixels, 3, axis=-1) if c == 1 else pixels
  pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
  h, w = h * factor, w * factor
  num_columns = max(1, min(n, _MAX_COLUMNS, _MAX_WIDTH // w))
  num_rows = -(-n // num_columns)
  canvas = np.full(
    (num_rows * (h + _GAP) - _GAP, num_columns * (w + _GAP) - _GAP, 3), 255, np.uint8
  )
  for i, image in enumerate(pixels):
    top, left = i // num_columns * (h + _GAP), i % num_columns * (w + _GAP)
    canvas[top : top + h, left : left + w] = image
  return canvas


def side_by_side(panels: Mapping[str, Float[np.ndarray, "n h w c"]]) -> np.ndarray:
  """Captioned grids next to each other: uint8 [height, width, 3]."""
  grids = {caption: grid(images) for caption, images in panels.items()}
  height = max(g.shape[0] for g in grids.values()) + _CAPTION
  width = sum(g.shape[1] for g in grids.values()) + 8 * (len(grids) - 1)
  canvas = Image.new("RGB", (width, height), _PAPER)
  left = 0
  for caption, pixels in grids.items():
    ImageDraw.Draw(canvas).text((left, 1), caption, fill=(0, 0, 0))
    canvas.paste(Image.fromarray(pixels), (left, _CAPTION))
    left += pixels.shape[1] + 8
  return np.asarray(canvas)


def save_png(path: Path, pixels: UInt8[np.ndarray, "height width 3"]) -> None:
  """Writes a PNG atomically."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  Image.fromarray(pixels).save(temporary, format="PNG")
  os.replace(temporary, path)
