"""A profile of chosen steps, for `tensorboard --logdir` or https://ui.perfetto.dev."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from dimo_jax.types import UserError
from dimo_jax.writers import say


def check_profile_steps(steps: Sequence[int]) -> None:
  """Raises UserError where these are neither nothing nor a first and a last step."""
  if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
    raise UserError(f"log.profile_steps={tuple(steps)} must be () or (first, last), from 1 on")


class Profile:
  """Records the steps first .. last of a stage with `jax.profiler`, in every process."""

  def __init__(self, directory: Path, steps: Sequence[int]):
    """`steps` is (first, last), or empty: none."""
    self._directory = directory
    self._first, self._last = steps or (0, 0)
    self._recording = False

  def call(self, step: int, step_fn: Callable[..., Any], *arguments: Any) -> Any:
    """`step_fn(*arguments)`, recorded where the step is one of those."""
    if step == self._first:
      jax.profiler.start_trace(self._directory)
      self._recording = True
    if not self._recording:
      return step_fn(*arguments)
    with jax.profiler.StepTraceAnnotation("step", step_num=step):
      outputs = step_fn(*arguments)
    if step == self._last:
      jax.block_until_ready(outputs)
      self.close()
    return outputs

  def close(self) -> None:
    """Ends a recording under way."""
    if self._recording:
      self._recording = False
      jax.profiler.stop_trace()
      say(f"profile written to {self._directory}")
