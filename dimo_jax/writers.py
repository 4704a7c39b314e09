"""What a run leaves for people: metrics.jsonl, console lines, and what trackers make of them."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from dimo_jax.distributed import is_first
from dimo_jax.types import UInt8

WALL_CLOCK_FIELDS = ("seconds", "steps_per_second")  # the only ones that differ between two runs


def write_atomically(path: Path, text: str) -> None:
  """Replaces a text file whole or not at all."""
  temporary = path.with_name(path.name + ".tmp")
  with open(temporary, "w", encoding="utf-8") as stream:
    stream.write(text)
    stream.flush()
    os.fsync(stream.fileno())
  os.replace(temporary, path)


def read_metrics(directory: Path) -> list[dict[str, float | int]]:
  """The rows of a stage's metrics.jsonl; a last line cut short by a kill is dropped."""
  path = directory / "metrics.jsonl"
  rows = []
  if path.exists():
    for line in path.read_text(encoding="utf-8").splitlines():
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return rows


@runtime_checkable
class Tracker(Protocol):
  """Follows one stage."""

  def metrics(self, step: int, values: Mapping[str, float]) -> None:
    """Scalars of one step."""
    ...

  def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """One picture of a step."""
    ...

  def close(self) -> None:
    """Flushes, and ends the session."""
    ...


class Writer:
  """Metrics of one stage, on process 0 only; a tracker that fails is left out from there on.

  Opened at a restored step it first drops what an interrupted run had written beyond it, so that
  every step has exactly one row.
  """

  def __init__(
    self,
    directory: Path,
    name: str,
    start_step: int,
    num_steps: int,
    trackers: Sequence[Tracker] = (),
  ):
    self._name, self._num_steps, self._start_step = name, num_steps, start_step
    self._began = time.perf_counter()
    self._first: tuple[int, float] | None = None  # (step, seconds) of the first row
    self._trackers = list(trackers)
    self._enabled = is_first()
    if not self._enabled:
      return
    directory.mkdir(parents=True, exist_ok=True)
    kept = [row for row in read_metrics(directory) if row["step"] <= start_step]
    path = directory / "metrics.jsonl"
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
    self._rows = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

  def metrics(self, step: int, values: Mapping[str, float], *, quiet: bool = False) -> None:
    """Writes one row and, unless quiet, a console line with rate and time left."""
    if not self._enabled:
      return
    seconds = time.perf_counter() - self._began
    compiled = self._first is not None  # before the first row
    if self._first is None:
      self._first = (step, seconds)
      rate = (step - self._start_step) / seconds
    else:
      rate = (step - self._first[0]) / max(seconds - self._first[1], 1e-9)
    row = {"step": step, **{k: float(v) for k, v in sorted(values.items())}}
    row |= {"seconds": round(seconds, 3), "steps_per_second": round(rate, 4)}
    self._rows.write(json.dumps(row) + "\n")
    self._rows.flush()
    floats = {name: float(value) for name, value in values.items()}
    self._tell(lambda tracker: tracker.metrics(step, floats))
    if not quiet:
      left = clock((self._num_steps - step) / rate) if rate and compiled else "-"
      shown = "  ".join(f"{k} {float(v):.4g}" for k, v in sorted(values.items()) if _shown(k))
      say(f"{self._name} {step}/{self._num_steps}  {rate:.1f} it/s  ETA {left}  {shown}")

  def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Hands a picture to the trackers."""
    self._tell(lambda tracker: tracker.picture(step, name, image))

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._enabled:
      self._rows.close()
    self._tell(lambda tracker: tracker.close())

  def _tell(self, call: Callable[[Tracker], None]) -> None:
    for tracker in list(self._trackers):
      try:
        call(tracker)
      except Exception as error:  # whatever a service answers, the training goes on
        self._trackers.remove(tracker)
        say(f"{self._name}: {type(tracker).__name__} gets nothing more: {error!r}")


def _shown(name: str) -> bool:
  return name.endswith(("loss", "frechet_distance", "entropy", "disagreement", "token_accuracy"))


def say(text: str) -> None:
  """A console line, on process 0 only."""
  if is_first():
    print(text, flush=True)


def clock(seconds: float) -> str:
  """Seconds as m:ss or h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
