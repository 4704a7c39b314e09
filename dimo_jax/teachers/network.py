"""What a teacher is: a network of one of two kinds, with its null class and its process.

To add one: a frozen dataclass that derives from `MaskedNetwork` or `GaussianNetwork` and names a
linen module, a row in `TEACHERS` that makes it from a config.
"""

import abc
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from dimo_jax.processes.gaussian import GaussianProcess, Noised
from dimo_jax.state import NetworkState, copy_tree, split
from dimo_jax.types import Array, Condition, Int, Key, Params

_NO_UPDATE = optax.set_to_zero()  # one object, so that jitted functions know it again


class ClassNetwork(abc.ABC):
  """A class-conditional network without its parameters, which live in train states.

  Generator, fake score and teacher are the same network, so the states of all three are made here.
  A subclass is a frozen dataclass: equal networks give equal states, and nothing compiles twice.

  Attributes:
    kind: "masked" or "gaussian".
    network: called with (inputs, class ids int32 [b], **options), unless a subclass has an `init`
      and an `apply` of its own.
  """

  kind: str
  network: nn.Module

  def init(self, key: Key) -> Params:
    """Random parameters."""
    return jax.jit(self.network.init)(key, self.example, jnp.zeros(1, jnp.int32))["params"]

  def apply(self, *arguments: Any, **options: Any) -> Array:
    """The network's answer to (params, inputs, condition), as `NetworkState.apply_fn` has it."""
    params, inputs, condition = arguments
    output = self.network.apply({"params": params}, inputs, condition["class_id"], **options)
    return cast(Array, output)  # not (output, state): nothing is mutable

  @property
  @abc.abstractmethod
  def null_class(self) -> int:
    """The class id that stands for none."""

  @property
  @abc.abstractmethod
  def example(self) -> Any:
    """Inputs of one sample, as `apply` takes them after the parameters."""

  @property
  def forward_flops(self) -> float:
    """Floating-point operations of one sample's forward pass, as XLA counts the program's."""
    params = jax.eval_shape(self.init, jax.random.key(0))
    condition = {"class_id": jnp.zeros(1, jnp.int32)}
    cost = jax.jit(self.apply).lower(params, self.example, condition).cost_analysis() or {}
    return cost.get("flops", math.nan)

  def null_condition(self, condition: Condition) -> Condition:
    """No class, for every sample."""
    return {"class_id": jnp.full_like(condition["class_id"], self.null_class)}

  def frozen_state(self, params: Params, tokenizer_params: Params) -> NetworkState:
    """The teacher's own state: nothing in it is ever updated."""
    return NetworkState.create(
      apply_fn=self.apply,
      params=params,
      tx=_NO_UPDATE,
      autoencoder=tokenizer_params,
      null_fn=self.null_condition,
    )

  def trained_state(self, params: Params, tx: Any, frozen: tuple[str, ...] = ()) -> NetworkState:
    """A trained network that starts as a copy of `params`; `frozen` are regexes on paths."""
    trainable, rest = split(copy_tree(params), frozen)
    return NetworkState.create(
      apply_fn=self.apply, params=trainable, frozen=rest, tx=tx, null_fn=self.null_condition
    )


class MaskedNetwork(ClassNetwork):
  """A teacher of tokens: from tokens [b, l] and a condition to logits [b, l, v].

  The outputs are the codes and, last, the mask id. Options are `noise` and `sigma`, unless
  `dimo.sigma` is 0, and `dropout_key`, where `dimo.dropout` or `teacher.pretrain.dropout` is on.
  """

  kind = "masked"

  @property
  @abc.abstractmethod
  def num_tokens(self) -> int:
    """Tokens of a sample."""

  @property
  @abc.abstractmethod
  def codebook_size(self) -> int:
    """Number of codes."""

  @property
  def mask_token_id(self) -> int:
    """The id that stands for a masked token: the first after the codes."""
    return self.codebook_size

  @property
  def example(self) -> Int[Array, "1 l"]:
    """One grid of tokens."""
    return jnp.zeros((1, self.num_tokens), jnp.int32)


class GaussianNetwork(ClassNetwork):
  """A teacher of images: from `Noised(xt, sigma)` and a condition to x0 [b, h, w, c].

  Options are `output`, where `dmd2` has a critic: what it looks at is then asked for; and
  `dropout_key`, where `teacher.pretrain.dropout` is on.

  Attributes:
    process: the noise levels that it was or will be trained on.
  """

  kind = "gaussian"
  process: GaussianProcess

  @property
  @abc.abstractmethod
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of what it denoises."""

  @property
  def example(self) -> Noised:
    """One noised image."""
    return Noised(jnp.zeros((1, *self.image_shape)), jnp.ones(1))
