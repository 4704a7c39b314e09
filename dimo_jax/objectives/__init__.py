"""Objectives: the two losses that turn a teacher into a generator."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from dimo_jax.objectives.dimo import Dimo
from dimo_jax.objectives.dmd2 import Dmd2
from dimo_jax.samplers import Sampler
from dimo_jax.state import Nets, NetworkState
from dimo_jax.types import Array, Batch, Float, Int, Key, Metrics, Params

__all__ = ["OBJECTIVES", "Objective", "StepObjective"]


@runtime_checkable
class StepObjective(Protocol):
  """What `step.distill_step` needs of a method.

  Losses see one micro-batch and are deterministic given their draws; `extra` is the objective's own
  small state, handed through. A draw's leaves have a leading micro-batch axis.
  """

  @property
  def fake_rounds(self) -> int:
    """Fake-score updates for each generator update."""
    ...

  @property
  def reuse_samples(self) -> bool:
    """Whether the first round takes the generator update's samples."""
    ...

  def draw_generator(self, key: Key, batch: Batch, clock: Int[Array, ""]) -> Any:
    """Every random number of one generator update."""
    ...

  def draw_fake(self, key: Key, batch: Batch, clock: Int[Array, ""]) -> Any:
    """Every random number of one fake-score round."""
    ...

  def generate(self, generator_params: Params, nets: Nets, batch: Batch, draws: Any) -> Any:
    """The generator's samples: output, logits (if any), condition."""
    ...

  def generator_loss(
    self, generator_params: Params, nets: Nets, batch: Batch, draws: Any, extra: Any
  ) -> tuple[Float[Array, ""], tuple[Any, Metrics, Any]]:
    """Loss, (samples, metrics, extra)."""
    ...

  def fake_score_loss(
    self, fake_params: Params, nets: Nets, samples: Any, batch: Batch, draws: Any, extra: Any
  ) -> tuple[Float[Array, ""], tuple[Metrics, Any]]:
    """Loss, (metrics, extra)."""
    ...


@runtime_checkable
class Objective(StepObjective, Protocol):
  """A method: what the step needs, and what building, sampling and evaluating need."""

  @property
  def teacher_kind(self) -> str:
    """The kind of teacher it is for: "masked" or "gaussian"."""
    ...

  @property
  def uses_images(self) -> bool:
    """Whether its batches hold real images; else conditions alone."""
    ...

  @property
  def uses_pairs(self) -> bool:
    """Whether the generator's batches hold noise-image pairs."""
    ...

  @property
  def forward_equivalents(self) -> Mapping[str, float]:
    """Forward passes a sample costs in one iteration, by network; a backward pass counts two."""
    ...

  def fake_score_params(self, key: Key, teacher: NetworkState) -> Params:
    """Initial parameters of the fake score: a copy of the teacher's, and what else it needs."""
    ...

  def score_params(self, fake_score_params: Params) -> Params:
    """The fake score as a network of the teacher's kind: what of its parameters that is."""
    ...

  def init_extra(self) -> Any:
    """Initial `extra`."""
    ...

  def sampler(self, options: Mapping[str, Any]) -> Sampler:
    """The student's sampler at test time; `options` is `config.sampling`."""
    ...

  def target(self, decoding: Any) -> Sampler | None:
    """The teacher's sampler whose distribution the student is trained to match, where that is
    another one than its `decoding`.
    """
    ...


OBJECTIVES: dict[str, type[Dimo] | type[Dmd2]] = {"dimo": Dimo, "dmd2": Dmd2}
