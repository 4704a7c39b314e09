"""The loop around a step whose updates are skipped: said, survived, or stopped in time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug
from dimo_jax import train
from dimo_jax.build import build
from dimo_jax.checkpoint import Checkpoints
from dimo_jax.health import RunStopped
from dimo_jax.profile import check_profile_steps
from dimo_jax.sharding import replicated
from dimo_jax.train import Loop
from dimo_jax.types import UserError
from dimo_jax.writers import read_metrics


def run(directory, skips=(), *, num_steps=8, spoils=False, on_host=False, **log):
  """Runs the loop on a number that counts the sound steps; steps in `skips` are skipped."""
  config = debug.get_config()
  config.log.update(every_steps=2, checkpoint_every_steps=3, keep_checkpoints=9)
  config.log.update(log)
  config.health.max_skipped = 3
  experiment = build(config)
  rows = jnp.asarray([step in skips for step in range(num_steps + 1)])

  @jax.jit
  def step_fn(state, constants, batch, base_key):
    del constants, base_key
    bad = rows[batch]
    in_a_row = jnp.where(bad, state["in_a_row"] + 1, 0)
    x = jnp.where(bad, jnp.nan if spoils else state["x"], state["x"] + 1)
    state = {"x": x, "in_a_row": in_a_row, "skipped": state["skipped"] + bad}
    loss = jnp.where(bad, jnp.nan, x)
    counts = {"net/skipped": state["skipped"], "net/skipped_in_a_row": in_a_row}
    return state, {"net/loss": loss} | counts

  def make_state():
    return {"x": jnp.zeros(()), "in_a_row": jnp.zeros((), int), "skipped": jnp.zeros((), int)}

  key = jax.device_put(jax.random.key(0), replicated(experiment.mesh))
  loop = Loop(experiment, directory, "stage", num_steps)

  def batches(start):
    numbers = (np.int32(i) for i in range(start + 1, 99))
    return numbers if on_host else jax.device_put(tuple(numbers), replicated(experiment.mesh))

  return loop.run(step_fn, make_state, {}, lambda start: iter(batches(start)), key)


def saved(directory):
  checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
  values = {}
  for path in (directory / "checkpoints").glob("[0-9]*"):
    values[int(path.name)] = float(checkpoints.read(int(path.name))["x"])
  checkpoints.close()
  return values


def test_one_skipped_update_is_said_and_counted(tmp_path, capsys):
  state = run(tmp_path, skips={3})
  assert state["x"] == 7 and saved(tmp_path) == {3: 2.0, 6: 5.0, 8: 7.0}
  assert "stage: step 3: an update was NaN or infinite and left out; so far net/skipped 1" in (
    capsys.readouterr().out
  )
  counts = {row["step"]: row["net/skipped"] for row in read_metrics(tmp_path)}
  assert counts == {2: 0, 3: 1, 4: 1, 6: 1, 8: 1}


def test_one_between_two_readings_is_said_too(tmp_path, capsys):
  run(tmp_path, skips={1})
  assert "stage: step 2: an update was NaN or infinite" in capsys.readouterr().out
  assert all(np.isfinite(row["net/loss"]) for row in read_metrics(tmp_path))


def test_updates_skipped_in_a_row_stop_the_run(tmp_path):
  with pytest.raises(RunStopped, match=r"net/skipped_in_a_row=3 .*health\.max_skipped=3.*intact"):
    run(tmp_path, skips={4, 5, 6, 7, 8})
  assert saved(tmp_path) == {3: 3.0}


def test_a_spoilt_state_is_not_saved(tmp_path):
  with pytest.raises(RunStopped, match=r"step 6: parameters or moments hold NaN .*intact"):
    run(tmp_path, skips={6}, spoils=True)
  assert saved(tmp_path) == {3: 3.0}


def test_what_is_open_is_closed_though_the_last_save_fails(tmp_path, monkeypatch):
  closed = []

  def full(self):
    raise OSError("no space left")

  monkeypatch.setattr(train.Checkpoints, "close", full)
  for owner in (train.Writer, train.Profile):
    close = owner.close
    monkeypatch.setattr(owner, "close", lambda self, close=close: closed.append(1) or close(self))
  with pytest.raises(OSError, match="no space left"):
    run(tmp_path)
  assert len(closed) == 2


def test_the_newest_checkpoints_and_those_of_every_so_many_steps_are_kept(tmp_path):
  run(tmp_path, checkpoint_every_steps=1, keep_checkpoints=2)
  assert set(saved(tmp_path)) == {7, 8}
  run(tmp_path / "more", checkpoint_every_steps=1, keep_checkpoints=2, keep_every_steps=3)
  assert set(saved(tmp_path / "more")) == {3, 6, 7, 8}


def test_chosen_steps_are_profiled(tmp_path, capsys):
  run(tmp_path, profile_steps=(3, 4), every_steps=1)
  assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
  out = capsys.readouterr().out
  written = out.index(f"profile written to {tmp_path / 'profile'}")
  assert out.index("stage 3/") < written < out.index("stage 5/")
  run(tmp_path / "late", profile_steps=(7, 99))  # the run ends before
  assert len(list((tmp_path / "late").rglob("*.xplane.pb"))) == 1
  run(tmp_path / "none")
  assert not (tmp_path / "none" / "profile").exists()


@pytest.mark.parametrize("steps", [(3,), (0, 2), (5, 4), (1, 2, 3)])
def test_impossible_profiles_are_refused(steps):
  with pytest.raises(UserError, match=r"log\.profile_steps=.*must be"):
    check_profile_steps(steps)


def test_no_step_takes_an_array_from_the_host(tmp_path):
  with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
    run(tmp_path, on_host=True)
