"""Checkpoints of other versions, and what orbax leaves behind when it gives up on a damaged one."""

import sys
from collections.abc import Awaitable

import jax.numpy as jnp
import pytest

from dimo_jax import checkpoint
from dimo_jax.sharding import make_mesh
from dimo_jax.types import UserError


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


@pytest.mark.parametrize(
  ("asked", "what"), [({"a", "b", "c"}, "lacks c"), ({"a"}, "holds b besides")]
)
def test_a_checkpoint_of_another_version_is_refused_and_stays(asked, what, tmp_path):
  mesh = make_mesh(1)
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(3, {"a": jnp.ones(2), "b": jnp.ones(2)})
  saved.close()
  again = checkpoint.Checkpoints(tmp_path)
  with pytest.raises(UserError, match=f"checkpoint {tmp_path}/3 {what}: it is of another version"):
    again.restore(dict.fromkeys(asked, jnp.zeros(2)), mesh, ())
  again.close()
  assert (tmp_path / "3" / "default").exists()
