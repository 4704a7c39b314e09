"""Many samples of one network, sharded over the mesh and timed."""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from dimo_jax.samplers import Sampler
from dimo_jax.sharding import fetch, local_rows, shard_batch
from dimo_jax.state import NetworkState
from dimo_jax.types import Array, Condition, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Generated:
  """Samples on the host.

  Attributes:
    images: float32 [n, h, w, c] in [-1, 1].
    tokens: int32 [n, l]; None where the tokenizer makes none.
    images_per_second: over all calls after compilation, decoder included.
  """

  images: Float[np.ndarray, "n h w c"]
  tokens: Int[np.ndarray, "n l"] | None
  images_per_second: float


@functools.partial(jax.jit, static_argnames=("sampler", "tokenizer"))
def sample_images(
  sampler: Sampler,
  tokenizer: Any,
  network: NetworkState,
  condition: Condition,
  key: Key,
) -> tuple[Float[Array, "b h w c"], Array]:
  """Images for one batch, and what they were decoded from; the decoder's parameters sit in
  `network`.
  """
  encoded = sampler.sample(network, condition, key)
  return tokenizer.decode(network.autoencoder, encoded), encoded


def generate(
  sampler: Sampler,
  tokenizer: Any,
  network: NetworkState,
  labels: Int[np.ndarray, " n"],
  *,
  seed: int,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  between_batches: Any = None,
) -> Generated:
  """One sample per label; batch i is drawn with `fold_in(key(seed), i)`.

  Args:
    batch_size: a multiple of the number of devices; the last batch is filled up and cut.
    between_batches: called after every batch, to stop early by an exception.
  """
  batch_size = min(batch_size, -(-len(labels) // mesh.size) * mesh.size)
  num_batches = -(-len(labels) // batch_size)
  filled = np.resize(labels, (num_batches, batch_size)).astype(np.int32)
  rows = local_rows(batch_size, mesh)
  key = jax.random.key(seed)
  images, tokens, seconds = [], [], 0.0
  for i in range(num_batches):
    class_id = shard_batch(filled[i, rows], mesh)
    arguments = (network, {"class_id": class_id}, jax.random.fold_in(key, i))
    if i == 0:  # compile outside the timing
      jax.block_until_ready(sample_images(sampler, tokenizer, *arguments))
    began = time.perf_counter()
    batch = jax.block_until_ready(sample_images(sampler, tokenizer, *arguments))
    seconds += time.perf_counter() - began
    images.append(fetch(batch[0]))
    if tokenizer.codebook_size:
      tokens.append(fetch(batch[1]))
    if between_batches is not None:
      between_batches()
  return Generated(
    np.concatenate(images)[: len(labels)],
    np.concatenate(tokens)[: len(labels)] if tokens else None,
    filled.size / seconds,
  )
