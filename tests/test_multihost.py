"""Two processes of one device make, to the last bit, what one process of two devices makes.

Started by launch/local.sh, stopped by a signal to one of them, and continued. With two summands no
order of a sum can differ; with more processes results agree up to rounding.
"""

import dataclasses
import os
import pathlib
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from flax import serialization, traverse_util

from configs import debug
from dimo_jax import prepare
from dimo_jax.build import build
from dimo_jax.checkpoint import Checkpoints
from dimo_jax.preemption import RESUME_EXIT_CODE
from dimo_jax.sharding import make_mesh
from dimo_jax.start import initial_state
from tests import commands

pytestmark = pytest.mark.ci  # two processes of JAX, started three times

LOCAL = (str(commands.ROOT / "launch" / "local.sh"), "2")
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
TWO_DEVICES = f"{ONE_THREAD} --xla_force_host_platform_device_count=2"
FEWER_ROWS = ("--config.evaluation.teacher_steps=(1,)", "--config.log.pictures_every_steps=20")


@dataclasses.dataclass
class Stopped:
  """What lay in a workdir once a signal to its second process had stopped both."""

  code: int
  out: str
  err: str
  workdir: pathlib.Path  # a copy


def process_ids(launcher: int) -> dict[int, int]:
  """Process id by number of the local launcher's two processes."""
  found = {}
  children = pathlib.Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
  for pid in map(int, children):
    for argument in pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
      if argument.startswith("--process_id="):
        found[int(argument.partition("=")[2])] = pid
  return found


def stop_second(process: subprocess.Popen, workdir: pathlib.Path, last_row: int) -> tuple[str, str]:
  """(stdout, stderr) after SIGTERM to the second process at that row of the distillation."""
  rows = workdir / "distill" / "metrics.jsonl"
  while process.poll() is None and not (
    rows.exists() and f'"step": {last_row},' in rows.read_text()
  ):
    time.sleep(0.01)
  os.kill(process_ids(process.pid)[1], signal.SIGTERM)
  return process.communicate(timeout=240)


def runs(tmp_path_factory, command) -> tuple[pathlib.Path, Stopped, pathlib.Path, str]:
  """(one process's workdir, two stopped, two at the end, their last output)."""
  command = (*command, *FEWER_ROWS)
  folder = tmp_path_factory.mktemp("multihost")
  one, two = folder / "one", folder / "two"
  with commands.shared_folder(tmp_path_factory) as shared:
    commands.run(shared, one, command=command, xla_flags=TWO_DEVICES)
    options = {"command": command, "launcher": LOCAL, "xla_flags": ONE_THREAD}
    process = commands.start(shared, two, **options)
    out, err = stop_second(process, two, last_row=2)
    copy = commands.copy_run(two, folder / "stopped")
    out_of_end, _ = commands.run(shared, two, **options)
  return one, Stopped(process.returncode, out, err, copy), two, out_of_end


@pytest.fixture(scope="module")
def dimo(tmp_path_factory):
  return runs(tmp_path_factory, commands.TINY)


@pytest.fixture(scope="module")
def dmd2(tmp_path_factory):
  return runs(tmp_path_factory, commands.TINY_DMD2)


def check(found):
  one, stopped, two, out = found
  commands.assert_same_run(two, one)
  step = commands.checkpoint_steps(stopped.workdir / "distill")[-1]
  assert f"distill: goes on from step {step}\n" in out
  assert (two / "report.html").exists()


def test_two_processes_make_what_one_makes(dimo):
  check(dimo)


@pytest.mark.slow
def test_two_processes_make_what_one_makes_with_dmd2(dmd2):
  check(dmd2)


def test_a_signal_to_one_stops_both_at_one_step(dimo):
  stopped = dimo[1]
  assert stopped.code == RESUME_EXIT_CODE, stopped.err
  for i in range(2):
    assert f"process {i}: exit code {RESUME_EXIT_CODE}\n" in stopped.err
  assert stopped.out.count("the same command goes on from here") == 1
  step = commands.checkpoint_steps(stopped.workdir / "distill")[-1]
  assert step == commands.rows(stopped.workdir / "distill")[-1]["step"] < commands.NUM_STEPS
  assert not list(stopped.workdir.rglob("*tmp*"))


def test_only_the_first_process_speaks(dimo):
  _, stopped, two, out = dimo
  lines = [line.split()[:2] for line in (stopped.out + out).splitlines() if " it/s " in line]
  of_steps = range(1, commands.NUM_STEPS + 1)
  wanted = [
    [name, f"{i}/{commands.NUM_STEPS}"] for name in ("teacher", "distill") for i in of_steps
  ]
  assert lines == wanted
  for stage in ("teacher", "distill"):
    assert [row["step"] for row in commands.rows(two / stage)] == list(of_steps)


def test_one_process_restores_what_two_saved(dimo):
  directory = dimo[1].workdir / "distill"
  step = commands.checkpoint_steps(directory)[-1]
  saved = commands.arrays(directory, step)
  experiment = build(debug.get_config())
  state = jax.eval_shape(initial_state(experiment, prepare.random_teacher(experiment)))
  for devices, fsdp in ((8, 4), (1, 1)):
    mesh = make_mesh(fsdp, jax.devices()[:devices])
    checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
    restored, found = checkpoints.restore(state, mesh, ())
    checkpoints.close()
    assert found == step
    tree = traverse_util.flatten_dict(serialization.to_state_dict(restored), sep="/")
    assert tree.keys() == saved.keys()
    for name, value in tree.items():
      assert len(value.sharding.device_set) == devices
      np.testing.assert_array_equal(value, saved[name], err_msg=name)


def test_what_is_split_over_processes_and_memories_is_restored(tmp_path_factory):
  """Parameters split over both processes, averages in the hosts' memory, stopped half way."""
  folder = tmp_path_factory.mktemp("split")
  one, two = folder / "one", folder / "two"
  split = ("--config.mesh.fsdp=2", "--config.train.ema_memory=host")
  command = (*commands.TINY, *FEWER_ROWS, *split)
  with commands.shared_folder(tmp_path_factory) as shared:
    commands.run(shared, one, command=command, xla_flags=TWO_DEVICES)
    options = {"command": command, "launcher": LOCAL, "xla_flags": ONE_THREAD}
    commands.run(shared, two, "--config.train.num_steps=10", **options)
    commands.run(shared, two, **options)
  commands.assert_same_arrays(two / "distill", one / "distill", commands.NUM_STEPS)
  assert commands.results(two) == commands.results(one)
