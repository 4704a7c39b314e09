"""What every teacher's network shares: its null class, and the train states of its copies."""

import abc
from typing import Any

import jax.numpy as jnp
import optax

from dimo_jax.state import NetworkState, copy_tree, split
from dimo_jax.types import Array, Condition, Key, Params

_NO_UPDATE = optax.set_to_zero()  # one object, so that jitted functions know it again


class ClassNetwork(abc.ABC):
  """A class-conditional network without its parameters, which live in train states.

  Generator, fake score and teacher are the same network, so the states of all three are made here.
  A subclass is a frozen dataclass: equal networks give equal states, and nothing compiles twice.
  """

  @abc.abstractmethod
  def init(self, key: Key) -> Params:
    """Random parameters."""

  @abc.abstractmethod
  def apply(self, *arguments: Any, **options: Any) -> Array:
    """The network's answer, as `NetworkState.apply_fn` describes it."""

  @property
  @abc.abstractmethod
  def null_class(self) -> int:
    """The class id that stands for none."""

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
