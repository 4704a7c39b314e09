"""Interrupted anywhere, the same command ends where an uninterrupted run does, bit by bit."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from dimo_jax.preemption import RESUME_EXIT_CODE
from tests import commands

pytestmark = pytest.mark.ci  # a run stopped five times

POLL_S = 0.0005


@dataclasses.dataclass
class Seen:
  """What lay in a workdir when its run was stopped."""

  code: int
  out: str
  teacher_steps: list[int]
  distill_steps: list[int]
  last_row: int
  unfinished: list[str]


def last_step(directory: pathlib.Path) -> int:
  """The step of the last whole row on disk, 0 if none."""
  try:
    text = (directory / "metrics.jsonl").read_text()
  except FileNotFoundError:
    return 0
  lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
  return int(lines[-1].split('"step": ')[1].split(",")[0]) if lines else 0


def unfinished(workdir: pathlib.Path) -> list[str]:
  """Checkpoints that are being written."""
  return [p.name for p in workdir.glob("distill/checkpoints/*.orbax-checkpoint-tmp")]


def stop_when(
  process: subprocess.Popen, workdir: pathlib.Path, ready: Callable[[], bool], number: int
) -> Seen:
  """Sends a signal once `ready`; SIGKILL only if it is still so with the process held still."""
  while process.poll() is None:
    if ready():
      if number != signal.SIGKILL:
        process.send_signal(number)
        break
      process.send_signal(signal.SIGSTOP)
      os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT | os.WEXITED)
      if ready():
        process.kill()
        break
      process.send_signal(signal.SIGCONT)
    time.sleep(POLL_S)
  out, err = process.communicate(timeout=120)
  assert process.returncode in (-number, RESUME_EXIT_CODE), (process.returncode, out, err)
  return Seen(
    code=process.returncode,
    out=out,
    teacher_steps=commands.checkpoint_steps(workdir / "teacher"),
    distill_steps=commands.checkpoint_steps(workdir / "distill"),
    last_row=last_step(workdir / "distill"),
    unfinished=unfinished(workdir),
  )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  return commands.reference(tmp_path_factory)


@dataclasses.dataclass
class Interrupted:
  """A run that was stopped again and again, then found two damaged checkpoints, then ended."""

  workdir: pathlib.Path
  seen: dict[str, Seen]
  truncated: int  # steps of the damaged checkpoints
  garbled: int
  out: str  # of the last command


def damage(folder: pathlib.Path, *, truncate: bool) -> None:
  """Cuts every file of a checkpoint to half, or overwrites the middle of every large one."""
  for path in (p for p in folder.rglob("*") if p.is_file()):
    data = bytearray(path.read_bytes())
    if truncate:
      path.write_bytes(data[: len(data) // 2])
    elif len(data) > 5000:
      data[len(data) // 3 : 2 * len(data) // 3] = b"\x5a" * (2 * len(data) // 3 - len(data) // 3)
      path.write_bytes(data)


@pytest.fixture(scope="module")
def interrupted(reference, tmp_path_factory) -> Interrupted:
  workdir = tmp_path_factory.mktemp("interrupted") / "run"
  teacher, distill = workdir / "teacher", workdir / "distill"

  def between_row_and_checkpoint() -> bool:  # an evaluation's checkpoint, or a regular one
    step = last_step(distill)
    return step in (10, 12, 18) and step not in commands.checkpoint_steps(distill)

  seen: dict[str, Seen] = {}
  stops: list[tuple[str, Callable[[], bool], int]] = [
    ("teacher", lambda: last_step(teacher) >= 8, signal.SIGKILL),
    ("checkpoint", lambda: bool(unfinished(workdir)), signal.SIGKILL),
    ("row", between_row_and_checkpoint, signal.SIGKILL),
    ("sigterm", lambda: last_step(distill) >= 13, signal.SIGTERM),
    ("sigint", lambda: last_step(distill) > seen["sigterm"].last_row, signal.SIGINT),
  ]
  with commands.shared_folder(tmp_path_factory) as shared:
    for name, ready, number in stops:
      seen[name] = stop_when(commands.start(shared, workdir), workdir, ready, number)
    *_, garbled, truncated = commands.checkpoint_steps(distill)
    damage(distill / "checkpoints" / str(truncated), truncate=True)
    damage(distill / "checkpoints" / str(garbled), truncate=False)
    out, _ = commands.run(shared, workdir)
  return Interrupted(workdir, seen, truncated, garbled, out)


def test_an_interrupted_run_ends_like_an_uninterrupted_one(interrupted, reference):
  commands.assert_same_run(interrupted.workdir, reference)


def test_kills_hit_where_they_should(interrupted):
  teacher, checkpoint, row = (interrupted.seen[k] for k in ("teacher", "checkpoint", "row"))
  assert {teacher.code, checkpoint.code, row.code} == {-signal.SIGKILL}
  assert not {0, commands.NUM_STEPS} & {*teacher.teacher_steps}
  assert not teacher.distill_steps
  assert len(checkpoint.unfinished) == 1
  assert row.last_row in (10, 12, 18)
  assert row.last_row not in row.distill_steps


@pytest.mark.parametrize("name", ["sigterm", "sigint"])
def test_a_signal_leaves_a_checkpoint_of_the_step_it_stopped_at(interrupted, name):
  seen = interrupted.seen[name]
  assert seen.code == RESUME_EXIT_CODE
  assert f"{name.upper()}: stopping at the next safe point" in seen.out
  assert "the same command goes on from here" in seen.out
  assert seen.distill_steps[-1] == seen.last_row < commands.NUM_STEPS
  assert not seen.unfinished


def test_damaged_checkpoints_are_named_passed_over_and_kept(interrupted):
  folder = interrupted.workdir / "distill" / "checkpoints"
  for step in (interrupted.truncated, interrupted.garbled):
    assert f"checkpoint {folder / str(step)} is damaged and skipped: " in interrupted.out
    assert (folder / "damaged" / str(step)).is_dir()
  used = interrupted.seen["sigint"].distill_steps[-3]
  assert f"distill: goes on from step {used}\n" in interrupted.out


def test_averages_in_the_hosts_memory_are_the_same(reference, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("host") / "run"
  with commands.shared_folder(tmp_path_factory) as shared:
    commands.run(shared, workdir, "--config.train.ema_memory=host", "--config.train.num_steps=10")
    commands.run(shared, workdir)  # and on the device from there on
  commands.assert_same_arrays(workdir / "distill", reference / "distill", commands.NUM_STEPS)
  assert commands.results(workdir) == commands.results(reference)


@pytest.fixture(scope="module")
def grown(reference, tmp_path_factory) -> tuple[pathlib.Path, str]:
  """(workdir, stdout) of ten steps from a given teacher, and then ten more."""
  workdir = tmp_path_factory.mktemp("grown") / "run"
  arguments = ("--config.evaluation.protocol=none", f"--config.teacher.path={reference}/teacher")
  with commands.shared_folder(tmp_path_factory) as shared:
    commands.run(shared, workdir, *arguments, "--config.train.num_steps=10")
    return workdir, commands.run(shared, workdir, *arguments)[0]


def test_a_given_teacher_and_more_steps_later_end_the_same(grown, reference):
  workdir, out = grown
  assert "distill: goes on from step 10\n" in out
  assert not (workdir / "teacher").exists()
  commands.assert_same_arrays(workdir / "distill", reference / "distill", commands.NUM_STEPS)
  wanted = [
    {k: v for k, v in row.items() if not k.startswith("evaluation/")}
    for row in commands.rows(reference / "distill")
  ]
  commands.assert_same_rows(commands.rows(workdir / "distill"), wanted)
