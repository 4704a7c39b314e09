"""Checkpoints of other versions, and what orbax leaves behind when it gives up on a damaged one."""

import json
import os
import sys
from collections.abc import Awaitable

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import base
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


def test_what_was_never_finished_is_passed_over(tmp_path):
  metrics = tmp_path / "5.orbax-checkpoint-tmp" / "metrics" / "metrics"
  metrics.parent.mkdir(parents=True)
  metrics.write_text('{"cut')
  checkpoints = checkpoint.Checkpoints(tmp_path)
  assert checkpoints.restore({"a": jnp.zeros(2)}, make_mesh(1), ()) is None
  checkpoints.close()


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


def test_fields_that_an_older_record_lacks_had_their_first_value(tmp_path):
  flat = traverse_util.flatten_dict(base.get_config().to_dict(), sep=".")
  assert set(flat) >= set(checkpoint.ADDED_FIELDS)
  recorded = {"seed": 0, "train.num_steps": 5}
  (tmp_path / "record.json").write_text(json.dumps(recorded))
  same = recorded | {"train.ema_memory": "device", "log.profile_steps": ()}
  assert checkpoint.changed_fields(tmp_path, same) == {}
  other = same | {"train.ema_memory": "host", "objective": "dmd2"}
  assert checkpoint.changed_fields(tmp_path, other) == {
    "train.ema_memory": "'device' -> 'host'",
    "objective": "None -> 'dmd2'",
  }


def test_what_orbax_has_not_renamed_is_no_checkpoint(tmp_path):
  for name in ("6", "12.orbax-checkpoint-tmp", "damaged"):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
  assert checkpoint.finished_steps(tmp_path) == {6}


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_weights_have_the_mode_that_the_umask_leaves(mask, tmp_path):
  before = os.umask(mask)
  try:
    checkpoint.save_params(tmp_path / "weights.safetensors", {"a": np.ones(2)}, {})
  finally:
    os.umask(before)
  assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
