"""Resizes against recorded values, Pillow, and plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dimo_jax import types
from dimo_jax.evaluation.resize import RESIZES, resize


def images(seed=0, shape=(2, 9, 13, 3)):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape), jnp.float32)


def test_tf1_matches_golden(golden):
  arrays = golden("11_inception_features")
  pixels = jnp.asarray(arrays["images_uint8"].transpose(0, 2, 3, 1), jnp.float32)
  found = np.asarray(resize(pixels, "tf1_bilinear", 299))[:, ::23, ::29]
  expected = arrays["tf1_resize_299_sample"].transpose(0, 2, 3, 1)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["tf1_bilinear", "torch_bilinear"])
@pytest.mark.parametrize("side", [5, 9, 21])
def test_bilinear_matches_a_loop(name, side):
  pixels = images()
  shift = 0.5 if name == "torch_bilinear" else 0.0
  expected = np.zeros((2, side, side, 3))
  for i, j in np.ndindex(side, side):
    y = max((i + shift) * 9 / side - shift, 0)
    x = max((j + shift) * 13 / side - shift, 0)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, 8), min(x0 + 1, 12)
    for row, column, weight in (
      (y0, x0, (1 - y + y0) * (1 - x + x0)),
      (y0, x1, (1 - y + y0) * (x - x0)),
      (y1, x0, (y - y0) * (1 - x + x0)),
      (y1, x1, (y - y0) * (x - x0)),
    ):
      expected[:, i, j] += weight * pixels[:, row, column]
  np.testing.assert_allclose(resize(pixels, name, side), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("side", [4, 9, 21])
def test_clean_bicubic_is_pillows(side):
  """Clean-FID resizes each channel as a float image by Pillow, and clips."""
  pixels = images(1)
  expected = np.stack(
    [
      np.stack(
        [
          np.asarray(Image.fromarray(image[:, :, c]).resize((side, side), Image.Resampling.BICUBIC))
          for c in range(3)
        ],
        axis=-1,
      )
      for image in np.asarray(pixels)
    ]
  )
  assert side != 21 or expected.min() < 0 or expected.max() > 255  # there is something to clip
  found = resize(pixels, "clean_bicubic", side)
  np.testing.assert_allclose(found, expected.clip(0, 255), rtol=0, atol=1e-3)


def test_the_resizes_differ():
  pixels = images(2)
  found = [np.asarray(resize(pixels, name, 21)) for name in RESIZES if name != "none"]
  assert all(np.abs(a - b).max() > 1 for i, a in enumerate(found) for b in found[:i])


def test_none_wants_the_size_and_names_are_checked():
  pixels = images(3, (1, 9, 9, 3))
  assert resize(pixels, "none", 9) is pixels
  with pytest.raises(types.UserError, match="images are 13x9, must be 9x9"):
    resize(images(), "none", 9)
  with pytest.raises(types.UserError, match="did you mean 'tf1_bilinear'"):
    resize(pixels, "tf1_bilinar", 9)
