"""Signs that a run has gone wrong, and the word on what to look at."""

import dataclasses
import errno
import math
import os
from collections.abc import Collection, Mapping

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class RunStopped(Exception):
  """A run that should not go on: its text says what was seen and what to look at."""


@dataclasses.dataclass
class Health:
  """Watches logged metrics; fields as in `configs/base.py` under `health`."""

  min_entropy: float
  max_disagreement: float
  min_contrast: float
  max_contrast: float
  max_brightness: float
  patience: int
  max_skipped: int

  def __post_init__(self):
    self._strikes: dict[int, int] = {}  # readings in a row, by sign
    self._skipped: dict[str, float] = {}  # updates left out so far, by network
    self._resumed = False

  def resume(self) -> None:
    """Says that the next reading's counts include updates of before."""
    self._resumed = True

  def check(
    self,
    step: int,
    metrics: Mapping[str, float],
    directory: str,
    of_update: Collection[str] | None = None,
  ) -> str | None:
    """Raises RunStopped at a non-finite value, or where a sign persists.

    It must for `patience` readings, of a picture for one: pictures are rare. Of metrics that are
    not finite because their update was skipped (`step`), it must for `max_skipped` updates.

    Args:
      of_update: names of the metrics that the update itself gave; all by default.

    Returns:
      A line to show where updates were skipped since the last reading.
    """
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    skipped = {name: value for name, value in metrics.items() if name.endswith("/skipped")}
    if self._resumed:
      self._skipped = {name: n - metrics[f"{name}_in_a_row"] for name, n in skipped.items()}
      self._resumed = False
    new = {name: total - self._skipped.get(name, 0) for name, total in skipped.items()}
    self._skipped |= skipped
    advice = (
      f" The last checkpoint in {directory} is intact. Look at the gradient norms before it in"
      " metrics.jsonl; lower the learning rates, raise optim.*.num_warmup, or use"
      " precision.compute_dtype='float32'"
    )
    for name, value in metrics.items():
      if name.endswith("/skipped_in_a_row") and value >= self.max_skipped:
        raise RunStopped(
          f"step {step}: {name}={value:.0f} has reached health.max_skipped={self.max_skipped}:"
          f" update after update is NaN or infinite.{advice}; where other machines run it well,"
          " replace this one"
        )
    if any(new.values()):
      bad = [name for name in bad if of_update is not None and name not in of_update]
    if bad:
      raise RunStopped(f"step {step}: {', '.join(bad)} not finite.{advice}")
    signs = (
      (
        "generator/entropy",
        lambda value: value < self.min_entropy,
        f"below health.min_entropy={self.min_entropy} nats: the generator has collapsed to one"
        " answer per input. Look at the pictures; lower dimo.r_init, set dimo.sigma above 0, lower"
        " optim.generator.learning_rate, or lower b1 of both optimisers",
        self.patience,
      ),
      (
        "distill/disagreement",
        lambda value: value > self.max_disagreement,
        f"above health.max_disagreement={self.max_disagreement}: teacher and fake score see nothing"
        " alike in the samples. Look at the pictures; lower optim.generator.learning_rate or raise"
        " the fake rounds",
        self.patience,
      ),
      (
        "generator/contrast",
        lambda value: value < self.min_contrast,
        f"below health.min_contrast={self.min_contrast}: the pictures are blank. Look at them, and"
        " at the teacher's beside them",
        1,
      ),
      (
        "generator/std",
        lambda value: value < self.min_contrast,
        f"below health.min_contrast={self.min_contrast}: the generator's images are flat. Look at"
        " the pictures; raise dmd2.fake_rounds or lower optim.generator.learning_rate",
        self.patience,
      ),
      (
        "generator/std",
        lambda value: value > self.max_contrast,
        f"above health.max_contrast={self.max_contrast}: the generator's images, before they are"
        " clipped, have left their range. Look at the pictures; lower both learning rates or raise"
        " dmd2.fake_rounds",
        self.patience,
      ),
      (
        "generator/mean",
        lambda value: abs(value) > self.max_brightness,
        f"beyond health.max_brightness={self.max_brightness}: the generator's images are all black"
        " or all white. Look at the pictures; raise dmd2.fake_rounds or lower"
        " optim.generator.learning_rate",
        self.patience,
      ),
      (
        "generator/brightness",
        lambda value: abs(value) > self.max_brightness,
        f"beyond health.max_brightness={self.max_brightness}: the pictures are all black or all"
        " white. Look at them, and at the teacher's beside them",
        1,
      ),
    )
    for sign, (name, is_bad, text, patience) in enumerate(signs):
      if name not in metrics:
        continue
      self._strikes[sign] = self._strikes.get(sign, 0) + 1 if is_bad(metrics[name]) else 0
      if self._strikes[sign] >= patience:
        raise RunStopped(
          f"step {step}: {name}={metrics[name]:.4g} {text}. ({patience} readings in a row)"
        )
    if not any(new.values()):
      return None
    counts = ", ".join(f"{name} {total:.0f}" for name, total in skipped.items())
    return f"step {step}: an update was NaN or infinite and left out; so far {counts}"


def disk_is_full(error: BaseException | None) -> bool:
  """Whether a full disk is at the root of it; libraries wrap the system's error, or its text."""
  while error is not None:
    if getattr(error, "errno", None) in _DISK_FULL or any(
      os.strerror(number) in str(error) for number in _DISK_FULL
    ):
      return True
    error = error.__cause__ or error.__context__
  return False
