"""Samplers: from a network and a condition to tokens or images."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from dimo_jax.state import NetworkState
from dimo_jax.types import Array, Condition, Key

__all__ = ["Sampler", "plain_settings"]


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


def plain_settings(sampler: Sampler) -> dict[str, Any]:
  """The sampler's fields that JSON can hold, with its name and steps."""
  assert dataclasses.is_dataclass(sampler)
  plain = (bool, int, float, str, type(None), tuple, list)
  fields = {field.name: getattr(sampler, field.name) for field in dataclasses.fields(sampler)}
  fields = {name: value for name, value in fields.items() if isinstance(value, plain)}
  return fields | {"name": sampler.name, "steps": sampler.num_steps}
