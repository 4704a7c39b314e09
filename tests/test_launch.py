"""The launchers, with stubs for gcloud, kubectl, srun and Python that record their calls."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
TPU = {"TPU_NAME": "tpu", "TPU_ZONE": "zone", "TPU_TYPE": "v5litepod-16", "TPU_VERSION": "v2"}
GKE = {
  "JOB_NAME": "job",
  "IMAGE": "registry/image",
  "CLAIM": "claim",
  "TPU_ACCELERATOR": "tpu-v5-lite-podslice",
  "TPU_TOPOLOGY": "4x4",
  "NUM_HOSTS": "4",
  "CHIPS_PER_HOST": "4",
}
FLAGS = ("--config=configs/debug.py", "--config.data.path=my data", "--workdir=/shared/run")

# Takes the first unused answer [prefix, code, output, errors] with the prefix of its arguments.
STUB = f"""#!{sys.executable} -SE
import fcntl, json, pathlib, sys
folder = pathlib.Path(__file__).parent
with open(folder / "calls", "a") as calls:
  fcntl.flock(calls, fcntl.LOCK_EX)
  stdin = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
  calls.write(json.dumps([pathlib.Path(__file__).name, *sys.argv[1:], stdin]) + "\\n")
  answers = json.loads((folder / "answers").read_text())
  for answer in answers:
    if " ".join(sys.argv[1:]).startswith(answer[0]):
      answers.remove(answer)
      (folder / "answers").write_text(json.dumps(answers))
      print(answer[2])
      print(*answer[3:], file=sys.stderr)
      sys.exit(answer[1])
"""


@pytest.fixture
def launch(tmp_path):
  """launch(script, *arguments, answers=, **environment) -> (exit code, stdout, stderr, calls)."""
  (tmp_path / "tar").write_text("#!/bin/sh\ncat > /dev/null")  # packing takes a second
  (tmp_path / "tar").chmod(0o755)

  def run(script, *arguments, answers=(), **environment):
    for name in ("gcloud", "kubectl", "srun", "scontrol"):
      (tmp_path / name).write_text(STUB)
      (tmp_path / name).chmod(0o755)
    (tmp_path / "answers").write_text(json.dumps(answers))
    (tmp_path / "calls").write_text("")
    done = subprocess.run(
      [str(LAUNCH / script), *arguments],
      env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "POLL_S": "0"} | environment,
      cwd=ROOT,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      check=False,
      timeout=30,
    )
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    return done.returncode, done.stdout, done.stderr, calls

  return run


def verbs(calls):
  """What was asked of gcloud's TPUs, and of which workers."""
  workers = [[a[9:] for a in call if a.startswith("--worker=")] for call in calls]
  return [" ".join([call[4], *worker]) for call, worker in zip(calls, workers, strict=True)]


RUN = ["scp all", "ssh all", "ssh all", "ssh 0"]  # code, installation, start, log


@pytest.mark.parametrize(
  ("script", "environment", "is_spot"),
  [
    ("tpu_vm.sh", {}, False),
    ("tpu_vm.sh", {"TPU_SPOT": "1"}, True),
    ("tpu_queued.sh", {}, True),
    ("tpu_queued.sh", {"TPU_ON_DEMAND": "1"}, False),
  ],
)
def test_spot_is_asked_for(launch, script, environment, is_spot):
  _, _, err, _ = launch(script, "--dry_run", "run", *FLAGS, **TPU, **environment)
  assert ("--spot" in err) is is_spot


@pytest.mark.parametrize(("script", "ready"), [("tpu_vm.sh", "READY"), ("tpu_queued.sh", "ACTIVE")])
class TestTpu:
  """Both ways to a TPU."""

  def look(self, script, state):
    group = "tpu-vm" if script == "tpu_vm.sh" else "queued-resources"
    return [f"compute tpus {group} describe", 0, state]

  def test_one_that_is_there_is_used(self, launch, script, ready):
    code, _, err, calls = launch(script, "run", *FLAGS, answers=[self.look(script, ready)], **TPU)
    assert code == 0, err
    assert verbs(calls) == ["describe", *RUN]
    started = calls[3]
    command = next(a for a in started if a.startswith("--command="))
    assert "dimo_jax.main\\ --distributed" in command
    assert all(flag.partition("=")[0] in command for flag in FLAGS)
    assert all("--zone=zone" in call for call in calls)

  def test_one_that_is_not_there_is_made_and_waited_for(self, launch, script, ready):
    answers = [self.look(script, ""), self.look(script, "CREATING"), self.look(script, ready)]
    code, _, err, calls = launch(script, "run", *FLAGS, answers=answers, **TPU)
    assert code == 0, err
    assert verbs(calls) == ["describe", "create", "describe", "describe", *RUN]
    assert "v5litepod-16" in " ".join(calls[1])

  def test_a_stopped_run_is_started_again_and_a_preempted_tpu_made_anew(
    self, launch, script, ready
  ):
    follow = "compute tpus tpu-vm ssh tpu --zone=zone --worker=0"
    states = [ready, ready, "PREEMPTED" if ready == "READY" else "SUSPENDED", ready]
    answers = [self.look(script, state) for state in states]
    answers += [[follow, 75, ""], [follow, 255, ""], [follow, 3, "error"]]
    code, out, err, calls = launch(script, "run", *FLAGS, answers=answers, **TPU)
    assert (code, out.strip()) == (3, "error"), err
    again = ["describe", "delete", "create", "describe"]
    assert verbs(calls) == ["describe", *RUN, "describe", *RUN, *again, *RUN]
    assert "restart 2, after exit code 255" in err

  def test_a_tpu_that_somebody_stopped_is_left_alone(self, launch, script, ready):
    answers = [self.look(script, "STOPPED")]
    code, _, err, calls = launch(script, "run", *FLAGS, answers=answers, **TPU)
    assert code == 2 and "tpu is STOPPED: start or delete it yourself" in err
    assert verbs(calls) == ["describe"]

  def test_restarts_end(self, launch, script, ready):
    follow = "compute tpus tpu-vm ssh tpu --zone=zone --worker=0"
    answers = [self.look(script, ready), [follow, 75, ""]] * 2
    code, _, _, calls = launch(script, "run", *FLAGS, answers=answers, **TPU, MAX_RESTARTS="1")
    assert code == 75
    assert verbs(calls).count("scp all") == 2

  def test_log_and_deletion_alone(self, launch, script, ready):
    del ready
    for verb, wanted in (("logs", "ssh 0"), ("delete", "delete")):
      code, _, err, calls = launch(script, verb, TPU_NAME="tpu", TPU_ZONE="zone")
      assert (code, verbs(calls)) == (0, [wanted]), err

  def test_what_is_missing_is_named(self, launch, script, ready):
    del ready
    code, _, err, calls = launch(script, "run", *FLAGS, TPU_NAME="tpu", TPU_ZONE="zone")
    assert (code, calls) == (2, [])
    assert "error: set TPU_TYPE" in err
    assert launch(script, "fly", **TPU)[0] == 2

  def test_only_what_is_not_found_is_made(self, launch, script, ready):
    missing = [*self.look(script, ""), "ERROR: NOT_FOUND: Resource tpu was not found"]
    missing[1] = 1
    answers = [missing, self.look(script, ready)]
    code, _, err, calls = launch(script, "run", *FLAGS, answers=answers, **TPU)
    assert code == 0, err
    assert verbs(calls) == ["describe", "create", "describe", *RUN]
    refused = [*missing[:3], "ERROR: Failed to find attribute [project]"]
    code, _, err, calls = launch(script, "run", *FLAGS, answers=[refused], **TPU)
    assert (code, verbs(calls)) == (2, ["describe"])
    assert "[project]" in err and "error: tpu cannot be looked at; see above" in err

  @pytest.mark.parametrize(
    ("flags", "message"),
    [
      (["--config=configs/debug.py"], "--workdir is missing; name a folder that every host sees"),
      (["--workdir=/x", "--config=configs/debg.py:a"], "--config=configs/debg.py:a does not exist"),
    ],
  )
  def test_no_tpu_is_made_for_a_job_that_cannot_run(self, launch, script, ready, flags, message):
    del ready
    code, _, err, calls = launch(script, "run", *flags, **TPU)
    assert (code, calls) == (2, []) and f"error: {message}" in err

  @pytest.mark.parametrize("place", [0, 1, 3])
  def test_a_dry_run_prints_every_command_and_calls_nothing(self, launch, script, ready, place):
    del ready
    arguments = ["run", *FLAGS]
    arguments.insert(place, "--dry_run")
    code, _, err, calls = launch(script, *arguments, **TPU)
    assert (code, calls) == (0, []) and err.count("dry_run") == 0
    printed = [line.split() for line in err.splitlines() if line.startswith("+ gcloud")]
    assert [words[5] for words in printed] == ["describe", "create", "scp", "ssh", "ssh", "ssh"]
    assert "+ git ls-files" in err and "+ tar" in err


def test_gke_gets_the_filled_in_manifest(launch):
  yaml = pytest.importorskip("yaml")
  code, _, err, calls = launch("gke.sh", "run", *FLAGS, '--x="\\', **GKE)
  assert code == 0, err
  assert [call[:2] for call in calls] == [["kubectl", "apply"], ["kubectl", "logs"]]
  assert "${" not in calls[0][-1]
  spec = yaml.safe_load(calls[0][-1])["spec"]
  job = spec["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  assert job["completions"] == job["parallelism"] == 4
  assert pod["containers"][0]["args"] == [*FLAGS, '--x="\\']
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
  assert spec["failurePolicy"]["maxRestarts"] == 100
  assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3]


def test_gke_dry_run_and_deletion(launch):
  code, out, err, calls = launch("gke.sh", "--dry_run", "run", *FLAGS, **GKE)
  assert (code, calls) == (0, [])
  assert "kind: JobSet" in out
  assert "+ kubectl apply" in err and "+ kubectl logs" in err
  assert launch("gke.sh", "delete", JOB_NAME="job")[3] == [
    ["kubectl", "delete", "jobset", "job", ""]
  ]
  assert "error: set IMAGE" in launch("gke.sh", "run", JOB_NAME="job")[2]


@pytest.mark.parametrize(("ended", "requeued"), [(0, False), (75, True), (3, False)])
def test_slurm_requeues_what_was_stopped(launch, ended, requeued):
  answers = [["--kill-on-bad-exit", ended, ""]]
  code, _, err, calls = launch("slurm.sbatch", *FLAGS, answers=answers, SLURM_JOB_ID="7")
  assert code == ended, err
  assert calls[0][0] == "srun" and calls[0][-len(FLAGS) - 2 : -1] == ["--distributed", *FLAGS]
  assert calls[1:] == ([["scontrol", "requeue", "7", ""]] if requeued else [])


def test_slurm_dry_run(launch):
  code, _, err, calls = launch("slurm.sbatch", "--dry_run", *FLAGS)
  assert (code, calls) == (0, [])
  assert "+ srun" in err and "my\\ data" in err


# Stands for Python: prints its flags; process N does what the line for it says.
PYTHON = """#!/bin/bash
[[ $1 == -c ]] && exec {python} "$@"
echo "$JAX_LOCAL_DEVICE_IDS $*"
case "$*" in
  *--process_id=0*) {first} ;;
  *) {second} ;;
esac
"""


def start_local(tmp_path, first, second):
  python = tmp_path / "python"
  python.write_text(PYTHON.format(python=sys.executable, first=first, second=second))
  python.chmod(0o755)
  return subprocess.Popen(
    [str(LAUNCH / "local.sh"), "2", *FLAGS],
    env=os.environ | {"PYTHON": str(python), "GRACE_S": "1", "DEVICES_PER_PROCESS": "2"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize("place", [0, 1, 4])
def test_a_local_dry_run_starts_nothing(launch, place):
  arguments = ["2", *FLAGS]
  arguments.insert(place, "--dry_run")
  code, out, err, _ = launch("local.sh", *arguments, PYTHON=sys.executable)
  assert (code, out) == (0, ""), err
  assert err.count("+ env JAX_LOCAL_DEVICE_IDS") == 2 and "dry_run" not in err


def test_local_processes_know_each_other(tmp_path):
  process = start_local(tmp_path, ":", ":")
  out, err = process.communicate(timeout=30)
  assert process.returncode == 0, err
  first, second = sorted(out.splitlines())
  assert first.startswith("0,1 -m dimo_jax.main ") and second.startswith("2,3 -m dimo_jax.main ")
  assert first.endswith("--num_processes=2 --process_id=0")
  assert second.endswith("--num_processes=2 --process_id=1")
  assert first.split()[-3] == second.split()[-3]
  assert first.split()[-3].startswith("--coordinator_address=127.0.0.1:")


def test_local_processes_do_not_outlive_one_that_failed(tmp_path):
  began = time.monotonic()
  process = start_local(tmp_path, "exec sleep 60", "exit 3")
  process.communicate(timeout=30)
  assert process.returncode == 3
  assert time.monotonic() - began < 15


def test_a_signal_reaches_all_local_processes(tmp_path):
  wait = "trap 'echo stopped; exit 75' TERM; echo ready; while :; do sleep 0.05; done"
  process = start_local(tmp_path, wait, wait)
  for _ in range(4):  # two lines each
    process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=30)
  assert process.returncode == 75, err
  assert out.splitlines() == ["stopped"] * 2


def test_shellcheck_finds_nothing():
  if shutil.which("shellcheck") is None:
    pytest.skip("shellcheck is not installed (Debian: apt-get install shellcheck)")
  scripts = [str(path) for path in (*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch")]
  done = subprocess.run(
    ["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout
