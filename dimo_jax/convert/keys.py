"""Strict comparison of a published state dict with the names and shapes that a network needs."""

import difflib
from collections.abc import Mapping

import numpy as np

from dimo_jax.convert.files import Tensors
from dimo_jax.types import UserError

_MAX_LISTED = 12  # names of each kind in an error line

Shapes = dict[str, tuple[int, ...]]


def shapes_of(tensors: Mapping[str, np.ndarray]) -> Shapes:
  """The shapes of a state dict, without reading what lies on the disk."""
  if isinstance(tensors, Tensors):
    return tensors.shapes
  return {name: np.shape(value) for name, value in tensors.items()}


def check(given: Shapes, expected: Shapes, what: str) -> None:
  """Compares the names and shapes of a state dict with those of a network, described by `what`.

  Raises:
    UserError: names are missing, unexpected or misshapen; they are listed, the unexpected ones
      with the nearest expected name.
  """
  missing = [name for name in expected if name not in given]
  unexpected = [name for name in sorted(given) if name not in expected]
  misshapen = [
    f"{name} {given[name]} for {shape}"
    for name, shape in expected.items()
    if name in given and tuple(given[name]) != tuple(shape)
  ]
  if missing or unexpected or misshapen:
    near = [_with_nearest(name, missing or list(expected)) for name in unexpected[:_MAX_LISTED]]
    raise UserError(
      f"not {what}: missing keys {_listed(missing)}; unexpected keys"
      f" {_listed(near + unexpected[_MAX_LISTED:])}; misshapen keys {_listed(misshapen)}"
    )


def _with_nearest(name: str, expected: list[str]) -> str:
  near = difflib.get_close_matches(name, expected, n=1)
  return name + (f" (nearest: {near[0]})" if near else "")


def _listed(names: list[str]) -> str:
  more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
  return (", ".join(names[:_MAX_LISTED]) or "none") + more
