"""What orbax leaves behind when it gives up on a damaged checkpoint."""

import sys
from collections.abc import Awaitable

import pytest

from dimo_jax import checkpoint


class _Never:
  def __await__(self):
    yield


async def _abandoned_read(until: Awaitable[None]) -> None:
  try:
    await until
  except BaseException as error:
    raise ValueError("Encountered error while reading array index") from error


async def _failing_cleanup(until: Awaitable[None]) -> None:
  try:
    await until
  finally:
    raise ValueError("a fault of our own")


@pytest.mark.parametrize(("coroutine", "heard"), [(_abandoned_read, 0), (_failing_cleanup, 1)])
def test_abandoned_reads_end_without_a_traceback(coroutine, heard, monkeypatch):
  told = []
  monkeypatch.setattr(sys, "unraisablehook", told.append)
  checkpoint._quiet_abandoned_reads()
  read = coroutine(_Never())
  read.send(None)
  del read  # collected half way, as orbax's are
  assert len(told) == heard
