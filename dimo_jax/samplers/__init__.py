"""Samplers: from a network and a condition to tokens or images."""

from typing import Protocol, runtime_checkable

from dimo_jax.state import NetworkState
from dimo_jax.types import Array, Condition, Key

__all__ = ["Sampler"]


@runtime_checkable
class Sampler(Protocol):
  """Hashable settings of one way to sample a network."""

  @property
  def name(self) -> str:
    """What a table calls it."""
    ...

  @property
  def num_steps(self) -> int:
    """Steps of one sample."""
    ...

  def at(self, clock: int) -> "Sampler":
    """The sampler of a training's clock, where settings warm up; else itself."""
    ...

  def sample(self, network: NetworkState, condition: Condition, key: Key) -> Array:
    """What the tokenizer decodes, for a batch of conditions."""
    ...
