"""The artifacts of a page: what is asked for, and its teacher beside it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dimo_jax import artifacts
from dimo_jax.artifacts import Artifact, NetworkArtifact, ProgramArtifact
from dimo_jax.prepare import TEACHER_FILE
from dimo_jax.remote import local_path
from dimo_jax.serve.requests import Model
from dimo_jax.types import UserError
from dimo_jax.writers import say

__all__ = ["load_models"]


def load_models(
  path: str,
  teacher: str = "",
  *,
  tokenizer: str = "",
  family: str = "",
  fields: Mapping[str, Any] | None = None,
  steps: Sequence[int] | None = None,
  default_steps: Sequence[int] = (),
) -> dict[str, Model]:
  """What lies at `path` as "student" or "teacher", and beside a student its "teacher" if there is
  one.

  Args:
    path, tokenizer, family, fields: as in `artifacts.load`.
    teacher: where the teacher lies; "" is that of a workdir.
    steps: of the teacher, to choose from beside its own; by default those of `default_steps` that
      are fewer than its own.

  Raises:
    UserError: nothing that can be sampled there, or two that do not go together.
  """
  found = artifacts.load(path, tokenizer=tokenizer, family=family, fields=fields)
  if found.image_shape is None:
    raise UserError(f"{found.name} holds no decoder; name its VQGAN with --tokenizer=PATH")
  if found.role == "teacher":
    if teacher:
      raise UserError(f"--teacher={teacher!r}: --artifact={path!r} is a teacher already")
    return {"teacher": _model(found, steps, default_steps)}
  models = {"student": _model(found, None, ())}
  beside = None
  if teacher:
    beside = artifacts.load(teacher, tokenizer=tokenizer, fields=fields)
    field = f"--teacher={teacher!r}"
  elif (own := local_path(path) / "teacher" / TEACHER_FILE).is_file():
    beside = artifacts.load(own, fields=fields)
    field = str(own)
  elif (local_path(path) / "distill").is_dir() and isinstance(found, NetworkArtifact):
    beside = _given_teacher(found)
    field = "teacher.path"
  if beside is not None:
    _check_beside(beside, found, field)
    models["teacher"] = _model(beside, steps, default_steps)
  elif steps:
    raise UserError("--steps is for teachers, and there is none: name one with --teacher=PATH")
  return models


def _given_teacher(student: NetworkArtifact) -> NetworkArtifact | None:
  """The teacher that a run's config names, with the run's settings; None where it has gone."""
  parts = student.parts
  location = parts.recipe.config.teacher.path
  try:
    fields = {"model.num_heads": parts.recipe.config.model.num_heads}
    teacher = artifacts.load(location, fields=fields)
    if not isinstance(teacher, NetworkArtifact):
      raise UserError(f"{teacher.name} is a program")
  except UserError as error:
    say(f"no teacher is shown; name it with --teacher=PATH (teacher.path={location!r}: {error})")
    return None
  network = teacher.parts.weights["network"]
  weights = {"network": network, "tokenizer": parts.weights["tokenizer"]}
  role = teacher.parts.role
  return NetworkArtifact(dataclasses.replace(parts, name=location, weights=weights, role=role))


def _check_beside(teacher: Artifact, student: Artifact, field: str) -> None:
  if teacher.role != "teacher":
    raise UserError(f"{field} is a generator, not a teacher")
  for name in ("num_classes", "image_shape"):
    wanted, got = getattr(student, name), getattr(teacher, name)
    if got != wanted:
      raise UserError(f"{field} has {name}={got}, and the student {wanted}")


def _model(artifact: Artifact, steps: Sequence[int] | None, default_steps: Sequence[int]) -> Model:
  own = artifact.num_steps
  others = [n for n in default_steps if n < own] if steps is None else steps
  if artifact.role == "generator" or isinstance(artifact, ProgramArtifact):
    others = []
  return Model(artifact, tuple(sorted({own, *others})))
