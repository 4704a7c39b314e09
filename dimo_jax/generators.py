"""Whatever `artifacts` can sample, as an evaluation draws from it: batch by batch, by number."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dimo_jax import artifacts
from dimo_jax.checkpoint import check_which, params_hash
from dimo_jax.convert import files
from dimo_jax.evaluation.generation import sample_images
from dimo_jax.remote import local_path
from dimo_jax.samplers import Sampler, plain_settings
from dimo_jax.sharding import local_rows, make_mesh, replicated, shard_batch
from dimo_jax.state import NetworkState
from dimo_jax.teachers.tokenizers import Tokenizer
from dimo_jax.types import Array, Float, Int, UInt8, UserError

__all__ = ["AnyGenerator", "NetworkGenerator", "ProgramGenerator", "load_generator"]


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkGenerator:
  """Weights with our own networks and samplers; the batch of b images that begins at `start` is
  drawn with `fold_in(key(seed), start // b)`, as in a training's evaluation.

  Attributes:
    source: what identifies the weights, for the result.
    network: on the devices.
  """

  source: Mapping[str, Any]
  sampler: Sampler
  tokenizer: Tokenizer
  network: NetworkState
  num_classes: int
  mesh: jax.sharding.Mesh
  rounding = None

  @property
  def name(self) -> str:
    """Model, sampler and steps."""
    return f"{self.source['model']}, {self.sampler.name}, steps={self.sampler.num_steps}"

  @property
  def image_shape(self) -> tuple[int, int, int] | None:
    """(height, width, channels); None without a decoder."""
    return self.tokenizer.image_shape

  @property
  def settings(self) -> dict[str, Any]:
    """The sampler's fields."""
    return plain_settings(self.sampler)

  def with_steps(self, steps: int) -> "NetworkGenerator":
    """The same with another number of steps.

    Raises:
      UserError: a student, which has its own number, or none at all.
    """
    if self.source["model"] == "student" and steps != self.sampler.num_steps:
      raise UserError(f"steps={steps} is for teachers; the student takes {self.sampler.num_steps}")
    assert dataclasses.is_dataclass(self.sampler)
    if steps == self.sampler.num_steps:
      return self
    return dataclasses.replace(self, sampler=dataclasses.replace(self.sampler, num_steps=steps))

  def batch(self, labels: Int[np.ndarray, " b"], seed: int, start: int) -> Float[Array, "b h w c"]:
    """Images in [-1, 1], on the devices."""
    key = jax.random.fold_in(jax.random.key(seed), start // len(labels))
    rows = local_rows(len(labels), self.mesh)
    condition = {"class_id": shard_batch(labels[rows], self.mesh)}
    return sample_images(self.sampler, self.tokenizer, self.network, condition, key, self.mesh)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class ProgramGenerator:
  """An exported program: its images are levels, rounded to the nearest."""

  source: Mapping[str, Any]
  artifact: artifacts.Artifact
  rounding = "nearest"

  @property
  def name(self) -> str:
    """The artifact's."""
    return self.artifact.name

  @property
  def image_shape(self) -> tuple[int, int, int] | None:
    """(height, width, channels)."""
    return self.artifact.image_shape

  @property
  def num_classes(self) -> int:
    """The artifact's."""
    return self.artifact.num_classes

  @property
  def settings(self) -> dict[str, Any]:
    """What is known of its sampler."""
    return {"name": "exported program", "steps": self.artifact.num_steps}

  def with_steps(self, steps: int) -> "ProgramGenerator":
    """Itself.

    Raises:
      UserError: another number of steps than the program's.
    """
    if steps != self.artifact.num_steps:
      raise UserError(f"steps={steps}: {self.name} is a program of {self.artifact.num_steps} steps")
    return self

  def batch(
    self, labels: Int[np.ndarray, " b"], seed: int, start: int
  ) -> UInt8[np.ndarray, "b h w c"]:
    """The batch that begins at `start` is drawn with the seed `seed + start`."""
    return self.artifact.sample(labels, seed + start, batch_size=len(labels))


AnyGenerator = NetworkGenerator | ProgramGenerator


def load_generator(
  path: str, *, which: str = "last", tokenizer: str = "", fields: Mapping[str, Any] | None = None
) -> AnyGenerator:
  """Whatever `artifacts.load` takes; of a workdir the student.

  Args:
    which: of a workdir's checkpoints: "last", "best" or a step.
    tokenizer: a decoder of tokens, where the artifact holds none.
    fields: other values of config fields, by dotted name.

  Raises:
    UserError: nothing there, no such fields, or options that do not go together.
  """
  place = Path(path)
  source: dict[str, Any] = {"checkpoint": path}
  if tokenizer:
    source["tokenizer"] = tokenizer
  if (place / "distill").is_dir():
    check_which(which)
    run = artifacts.read_run(place, checkpoint=which)
    parts = run.parts()
    parts = dataclasses.replace(parts, recipe=parts.recipe.override(fields or {}))
    if tokenizer:
      parts = artifacts.with_tokenizer(parts, tokenizer)
    source |= {"step": run.step, "training_seed": run.recipe.config.seed}
    source |= {"teacher_sha256": run.teacher_sha256}
    return _network_generator(artifacts.NetworkArtifact(parts), source, fields)
  if which != "last":
    raise UserError(f"--checkpoint={which} is for workdirs")
  artifact = artifacts.load(path, tokenizer=tokenizer or None, fields=fields or None)
  source |= _of_export(path)
  if isinstance(artifact, artifacts.NetworkArtifact):
    return _network_generator(artifact, source, fields)
  assert isinstance(artifact, artifacts.ProgramArtifact)
  source |= {"model": _model(artifact), "weights_sha256": params_hash(artifact.weights)}
  program = hashlib.sha256(artifact.program.mlir_module_serialized).hexdigest()
  return ProgramGenerator(source | {"program_sha256": program}, artifact)


def _of_export(path: str) -> dict[str, Any]:
  """Where an export's weights come from; empty for anything else."""
  folder = files.export_folder(local_path(path))
  if folder is None:
    return {}
  manifest = json.loads((folder / files.MANIFEST).read_text(encoding="utf-8"))
  return {name: manifest[name] for name in ("step", "teacher_sha256")}


def _model(artifact: artifacts.Artifact) -> str:
  return "student" if artifact.role == "generator" else "teacher"


def _network_generator(
  artifact: artifacts.NetworkArtifact,
  source: Mapping[str, Any],
  fields: Mapping[str, Any] | None,
) -> NetworkGenerator:
  weights, mesh = artifact.parts.weights, make_mesh()
  network = artifact.models.teacher.frozen_state(weights["network"], weights["tokenizer"])
  identity = {
    "model": _model(artifact),
    "weights_sha256": params_hash(weights["network"]),
    "tokenizer_sha256": params_hash(weights["tokenizer"]),
    "compute_dtype": artifact.parts.recipe.config.precision.compute_dtype,
    "fields": dict(fields or {}),
  }
  return NetworkGenerator(
    source={**source, **identity},
    sampler=artifact.sampler,
    tokenizer=artifact.models.tokenizer,
    network=jax.device_put(network, replicated(mesh)),
    num_classes=artifact.num_classes,
    mesh=mesh,
  )
