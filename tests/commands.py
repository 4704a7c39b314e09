"""The command line as a subprocess, and one uninterrupted run for several tests to compare with."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from dimo_jax.checkpoint import Checkpoints
from dimo_jax.writers import WALL_CLOCK_FIELDS

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_STEPS = 20  # of configs/debug.py, in both stages
# A row at every step, checkpoints and evaluations at different ones; a constant schedule, so that
# runs may grow.
_OPTIONS = (
  "--config.optim.generator.schedule=constant",
  "--config.optim.fake_score.schedule=constant",
  "--config.log.every_steps=1",
  "--config.log.checkpoint_every_steps=6",
  "--config.log.keep_checkpoints=3",
)
TINY = ("--config=configs/debug.py", *_OPTIONS)
TINY_DMD2 = ("--config=configs/debug.py:dmd2", *_OPTIONS)


def environment(shared: pathlib.Path, xla_flags: str = "") -> dict[str, str]:
  """One device by default, and compiled functions kept from one process to the next."""
  return os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": xla_flags,
    "PJRT_NPROC": "2",  # threads of XLA's pool, which split convolutions: else as many as devices
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles twice as fast
    "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def start(
  shared: pathlib.Path,
  workdir: pathlib.Path,
  *arguments: str,
  command: Sequence[str] = TINY,
  launcher: Sequence[str] = (sys.executable, "-m", "dimo_jax.main"),
  xla_flags: str = "",
) -> subprocess.Popen:
  """Starts `python -m dimo_jax.main` on a workdir, or another launcher of it."""
  return subprocess.Popen(
    [*launcher, *command, f"--workdir={workdir}", *arguments],
    cwd=ROOT,
    env=environment(shared, xla_flags) | {"PYTHON": sys.executable},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(
  shared: pathlib.Path,
  workdir: pathlib.Path,
  *arguments: str,
  command: Sequence[str] = TINY,
  code: int = 0,
  timeout_s: float = 240,
  **options: Any,
) -> tuple[str, str]:
  """Runs the command to its end; (stdout, stderr), after the exit code was found right."""
  process = start(shared, workdir, *arguments, command=command, **options)
  out, err = process.communicate(timeout=timeout_s)
  assert process.returncode == code, (process.returncode, out[-2000:], err[-4000:])
  return out, err


@contextlib.contextmanager
def shared_folder(tmp_path_factory: Any) -> Iterator[pathlib.Path]:
  """A folder of this session, the same for all workers of pytest-xdist, one at a time inside."""
  base = tmp_path_factory.getbasetemp()
  base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
  folder = base / "commands"
  folder.mkdir(exist_ok=True)
  with open(folder / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield folder


def reference(tmp_path_factory: Any, command: Sequence[str] = TINY) -> pathlib.Path:
  """The workdir of an uninterrupted run; look, don't touch."""
  with shared_folder(tmp_path_factory) as folder:
    workdir = folder / command[0].rpartition("/")[2].replace(":", "_")
    if not (workdir / "report.html").exists():
      run(folder, workdir, command=command)
  return workdir


def copy_run(workdir: pathlib.Path, target: pathlib.Path, *without: str) -> pathlib.Path:
  """A copy of a workdir without its results and some of its folders."""
  ignore = shutil.ignore_patterns("results.json", "report.html", *without)
  shutil.copytree(workdir, target, ignore=ignore)
  return target


def checkpoint_steps(directory: pathlib.Path) -> list[int]:
  """Finished checkpoints of a stage."""
  return sorted(int(p.name) for p in (directory / "checkpoints").glob("*") if p.name.isdigit())


def rows(directory: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a stage's metrics.jsonl without the wall clock; every line must be whole."""
  lines = (directory / "metrics.jsonl").read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK_FIELDS} for line in lines
  ]


def results(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of results.json without the wall clock."""
  found = json.loads((workdir / "results.json").read_text())
  return [{k: v for k, v in row.items() if k != "images_per_second"} for row in found]


def arrays(directory: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Every array of a stage's checkpoint, by path, on whatever devices it was made."""
  checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
  tree = checkpoints.read(step)
  checkpoints.close()
  return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


def assert_same_arrays(directory: pathlib.Path, wanted: pathlib.Path, step: int) -> None:
  """Bit-identical checkpoints: parameters, moments, averages, counters."""
  got, expected = arrays(directory, step), arrays(wanted, step)
  assert got.keys() == expected.keys(), sorted({*got} ^ {*expected})
  different = [k for k in expected if got[k].tobytes() != expected[k].tobytes()]
  assert not different, different


def assert_same_run(workdir: pathlib.Path, wanted: pathlib.Path) -> None:
  """Everything that a finished run leaves is identical, but for the wall clock."""
  for stage in ("teacher", "distill"):
    assert_same_rows(rows(workdir / stage), rows(wanted / stage))
    last = checkpoint_steps(wanted / stage)[-1]
    assert_same_arrays(workdir / stage, wanted / stage, last)
  for pattern in ("*/*.safetensors", "*/record.json", "distill/pictures/*"):
    files = {p.relative_to(wanted) for p in wanted.glob(pattern)}
    assert files == {p.relative_to(workdir) for p in workdir.glob(pattern)}, pattern
    assert files, pattern
    different = [f for f in files if (workdir / f).read_bytes() != (wanted / f).read_bytes()]
    assert not different, different
  got, expected = results(workdir), results(wanted)
  assert got == expected, (got, expected)
  left = [p for p in workdir.rglob("*") if ".tmp" in p.name or "checkpoint-tmp" in p.name]
  assert not left, left


def assert_same_rows(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
  """Equal rows of metrics, to the last bit."""
  assert [row["step"] for row in got] == [row["step"] for row in expected], (got, expected)
  different = [pair for pair in zip(got, expected, strict=True) if pair[0] != pair[1]]
  assert not different, different[0]
