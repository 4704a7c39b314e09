"""What rebuilds networks and samplers anywhere: a whole config and the shape of the images."""

import ast
import dataclasses
import difflib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from dimo_jax.build import Models, build_models
from dimo_jax.checkpoint import ADDED_FIELDS
from dimo_jax.convert import families, files
from dimo_jax.remote import local_path
from dimo_jax.teachers import build_tokenizer
from dimo_jax.teachers.vqgan import CHECKPOINT
from dimo_jax.types import UnknownName, UserError
from dimo_jax.writers import write_atomically

CONFIG_FILE, LOCK_FILE = "config.json", "lock"  # of a workdir


def parse_field(text: str) -> tuple[str, Any]:
  """(name, value) of a flag such as `sampling.temperature=7`; what is no literal is a string."""
  name, _, value = text.partition("=")
  try:
    return name, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return name, value


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
  def from_dict(cls, record: Any, where: str) -> "Recipe":
    """The inverse of `to_dict`, also after JSON.

    Raises:
      UserError: it lacks an entry; `where` says whose it is.
    """
    try:
      config, shape = _tuples(record["config"]), _tuples(record["image_shape"])
      config = _with_added_fields(config)
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
    except UnknownName as error:
      raise UserError(
        f"{error}; one of your own is known once its file is imported (commands: --import=FILE.py)"
      ) from error
    except (AttributeError, KeyError, TypeError) as error:
      line = str(error).splitlines()[0]
      raise UserError(
        f"{where} was recorded by dimo_jax {self.version}, and this version differs: {line}"
      ) from error

  def override(self, fields: Mapping[str, Any]) -> "Recipe":
    """A copy with other values of config fields, by dotted name.

    Raises:
      UserError: no such field, or a value of another type.
    """
    config = self.config.copy_and_resolve_references().unlock()
    known = set(traverse_util.flatten_dict(config.to_dict(), sep="."))
    for name, value in fields.items():
      if name not in known:
        raise UserError(f"{name}={value!r}: no such field{_nearest(name, known)}")
      try:
        config.update_from_flattened_dict({name: _tuples(value)})
      except (TypeError, ValueError) as error:
        raise UserError(f"{name}={value!r}: {error}") from error
    return dataclasses.replace(self, config=config.lock())

  def with_tokenizer(self, location: str) -> "Recipe":
    """A copy whose tokens are decoded by a published VQGAN, whose weights are not read yet.

    Raises:
      UserError: it is no VQGAN, or has another grid or another number of codes.
    """
    archive = _open(location)
    conversion = archive.settings.get("conversion", {})
    if conversion.get("family", "") != "vqgan" and families.guess(archive) != "vqgan":
      raise UserError(f"--tokenizer={location!r} is no VQGAN")
    sizes = conversion.get("sizes") or families.FAMILIES["vqgan"].sizes(archive)
    for name in ("tokenizer.grid_size", "tokenizer.codebook_size"):
      wanted = self.config.tokenizer[name.partition(".")[2]]
      if sizes[name] != wanted:
        raise UserError(f"--tokenizer={location!r} has {name}={sizes[name]}; wanted is {wanted}")
    found = self.override({**sizes, "tokenizer.name": "vqgan", "tokenizer.path": str(location)})
    tokenizer = build_tokenizer(found.config, None)
    return dataclasses.replace(found, image_shape=tokenizer.image_shape)

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


def of_sizes(sizes: Mapping[str, Any], family: str, num_channels: int = 3) -> Recipe:
  """The recipe of published weights: their sizes, and the published settings for the rest.

  Args:
    sizes: by config field, as `convert.families` reads them off the shapes.
    family: a key of its FAMILIES.
    num_channels: of a denoiser's images.
  """
  from configs import base

  recipe = Recipe(base.get_config(), None)
  known = set(traverse_util.flatten_dict(recipe.config.to_dict(), sep="."))
  fields = {name: size for name, size in sizes.items() if name in known}
  if families.FAMILIES[family].teacher == "maskgit":
    return recipe.override({**fields, "tokenizer.name": "none"})
  side = sizes["data.image_size"]
  fields |= {"teacher.name": "edm", "objective": "dmd2", "tokenizer.name": "pixels"}
  fields |= {"optim.frozen": (), "data.image_size": side}
  return dataclasses.replace(recipe.override(fields), image_shape=(side, side, num_channels))


def _nearest(name: str, known: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, known, n=1)
  return f"; did you mean {near[0]!r}?" if near else ""


def _open(location: str) -> files.Archive:
  path = local_path(location)
  checkpoint = path / CHECKPOINT
  return files.read(checkpoint if checkpoint.is_file() else path)


def _with_added_fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """A recorded config with the fields that were added since, in the sections that it has."""
  flat = traverse_util.flatten_dict(dict(config), sep=".")
  sections = {name.rpartition(".")[0] for name in flat} | {"tested"}
  added = {k: v for k, v in ADDED_FIELDS.items() if k.rpartition(".")[0] in sections}
  return traverse_util.unflatten_dict(added | flat, sep=".")


def _tuples(value: Any) -> Any:
  """JSON's lists as tuples, which configs have."""
  if isinstance(value, Mapping):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
