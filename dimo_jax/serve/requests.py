"""What the page may ask for, and what is wrong with what it asks."""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

from dimo_jax.artifacts import Artifact
from dimo_jax.build import NUM_SEEDS
from dimo_jax.types import UserError, suggest

__all__ = ["TEMPERATURES", "Model", "Request", "parse_request"]

TEMPERATURES = (0.01, 100.0)  # lowest and highest; float32 logits overflow far outside of them


@dataclasses.dataclass(frozen=True)
class Model:
  """An artifact, and what may be asked of it.

  Attributes:
    steps: numbers of steps to choose from; a generator has one.
  """

  artifact: Artifact
  steps: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Request:
  """Pictures to draw, all of it checked.

  Attributes:
    model: a key of the models.
    labels: class ids.
    temperature: of the drawn tokens; None where the model has none.
  """

  model: str
  labels: tuple[int, ...]
  seed: int
  steps: int
  temperature: float | None


def parse_request(fields: Any, models: Mapping[str, Model], max_images: int) -> Request:
  """A request from decoded JSON.

  Raises:
    UserError: an unknown field, or a value that cannot be drawn.
  """
  if not isinstance(fields, dict):
    raise UserError(f"the request is {reprlib.repr(fields)}; it must be an object with 'labels'")
  known = [field.name for field in dataclasses.fields(Request)]
  for name in fields:
    if name not in known:
      raise UserError(f"{reprlib.repr(name)} is no field of a request{suggest(name, known)}")
  name = fields.get("model", next(iter(models)))
  if not isinstance(name, str) or name not in models:
    raise UserError(f"model={reprlib.repr(name)} must be {' or '.join(map(repr, models))}")
  model = models[name]
  seed = fields.get("seed", 0)
  if not _is_integer(seed) or not 0 <= seed < NUM_SEEDS:
    raise UserError(f"seed={reprlib.repr(seed)} must be a whole number in 0 .. {NUM_SEEDS - 1}")
  return Request(
    model=name,
    labels=_labels(fields.get("labels"), model.artifact.num_classes, max_images),
    seed=seed,
    steps=_steps(fields.get("steps"), name, model),
    temperature=_temperature(fields.get("temperature"), name, model.artifact.temperature),
  )


def _labels(labels: Any, num_classes: int, max_images: int) -> tuple[int, ...]:
  if not isinstance(labels, list) or not labels:
    raise UserError(f"labels={reprlib.repr(labels)} must be a list of class ids such as [3, 1, 4]")
  if len(labels) > max_images:
    raise UserError(f"labels hold {len(labels)} class ids; {max_images} pictures are the most")
  highest = max(num_classes, 1) - 1
  for label in labels:
    if not _is_integer(label) or not 0 <= label <= highest:
      raise UserError(f"labels hold {reprlib.repr(label)}; class ids lie in 0 .. {highest}")
  return tuple(labels)


def _steps(steps: Any, name: str, model: Model) -> int:
  if steps is None:
    return model.artifact.num_steps
  if not _is_integer(steps) or steps not in model.steps:
    wanted = " or ".join(map(str, model.steps))
    raise UserError(f"steps={reprlib.repr(steps)} must be {wanted} with model={name!r}")
  return steps


def _temperature(temperature: Any, name: str, own: float | None) -> float | None:
  if own is None:
    if temperature is not None:
      raise UserError(
        f"temperature={reprlib.repr(temperature)} must be left out: model={name!r} draws at no"
        " temperature, or at a fixed one"
      )
    return None
  if temperature is None:
    return own
  lowest, highest = TEMPERATURES
  is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
  if not is_number or not lowest <= temperature <= highest:
    wanted = f"must be a number in {lowest:g} .. {highest:g}"
    raise UserError(f"temperature={reprlib.repr(temperature)} {wanted}")
  return float(temperature)


def _is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)
