"""What processes that run together agree on, seen from two real ones; and how they are started."""

import json
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from dimo_jax import distributed
from dimo_jax.data.pipeline import image_batches
from dimo_jax.data.sources import load_source
from dimo_jax.evaluation import scoring
from dimo_jax.sharding import local_rows, make_mesh
from dimo_jax.types import UserError
from tests import commands, judged


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
  """What the two processes of two_processes.py saw; the second got a signal at the end."""
  folder = tmp_path_factory.mktemp("two")
  with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{sock.getsockname()[1]}"
  environment = os.environ | {
    "PYTHONPATH": str(commands.ROOT),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-m", "tests.two_processes", address, str(i), str(folder)],
      cwd=commands.ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    for process in processes:
      while (line := process.stdout.readline()) and line != "ready\n":
        pass
    processes[1].send_signal(signal.SIGINT)
    output = [process.communicate(timeout=60) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], output
  found = [json.loads(out.splitlines()[-1]) for out, _ in output]
  return [s | {"written": scoring.read_rows(folder / "judged" / "results.jsonl")} for s in found]


@pytest.mark.parametrize(
  ("backend", "environment", "kept"),
  [("cpu", {}, False), ("tpu", {}, True), ("tpu", {"JAX_COMPILATION_CACHE_DIR": "/x"}, False)],
)
def test_compiled_programs_are_kept_on_accelerators(
  backend, environment, kept, monkeypatch, tmp_path
):
  updates = []
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax.config, "update", lambda *pair: updates.append(pair))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  distributed.keep_compiled_programs()
  wanted = [("jax_compilation_cache_dir", str(tmp_path / ".cache" / "dimo_jax"))]
  assert updates == (wanted if kept else [])


@pytest.mark.ci
def test_the_first_is_known_and_believed(seen):
  assert [s["is_first"] for s in seen] == [True, False]
  for name, wanted in (
    ("from_first", True),
    ("in_any", [True, False]),
    ("on_first", "process 0 says no"),
    ("exists", [False, True, True]),
  ):
    assert [s[name] for s in seen] == [wanted] * 2, name


@pytest.mark.ci
def test_a_folder_that_is_not_shared_is_refused_by_all(seen):
  for i, s in enumerate(seen):
    assert f"own_{i}" in s["not_shared"] and "not one folder for all processes" in s["not_shared"]


@pytest.mark.ci
def test_each_feeds_its_own_rows_and_gets_its_own_slices(seen):
  assert [s["local_rows"] for s in seen] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  for s in seen:
    assert s["batch"] and s["fetched"]
    assert s["split"] == [2, 4]  # of [2, 8], over fsdp=2
    assert s["sum"] == 123
    assert s["draw"] == float(jax.random.uniform(jax.random.key(7)))


@pytest.mark.ci
def test_they_judge_as_one_process_does_and_write_once(seen, tmp_path):
  alone = judged.evaluate(make_mesh(), tmp_path / "alone")
  assert seen[0]["rows"] == seen[1]["rows"] == seen[0]["written"]
  for row, expected in zip(seen[0]["rows"], alone, strict=True):
    for name in ("fid", "inception_score", "kid", "precision", "recall"):
      assert row[name] == pytest.approx(expected[name], rel=1e-4), name
  assert seen[0]["rows"][0]["fid"] != pytest.approx(alone[1]["fid"], rel=0.1)


@pytest.mark.ci
def test_a_ctrl_c_to_one_stops_both_at_the_same_call(seen):
  assert seen[0]["stopped_at"] == seen[1]["stopped_at"] > 0
  assert seen[0]["still_set"] and seen[1]["still_set"]


@pytest.mark.parametrize(
  ("arguments", "needles"),
  [
    (("host:1", None, None), ["--num_processes, --process_id missing"]),
    (("", 2, 0), ["--coordinator_address missing"]),
    (("host", 2, 0), ["--coordinator_address='host'", "HOST:PORT"]),
    (("host:1", 2, 2), ["--process_id=2", "0 .. 1"]),
  ],
)
def test_flags_that_do_not_go_together_are_refused(monkeypatch, arguments, needles):
  monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
  with pytest.raises(UserError) as error:
    distributed.initialize(*arguments)
  assert not [needle for needle in needles if needle not in str(error.value)]


@pytest.mark.parametrize(
  ("environment", "flag", "joins"),
  [
    ({}, None, False),
    ({}, True, True),
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, None, False),  # salloc's shell
    ({"SLURM_STEP_NUM_TASKS": "1"}, None, False),
    ({"SLURM_STEP_NUM_TASKS": "8"}, None, True),
    ({"SLURM_STEP_NUM_TASKS": "8"}, False, False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, None, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, None, True),
  ],
)
def test_the_cluster_is_asked_where_it_names_several_processes(
  monkeypatch, environment, flag, joins
):
  calls = []
  for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
  distributed.initialize(distributed=flag)
  assert bool(calls) is joins


def test_a_process_that_did_not_join_is_told_to(monkeypatch):
  distributed.check_joined()
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  with pytest.raises(UserError, match="one of 4 processes: add --distributed"):
    distributed.check_joined()


def test_one_process_reads_every_row():
  np.testing.assert_array_equal(local_rows(16, make_mesh(2)), np.arange(16))


@pytest.mark.parametrize("flip", [False, True])
def test_rows_of_a_batch_are_those_of_the_whole_batch(flip):
  source = load_source("digits", "test")  # 360 images: steps 2 and 3 run across the epoch's end
  rows = np.array([1, 2, 5, 100, 149])
  fields = {"batch_size": 150, "seed": 3, "start_step": 1, "num_steps": 3, "flip": flip}
  whole = list(image_batches(source, **fields))
  part = list(image_batches(source, rows=rows, **fields))
  assert len(whole) == len(part) == 3
  for one, other in zip(whole, part, strict=True):
    for name in one:
      np.testing.assert_array_equal(other[name], one[name][rows], err_msg=name)
