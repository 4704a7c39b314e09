"""Published evaluations of a generator of noise, on any number of devices and processes."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from dimo_jax.distributed import on_first
from dimo_jax.evaluation import generation, image_sets, jobs, references
from dimo_jax.evaluation.published import PublishedProtocol
from dimo_jax.generators import NetworkGenerator
from dimo_jax.state import NetworkState
from dimo_jax.teachers.tokenizers import PixelTokenizer
from tests import tiny_inception

SIDE, BATCH_SIZE = 8, 32
PIXELS = PixelTokenizer((SIDE, SIDE, 3))
PROTOCOL = PublishedProtocol(
  name="tiny",
  source="here",
  statistics="made here",
  image_size=SIDE,
  num_classes=3,
  rounding="nearest",
  resize="none",
  num_images=60,
  num_splits=2,
  num_kept=32,
)


@dataclasses.dataclass(frozen=True)
class Noise:
  """A sampler of noise, brighter in every class."""

  num_steps = 1
  name = "noise"

  def at(self, clock):
    return self

  def sample(self, network, condition, key):
    class_id = condition["class_id"][:, None, None, None]
    noise = jax.random.uniform(key, (len(class_id), SIDE, SIDE, 3), minval=-1)
    return noise * network.params["scale"] + class_id / 8


def evaluate(mesh: jax.sharding.Mesh, folder: Path) -> list[dict[str, Any]]:
  """Rows of the generator and of finished images, both in `folder`/results.jsonl; images are
  decoded two a device at a time.
  """
  network = tiny_inception.network(SIDE)
  random = np.random.default_rng(0)
  real = random.integers(0, 256, (100, SIDE, SIDE, 3), np.uint8)
  features = {
    tap: np.asarray(tiny_inception.features(network.params, real, "none", (tap,))[tap])
    for tap in tiny_inception.SIZES
  }

  def write() -> None:
    folder.mkdir()
    np.savez(folder / "images.npz", real[:60])
    pool = features["2048"]
    covariance = np.cov(pool, rowvar=False)
    np.savez(folder / "statistics.npz", mu=pool.mean(0), sigma=covariance, features=pool[:32])

  on_first(write)
  state = NetworkState.create(
    apply_fn=None, params={"scale": np.float32(0.5)}, tx=optax.set_to_zero(), autoencoder={}
  )
  generator = NetworkGenerator({"model": "student"}, Noise(), PIXELS, state, 3, mesh)
  with pytest.MonkeyPatch.context() as patch:
    tiny_inception.install(patch)
    patch.setattr(generation, "PIXELS_PER_DEVICE", 2 * SIDE * SIDE)
    reference = references.read_reference(folder / "statistics.npz")
    judge = jobs.Judge(PROTOCOL, reference, network, mesh, BATCH_SIZE)
    out = folder / "results.jsonl"
    images = image_sets.open_images(folder / "images.npz")
    return [
      jobs.evaluate_generator(judge, generator, out, generator.source),
      jobs.evaluate_images(judge, images, out),
    ]
