"""Many samples of one network, sharded over the mesh and timed; images decoded a few at a time."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dimo_jax.samplers import Sampler
from dimo_jax.sharding import batch_sharding, fetch, local_rows, shard_batch
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


def _part_size(tokenizer: Any, mesh: jax.sharding.Mesh) -> int:
  height, width, _ = tokenizer.image_shape
  return mesh.size * max(1, PIXELS_PER_DEVICE // (height * width))


def _in_parts(
  call: Callable[[Any, Params, Any], Array],
  tokenizer: Any,
  params: Params,
  inputs: np.ndarray,
  mesh: jax.sharding.Mesh,
) -> np.ndarray:
  """`call` on as many host inputs at a time as the devices have memory for."""
  size = _part_size(tokenizer, mesh)
  if len(inputs) <= size:
    return fetch(call(tokenizer, params, inputs))
  parts, rows = [], local_rows(size, mesh)
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
  tokenizer: Any, params: Params, encoded: np.ndarray, mesh: jax.sharding.Mesh
) -> Float[np.ndarray, "n h w c"]:
  """Images of any number of what `encode_images` makes."""
  return _in_parts(_decode, tokenizer, params, encoded, mesh)


@functools.partial(jax.jit, static_argnames=("size", "mesh"))
def _split(inputs: Array, size: int, mesh: jax.sharding.Mesh) -> list[Array]:
  """Parts of `size` inputs, of which every device keeps those that it has; the last is filled."""
  num_parts = -(-len(inputs) // size)
  missing = num_parts * size - len(inputs)
  filled = jnp.pad(inputs, [(0, missing)] + [(0, 0)] * (inputs.ndim - 1))
  by_device = filled.reshape(mesh.size, num_parts, size // mesh.size, *inputs.shape[1:])
  sharding = batch_sharding(mesh)
  return [
    jax.lax.with_sharding_constraint(part.reshape(size, *inputs.shape[1:]), sharding)
    for part in jnp.moveaxis(by_device, 1, 0)
  ]


@functools.partial(jax.jit, static_argnames=("num", "mesh"))
def _join(parts: list[Array], num: int, mesh: jax.sharding.Mesh) -> Array:
  """Undoes `_split`."""
  by_device = [part.reshape(mesh.size, -1, *part.shape[1:]) for part in parts]
  joined = jnp.stack(by_device, axis=1)
  return joined.reshape(-1, *joined.shape[3:])[:num]


def sample_images(
  sampler: Sampler,
  tokenizer: Any,
  network: NetworkState,
  condition: Condition,
  key: Key,
  mesh: jax.sharding.Mesh,
) -> tuple[Float[Array, "b h w c"], Array]:
  """Images of one batch, and what they were decoded from; the decoder's parameters sit in
  `network`. Both stay on the devices, and nothing is waited for.
  """
  encoded = _sample(sampler, network, condition, key)
  params, size = network.autoencoder, _part_size(tokenizer, mesh)
  if len(encoded) <= size:
    return _decode(tokenizer, params, encoded), encoded
  parts = [_decode(tokenizer, params, part) for part in _split(encoded, size, mesh)]
  return _join(parts, len(encoded), mesh), encoded


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
      jax.block_until_ready(sample_images(sampler, tokenizer, *arguments))
    began = time.perf_counter()
    batch = sample_images(sampler, tokenizer, *arguments)
    images.append(fetch(batch[0]))
    seconds += time.perf_counter() - began
    if tokenizer.codebook_size:
      tokens.append(fetch(batch[1]))
    if between_batches is not None:
      between_batches()
  return Generated(
    np.concatenate(images)[: len(labels)],
    np.concatenate(tokens)[: len(labels)] if tokens else None,
    filled.size / seconds,
  )
