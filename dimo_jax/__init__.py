"""One-step generators by distribution-matching distillation, in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dimo_jax.artifacts import Artifact, load

__all__ = ["Artifact", "load"]


def __getattr__(name: str) -> Any:
  """`load` and `Artifact`, imported when they are first asked for."""
  if name in __all__:
    from dimo_jax import artifacts

    return getattr(artifacts, name)
  raise AttributeError(f"module 'dimo_jax' has no attribute {name!r}")
