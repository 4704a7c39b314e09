"""SIGTERM and Ctrl-C: finish the step, save, and leave with a code that says "resume me".

Where several processes run together, a signal to any of them stops all at one step: JAX's
preemption service carries it to the others, and `StopRequest.is_set` turns true in all of them at
the same call.
"""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

RESUME_EXIT_CODE = 75  # EX_TEMPFAIL: run the same command again


class Preempted(Exception):
  """The run was asked to stop and has saved what it needs to go on."""


class StopRequest:
  """Remembers the first SIGTERM or SIGINT; a second Ctrl-C stops at once."""

  def __init__(self) -> None:
    self.signal: int | None = None
    self._shared = False  # with other processes
    self._num_calls = 0  # of is_set since then
    self._unfinished: set[Path] = set()  # folders that `at_once` takes away

  def install(self) -> None:
    """Takes over both signals."""
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._on_signal)

  def at_once(self) -> None:
    """From here on a signal ends the process: for work that keeps nothing to go on from.

    Ends it now if one has come already.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._end)
    if self.signal is not None:
      signal.raise_signal(self.signal)

  @contextlib.contextmanager
  def unfinished(self, folder: Path) -> Iterator[None]:
    """While it lasts, `at_once` takes the folder away before the process ends."""
    self._unfinished.add(folder)
    try:
      yield
    finally:
      self._unfinished.discard(folder)

  def share(self) -> None:
    """To be called once `jax.distributed` is initialized: from here on all stop together.

    JAX's service has taken over SIGTERM by then; what came before it, and Ctrl-C, is passed on.
    """
    self._shared = True
    early, self.signal = self.signal, None
    signal.signal(signal.SIGINT, self._on_interrupt)
    if early is not None:
      signal.raise_signal(signal.SIGTERM)

  def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(1, b"SIGINT: stopping all processes after this step; Ctrl-C stops at once\n")
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    signal.raise_signal(signal.SIGTERM)

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.signal = number
    # Not print: the signal may have come in the middle of one.
    name = signal.Signals(number).name
    os.write(1, f"{name}: stopping at the next safe point; Ctrl-C stops at once\n".encode())
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers repeat it while the state is saved
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))

  def _end(self, number: int, frame: FrameType | None) -> None:
    del frame
    os.write(1, f"{signal.Signals(number).name}: stopped; nothing unfinished was kept\n".encode())
    for folder in self._unfinished:
      shutil.rmtree(folder, ignore_errors=True)
    os._exit(128 + number)  # an exception could be lost in a callback of jax

  def is_set(self) -> bool:
    """Whether to stop here; processes that run together call it equally often, and agree."""
    if self._shared and self.signal is None:
      from jax.experimental import multihost_utils  # slow, and Ctrl-C must work before

      self._num_calls += 1
      if multihost_utils.reached_preemption_sync_point(self._num_calls):
        self.signal = signal.SIGTERM
    return self.signal is not None

  def raise_if_set(self) -> None:
    """Raises Preempted once a signal has come; to be called as `is_set`."""
    if self.is_set():
      assert self.signal is not None
      raise Preempted(f"{signal.Signals(self.signal).name}: the same command goes on from here")


STOP = StopRequest()
