"""What rebuilds a run's networks and samplers anywhere: its whole config and its images' shape."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dimo_jax.build import Models, build_models
from dimo_jax.types import UserError
from dimo_jax.writers import write_atomically

CONFIG_FILE = "config.json"  # of a workdir


def _installed_version() -> str:
  try:
    return importlib.metadata.version("dimo-jax")
  except importlib.metadata.PackageNotFoundError:  # run from a checkout
    return "unknown"


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A config with what it takes from its data set.

  Attributes:
    image_shape: (height, width, channels); None where the tokenizer knows tokens only.
    version: of the dimo_jax that recorded it.
  """

  config: ConfigDict
  image_shape: tuple[int, int, int] | None
  version: str = dataclasses.field(default_factory=_installed_version)

  def to_dict(self) -> dict[str, Any]:
    """As JSON takes it."""
    return {
      "config": self.config.to_dict(),
      "image_shape": self.image_shape,
      "version": self.version,
    }

  @classmethod
  def from_dict(cls, record: Mapping[str, Any], where: str) -> "Recipe":
    """The inverse of `to_dict`, also after JSON.

    Raises:
      UserError: it lacks an entry; `where` says whose it is.
    """
    try:
      config, shape = _tuples(record["config"]), _tuples(record["image_shape"])
      return cls(ConfigDict(config).lock(), shape, record["version"])
    except (KeyError, TypeError) as error:
      raise UserError(f"{where} holds no recorded config: {error!r}") from error

  def models(self, where: str) -> Models:
    """Networks and samplers; no data set is opened.

    Raises:
      UserError: the config is another version's, or names what is not there; `where` as above.
    """
    try:
      return build_models(self.config, self.image_shape)
    except (AttributeError, KeyError, TypeError) as error:
      line = str(error).splitlines()[0]
      raise UserError(
        f"{where} was recorded by dimo_jax {self.version}, and this version differs: {line}"
      ) from error

  def save(self, workdir: Path) -> None:
    """Records it in a workdir."""
    write_atomically(workdir / CONFIG_FILE, json.dumps(self.to_dict(), indent=1))

  @classmethod
  def load(cls, workdir: Path) -> "Recipe":
    """What a workdir recorded.

    Raises:
      UserError: it recorded none, or a damaged one.
    """
    path = workdir / CONFIG_FILE
    try:
      return cls.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError as error:
      raise UserError(
        f"{str(workdir)!r} holds no {CONFIG_FILE}; a workdir of an older version records it when"
        " --mode=train is run there again, with its --config"
      ) from error
    except (OSError, ValueError) as error:
      raise UserError(f"{path} cannot be read: {error}") from error


def _tuples(value: Any) -> Any:
  """JSON's lists as tuples, which configs have."""
  if isinstance(value, Mapping):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
