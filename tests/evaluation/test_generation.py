import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimo_jax.evaluation import generation, pictures
from dimo_jax.sharding import make_mesh
from dimo_jax.state import NetworkState
from dimo_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Scaling:
  """A tokenizer whose calls tell how many images they were given."""

  case: int  # another one is compiled anew

  image_shape = (4, 4, 1)
  codebook_size = 8

  def encode(self, params, images):
    calls.append(len(images))
    return (images[:, :, 0, 0] / params["factor"]).astype(jnp.int32)

  def decode(self, params, tokens):
    calls.append(len(tokens))
    return (
      jnp.broadcast_to(tokens[:, :, None, None] * 1.0, (len(tokens), 4, 4, 1)) * params["factor"]
    )


calls: list[int] = []


@pytest.fixture(autouse=True)
def no_calls():
  calls.clear()


@pytest.fixture
def two_a_device(monkeypatch):
  monkeypatch.setattr(generation, "PIXELS_PER_DEVICE", 32)


def tokens(n):
  return np.arange(4 * n, dtype=np.int32).reshape(n, 4)


@dataclasses.dataclass(frozen=True)
class Given:
  """A sampler whose samples are the network's parameters."""

  num_steps = 1
  name = "given"

  def at(self, clock):
    return self

  def sample(self, network, condition, key):
    return network.params["tokens"]


@pytest.mark.parametrize("n", [1, 16, 17, 40])
def test_images_are_decoded_a_few_at_a_time(two_a_device, n):
  network = NetworkState.create(
    apply_fn=None,
    params={"tokens": jnp.asarray(tokens(n))},
    tx=optax.set_to_zero(),
    autoencoder={"factor": jnp.asarray(2)},
  )
  images, encoded = generation.sample_images(
    Given(),
    Scaling(n),
    network,
    {"class_id": jnp.zeros(n, jnp.int32)},
    jax.random.key(0),
    make_mesh(),
  )
  np.testing.assert_array_equal(encoded, tokens(n))
  np.testing.assert_array_equal(images[..., 0, 0], 2.0 * tokens(n))
  assert calls == [min(n, 16)]  # traced once, for parts of one size


@pytest.mark.parametrize("n", [3, 37])
def test_images_are_encoded_a_few_at_a_time(two_a_device, n):
  images = np.broadcast_to(tokens(n)[:, :, None, None], (n, 4, 4, 1)).astype(np.float32)
  found = generation.encode_images(Scaling(n), {"factor": jnp.asarray(1)}, images, make_mesh())
  np.testing.assert_array_equal(found, tokens(n))
  assert calls == [min(n, 16)]


@pytest.mark.parametrize(
  ("side", "n", "columns", "rows"),
  [(256, 40, 5, 8), (256, 3, 3, 1), (64, 40, 10, 4), (8, 40, 10, 4), (2000, 2, 1, 2)],
)
def test_a_grid_is_as_wide_as_a_screen(side, n, columns, rows):
  pixels = pictures.grid(np.broadcast_to(np.float32(0), (n, side, side, 3)))
  side = max(side, 32)
  assert pixels.shape == (rows * (side + 2) - 2, columns * (side + 2) - 2, 3)


def test_images_of_two_channels_are_no_picture():
  with pytest.raises(UserError, match="images of 2 channels cannot be drawn, only of 1 or 3"):
    pictures.grid(np.zeros((1, 4, 4, 2), np.float32))
