"""Many samples of one network, sharded over the mesh and timed; images decoded a few at a time."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dimo_jax.samplers import Sampler
from dimo_jax.sharding import fetch, local_rows, shard_batch
from dimo_jax.state import NetworkState
from dimo_jax.types import Array, Condition, Float, Int, Key, Params

# Encoded or decoded by one device in one call: 8 images of 256x256, whose activations in a VQGAN
# take 0.3 GB a layer.
PIXELS_PER_DEVICE = 2**19


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


@functools.partial(jax.jit, static_argnames="sampler")
def _sample(sampler: Sampler, network: NetworkState, condition: Condition, key: Key) -> Array:
  return sampler.sample(network, condition, key)


@functools.partial(jax.jit, static_argnames="tokenizer")
def _encode(tokenizer: Any, params: Params, images: Array) -> Array:
  return tokenizer.encode(params, images)


@functools.partial(jax.jit, static_argnames="tokenizer")
def _decode(tokenizer: Any, params: Params, encoded: Array) -> Array:
  return tokenizer.decode(params, encoded)


def _in_parts(
  call: Callable[[Any, Params, Any], Array],
  tokenizer: Any,
  params: Params,
  inputs: Any,
  mesh: jax.sharding.Mesh,
) -> np.ndarray:
  """`call` on as many inputs at a time as the devices have memory for."""
  height, width, _ = tokenizer.image_shape
  size = mesh.size * max(1, PIXELS_PER_DEVICE // (height * width))
  if len(inputs) <= size:
    return fetch(call(tokenizer, params, inputs))
  inputs, parts, rows = fetch(inputs), [], local_rows(size, mesh)
  for start in range(0, len(inputs), size):
    part = np.resize(inputs[start : start + size], (size, *inputs.shape[1:]))  # the last is filled
    parts.append(fetch(call(tokenizer, params, shard_batch(part[rows], mesh))))
  return np.concatenate(parts)[: len(inputs)]


def encode_images(
  tokenizer: Any, params: Params, images: Float[np.ndarray, "n h w c"], mesh: jax.sharding.Mesh
) -> np.ndarray:
  """What the teacher models, of any number of images."""
  return _in_parts(_encode, tokenizer, params, images, mesh)


def decode_images(
  tokenizer: Any, params: Params, encoded: Any, mesh: jax.sharding.Mesh
) -> Float[np.ndarray, "n h w c"]:
  """Images of any number of what `encode_images` or a sampler makes."""
  return _in_parts(_decode, tokenizer, params, encoded, mesh)


def sample_images(
  sampler: Sampler,
  tokenizer: Any,
  network: NetworkState,
  condition: Condition,
  key: Key,
  mesh: jax.sharding.Mesh,
) -> tuple[Float[np.ndarray, "b h w c"], Array]:
  """Images for one batch, and what they were decoded from; the decoder's parameters sit in
  `network`.
  """
  encoded = _sample(sampler, network, condition, key)
  return decode_images(tokenizer, network.autoencoder, encoded, mesh), encoded


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
    arguments = (network, {"class_id": class_id}, jax.random.fold_in(key, i), mesh)
    if i == 0:  # compile outside the timing
      sample_images(sampler, tokenizer, *arguments)
    began = time.perf_counter()
    batch = sample_images(sampler, tokenizer, *arguments)
    seconds += time.perf_counter() - began
    images.append(batch[0])
    if tokenizer.codebook_size:
      tokens.append(fetch(batch[1]))
    if between_batches is not None:
      between_batches()
  return Generated(
    np.concatenate(images)[: len(labels)],
    np.concatenate(tokens)[: len(labels)] if tokens else None,
    filled.size / seconds,
  )
