"""The VQGAN tokenizer: a published network from a file; nothing here is trained."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dimo_jax.convert import families, files
from dimo_jax.convert import vqgan as published
from dimo_jax.models.vqgan import NUM_GROUPS, VQGAN
from dimo_jax.remote import local_path
from dimo_jax.types import Array, Float, Int, Key, Params, UserError

RANDOM = "random"  # in place of a path
CHECKPOINT = "last.ckpt"


@functools.partial(jax.jit, static_argnames="network")
def _init(network: VQGAN, key: Key, images: Float[Array, "b h w c"]) -> Params:
  return network.init(key, images)


@dataclasses.dataclass(frozen=True)
class VQGANTokenizer:
  """Images to the codes of a VQGAN and back.

  Attributes:
    network: of square images.
    path: of its weights, here, in a bucket or on a hub: a file with the published key names or
      converted from one, a folder with `last.ckpt`, or "random" for random ones. A `model.yaml` in
      the same folder must agree.
  """

  network: VQGAN
  path: str

  needs_images = False

  def __post_init__(self):
    net = self.network
    for name in ("channels", "num_res_blocks", "z_channels", "codebook_size", "code_dim"):
      if getattr(net, name) < 1:
        raise UserError(f"tokenizer.{name}={getattr(net, name)} must be 1 or more")
    if not net.channel_mult or any(
      mult < 1 or net.channels * mult % NUM_GROUPS for mult in (1, *net.channel_mult)
    ):
      raise UserError(
        f"tokenizer.channels={net.channels} times each of tokenizer.channel_mult="
        f"{net.channel_mult} must be a multiple of {NUM_GROUPS}"
      )
    if not self.path:
      raise UserError(
        "tokenizer.path='' must name the weights of tokenizer.name='vqgan', such as last.ckpt, or"
        " be 'random'"
      )

  @property
  def codebook_size(self) -> int:
    """The number of codes."""
    return self.network.codebook_size

  @property
  def grid(self) -> tuple[int, int]:
    """(height, width) in tokens."""
    return self.network.grid_size, self.network.grid_size

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of what it decodes."""
    return self.network.resolution, self.network.resolution, self.network.image_channels

  def fit(self, images: np.ndarray | None, seed: int) -> Params:
    """The parameters of `path`; only random ones depend on the seed.

    Raises:
      UserError: the file cannot be read, or is not of this network.
    """
    del images
    if self.path == RANDOM:
      return self.init(jax.random.key(seed))
    try:
      path = local_path(self.path)
      archive = files.read(path / CHECKPOINT if (path / CHECKPOINT).is_file() else path)
      tensors: Mapping[str, np.ndarray] = archive.tensors
      if "codebook" in tensors:  # converted
        tensors = published.to_published(traverse_util.unflatten_dict(dict(tensors), sep="/"))
      elif (name := families.guess(archive)) != "vqgan":
        raise UserError(f"it is {families.FAMILIES[name].title}, not a VQGAN")
      self._check_settings(tensors, published.yaml_beside(archive.path))
      params = published.from_published(tensors, self.network)
    except UserError as error:
      raise UserError(f"tokenizer.path={self.path!r}: {error}") from error
    return jax.tree.map(jnp.asarray, params)

  def _check_settings(self, tensors: Mapping[str, np.ndarray], model_yaml: str) -> None:
    resolution = self.network.resolution
    found = published.settings(tensors, resolution=resolution, model_yaml=model_yaml)
    wrong = [
      f"{name} {value} for {getattr(self.network, name)}"
      for name, value in found.items()
      if value != getattr(self.network, name)
    ]
    if wrong:
      raise UserError(f"does not fit the tokenizer of the config: {'; '.join(wrong)}")

  def init(self, key: Key) -> Params:
    """Random parameters."""
    # Hundreds of initialisers compile several times faster with this generator.
    key = jax.random.wrap_key_data(jax.random.bits(key, (4,)), impl="unsafe_rbg")
    return _init(self.network, key, jnp.zeros((1, *self.image_shape)))["params"]

  def shapes(self) -> Params:
    """Shapes and types of its parameters."""
    return jax.eval_shape(self.init, jax.random.key(0))

  def _apply(self, params: Params, inputs: Array, method: str) -> Array:
    outputs = self.network.apply({"params": params}, inputs, method=method)
    return cast(Array, outputs)  # not (outputs, state): nothing is mutable

  def encode(self, params: Params, images: Float[Array, "b h w c"]) -> Int[Array, "b l"]:
    """The codes of images, row by row."""
    return self._apply(params, images, "encode").reshape(len(images), -1)

  def decode(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b h w c"]:
    """Images of codes, within [-1, 1]."""
    codes = tokens.reshape(-1, *self.grid)
    return jnp.clip(self._apply(params, codes, "decode"), -1, 1)
