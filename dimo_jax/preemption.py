"""SIGTERM and Ctrl-C: finish the step, save, and leave with a code that says "resume me"."""

import os
import signal
from types import FrameType

RESUME_EXIT_CODE = 75  # EX_TEMPFAIL: run the same command again


class Preempted(Exception):
  """The run was asked to stop and has saved what it needs to go on."""


class StopRequest:
  """Remembers the first SIGTERM or SIGINT; a second Ctrl-C stops at once."""

  def __init__(self) -> None:
    self.signal: int | None = None

  def install(self) -> None:
    """Takes over both signals."""
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._on_signal)

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.signal = number
    # Not print: the signal may have come in the middle of one.
    name = signal.Signals(number).name
    os.write(1, f"{name}: stopping after this step; Ctrl-C stops at once\n".encode())
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers repeat it while the state is saved
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))

  def raise_if_set(self) -> None:
    """Raises Preempted once a signal has come."""
    if self.signal is not None:
      raise Preempted(f"{signal.Signals(self.signal).name}: the same command goes on from here")


STOP = StopRequest()
