"""Tensors of a checkpoint file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from dimo_jax.types import UserError


class Archive(NamedTuple):
  """What a file holds."""

  tensors: Mapping[str, np.ndarray]
  settings: Any


def read(path: Path) -> Archive:
  """The tensors of a safetensors file."""
  if not path.exists():
    raise UserError(f"{path} does not exist")
  return Archive(load_file(path), {})
