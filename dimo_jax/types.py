"""Names shared by every module: array annotations, trees, and the one error users see."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8, UInt32

__all__ = [
  "Array",
  "Batch",
  "Bool",
  "Condition",
  "Float",
  "Int",
  "Key",
  "Metrics",
  "Params",
  "UInt8",
  "UInt32",
  "UnknownName",
  "UserError",
  "check_pattern",
  "choose",
  "suggest",
]

T = TypeVar("T")
Key = PRNGKeyArray
Params = Mapping[str, Any]  # a nested dict of arrays, as linen makes it
Batch = Mapping[str, Any]
Condition = Mapping[str, jax.Array]  # e.g. {"class_id": int32 [b]}
Metrics = dict[str, jax.Array]


class UserError(Exception):
  """Bad input: its text is one line that names the field, the value and what would be right.

  `main` prints it without a traceback and exits with status 2.
  """


class UnknownName(UserError):
  """A name that is in no registry, though a user's own file may add it."""


def choose(registry: Mapping[str, T], name: str, field: str, *, extensible: bool = False) -> T:
  """The entry of a registry that a config field names.

  Args:
    extensible: users may add rows of their own.

  Raises:
    UserError: naming the field, the unknown value, the nearest entry and all entries; UnknownName
      where it is extensible.
  """
  if name in registry:
    return registry[name]
  error = UnknownName if extensible else UserError
  raise error(f"{field}={name!r} is unknown{suggest(name, registry)}")


def suggest(name: str, known: Iterable[str]) -> str:
  """The tail of an error line: the nearest known name, then all of them."""
  known = sorted(known)
  near = difflib.get_close_matches(str(name), known, n=1)
  return (f"; did you mean {near[0]!r}?" if near else ";") + f" known: {', '.join(known)}"


def check_pattern(pattern: str, field: str) -> None:
  """Raises UserError where a config field holds what is no regular expression."""
  try:
    re.compile(pattern)
  except re.error as error:
    raise UserError(f"{field}={pattern!r} is no regular expression: {error}") from error
