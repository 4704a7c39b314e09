"""Kills a digits run again and again and looks whether it ends as if nothing had been:

    python -m tests.soak --kills=30 --processes=2

SIGKILL and SIGTERM at random moments: while it starts, between steps, while a checkpoint is being
written, around evaluations; of one of the processes where there are several. A run that ends before
its kill is compared with an uninterrupted one, bit by bit, and another begun, until all kills are
done and the last run has ended.
"""

import argparse
import collections
import itertools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from dimo_jax.preemption import RESUME_EXIT_CODE
from dimo_jax.writers import read_metrics
from tests import commands

MOMENTS = ("start", "step", "save", "evaluation")
POLL_S = 0.002
# Rows often enough to aim by, evaluations and checkpoints at different steps.
DIGITS = (
  "--config=configs/digits.py",
  "--config.teacher.pretrain.num_steps=400",
  "--config.train.num_steps=800",
  "--config.log.every_steps=10",
  "--config.log.checkpoint_every_steps=30",
  "--config.log.evaluate_every_steps=100",
  "--config.log.pictures_every_steps=400",
  "--config.evaluation.teacher_steps=(1,)",
)


class Soak:
  """One kind of run, killed; `done` counts the kills by moment and signal."""

  def __init__(
    self,
    folder: pathlib.Path,
    command: tuple[str, ...],
    num_processes: int,
    seed: int,
    environment: Mapping[str, str] = MappingProxyType({}),
  ):
    self._folder, self._command, self._num_processes = folder, command, num_processes
    self._environment = dict(environment)
    self._random = random.Random(seed)
    self.done: collections.Counter[str] = collections.Counter()
    self._reference = folder / "reference"

  def run(self, num_kills: int) -> None:
    """Kills so often; raises AssertionError at the first difference or orphan."""
    assert self._start(self._reference).wait() == 0
    for number in itertools.count():
      workdir = self._folder / f"run_{number}"
      ended = False
      while not ended:
        process = self._start(workdir)
        if self.done.total() < num_kills and self._kill(process, workdir):
          continue
        process.wait()
        assert process.returncode == 0, process.returncode
        ended = True
      commands.assert_same_run(workdir, self._reference)
      print(f"run {number} ended as the uninterrupted one", flush=True)
      shutil.rmtree(workdir)
      if self.done.total() == num_kills:
        return

  def _start(self, workdir: pathlib.Path) -> subprocess.Popen:
    """The run, or its launcher, with its output in a file beside the workdir."""
    launcher: tuple[str, ...] = (sys.executable, "-m", "dimo_jax.main")
    if self._num_processes > 1:
      launcher = (str(commands.ROOT / "launch" / "local.sh"), str(self._num_processes))
    environment = commands.environment(self._folder, "--xla_cpu_multi_thread_eigen=false")
    with open(f"{workdir}.log", "a") as log:
      return subprocess.Popen(
        [*launcher, *self._command, f"--workdir={workdir}"],
        cwd=commands.ROOT,
        env=environment | {"PYTHON": sys.executable, "GRACE_S": "2"} | self._environment,
        stdout=log,
        stderr=log,
      )

  def _kill(self, process: subprocess.Popen, workdir: pathlib.Path) -> bool:
    """Sends a signal at a moment; whether it came before the run had ended."""
    moment = self._random.choice(MOMENTS)
    number = self._random.choice((signal.SIGKILL, signal.SIGTERM))
    if not self._wait_for(moment, process, workdir):
      return False
    target = process.pid
    if self._num_processes > 1:
      children = list(_children(process.pid))
      if not children:
        return False
      target = self._random.choice(children)
    try:
      os.kill(target, number)
    except ProcessLookupError:
      return False
    code = process.wait(timeout=120)
    wanted = {-number, RESUME_EXIT_CODE, 0}  # 0: it was through
    if self._num_processes > 1 and number == signal.SIGKILL:
      wanted |= {code}  # the other process fails in its own way
    assert code in wanted | {128 + number}, code
    if code == 0:
      return False
    self.done[f"{moment} {number.name}"] += 1
    print(f"kill {self.done.total()}: {number.name} at {moment}, exit code {code}", flush=True)
    return True

  def _wait_for(self, moment: str, process: subprocess.Popen, workdir: pathlib.Path) -> bool:
    """Waits for a moment of a run; false where the run ended before."""
    if moment == "start":
      return not _ends_within(process, self._random.uniform(0, 12))
    begun = _steps(workdir)
    if moment == "save":
      left = set(workdir.glob("*/checkpoints/*-tmp*"))  # by an earlier kill
      return self._poll(process, lambda: set(workdir.glob("*/checkpoints/*-tmp*")) - left)
    if moment == "step":
      rows = self._random.randint(1, 8)
      found = self._poll(process, lambda: _steps(workdir) >= begun + rows)
    else:
      found = self._poll(process, lambda: (now := _steps(workdir)) > begun and now % 10 == 9)
    delay = self._random.uniform(0, 1 if moment == "evaluation" else 0.1)
    return found and not _ends_within(process, delay)

  def _poll(self, process: subprocess.Popen, ready: Callable[[], object]) -> bool:
    while process.poll() is None:
      if ready():
        return True
      time.sleep(POLL_S)
    return False


def _ends_within(process: subprocess.Popen, seconds: float) -> bool:
  try:
    process.wait(seconds)
  except subprocess.TimeoutExpired:
    return False
  return True


def _steps(workdir: pathlib.Path) -> int:
  """Rows of the distillation on disk, or of the teacher before it: every tenth is an evaluation."""
  stages = [stage for stage in ("distill", "teacher") if (workdir / stage).exists()]
  return len(read_metrics(workdir / stages[0])) if stages else 0


def _children(pid: int) -> Iterator[int]:
  """Processes that the launcher has started and that have become Python."""
  for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
    try:
      text = pathlib.Path(f"/proc/{child}/cmdline").read_text()
    except FileNotFoundError:
      continue
    if "--process_id=" in text:
      yield int(child)


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # this run is more than compilation
    soak = Soak(pathlib.Path(folder), DIGITS, options.processes, options.seed, fast)
    soak.run(options.kills)
  minutes = (time.monotonic() - began) / 60
  print(f"{options.kills} kills in {minutes:.1f} min: {dict(sorted(soak.done.items()))}")


if __name__ == "__main__":
  main()
