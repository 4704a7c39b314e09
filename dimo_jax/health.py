"""Signs that a run has gone wrong, and the word on what to look at."""

import dataclasses
import errno
import math
import os
from collections.abc import Mapping

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class RunStopped(Exception):
  """A run that should not go on: its text says what was seen and what to look at."""


@dataclasses.dataclass
class Health:
  """Watches logged metrics; fields as in `configs/base.py` under `health`."""

  min_entropy: float
  max_disagreement: float
  min_contrast: float
  patience: int

  def __post_init__(self):
    self._strikes: dict[str, int] = {}

  def check(self, step: int, metrics: Mapping[str, float], directory: str) -> None:
    """Raises RunStopped at a non-finite value, or where a sign persists for `patience` readings."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
      raise RunStopped(
        f"step {step}: {', '.join(bad)} not finite. The last checkpoint in {directory} is intact."
        " Look at the gradient norms before it in metrics.jsonl; lower the learning rates, raise"
        " optim.*.num_warmup, or use precision.compute_dtype='float32'"
      )
    self._strike(
      step,
      "generator/entropy",
      metrics.get("generator/entropy", math.inf) < self.min_entropy,
      f"below health.min_entropy={self.min_entropy} nats: the generator has collapsed to one answer"
      " per input. Look at the pictures; lower dimo.r_init, set dimo.sigma above 0, lower"
      " optim.generator.learning_rate, or lower b1 of both optimisers",
      metrics,
    )
    self._strike(
      step,
      "distill/disagreement",
      metrics.get("distill/disagreement", 0.0) > self.max_disagreement,
      f"above health.max_disagreement={self.max_disagreement}: teacher and fake score see nothing"
      " alike in the samples. Look at the pictures; lower optim.generator.learning_rate or raise"
      " dimo.fake_rounds",
      metrics,
    )
    self._strike(
      step,
      "generator/contrast",
      metrics.get("generator/contrast", math.inf) < self.min_contrast,
      f"below health.min_contrast={self.min_contrast}: the pictures are blank. Look at them, and at"
      " the teacher's beside them",
      metrics,
    )

  def _strike(
    self, step: int, name: str, struck: bool, text: str, metrics: Mapping[str, float]
  ) -> None:
    if name not in metrics:
      return
    self._strikes[name] = self._strikes.get(name, 0) + 1 if struck else 0
    if self._strikes[name] >= self.patience:
      raise RunStopped(
        f"step {step}: {name}={metrics[name]:.4g} {text}. ({self.patience} readings in a row,"
        " health.patience)"
      )


def disk_is_full(error: BaseException | None) -> bool:
  """Whether a full disk is at the root of it; libraries wrap the system's error, or its text."""
  while error is not None:
    if getattr(error, "errno", None) in _DISK_FULL or any(
      os.strerror(number) in str(error) for number in _DISK_FULL
    ):
      return True
    error = error.__cause__ or error.__context__
  return False
