"""Command line: flags and dispatch. `python -m dimo_jax.main --config=configs/digits.py`."""

import contextlib
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from absl import flags

from dimo_jax import cli
from dimo_jax.preemption import STOP
from dimo_jax.types import UserError

MODES = ("train", "teacher", "evaluate", "sample", "pairs", "plan")

_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run; made if missing. --mode=plan needs none, or takes its config.",
)
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do; teacher: train it, no more.")
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "last", "--mode=evaluate|sample: the student's checkpoint: last, best or a step."
)
_LABELS = flags.DEFINE_string("labels", "", "--mode=sample: class ids, as in 3,1,4.")
_SEED = flags.DEFINE_integer("seed", 0, "--mode=sample|pairs: seed of what is drawn.")
_OUT = flags.DEFINE_string(
  "out", "", "--mode=sample: PNG file, default WORKDIR/samples.png; pairs: .npz file."
)
_NUM_PAIRS = flags.DEFINE_integer("num_pairs", 10_000, "--mode=pairs: how many to make.")
_DEVICES = flags.DEFINE_integer("devices", 1, "--mode=plan: how many there would be.")
_DEVICE_MEMORY_GIB = flags.DEFINE_float(
  "device_memory_gib", None, "--mode=plan: memory of each, to say what fits."
)
_TARGET = flags.DEFINE_string(
  "target",
  "",
  "--mode=plan: compile instead of estimating, for v5e:4x4, two slices v5e:4x4*2, or cpu:8.",
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  "",
  "One run of several processes: HOST:PORT of process 0; with --num_processes and --process_id.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  None,
  "Whether the cluster (TPU pod, GKE, Slurm, Open MPI) knows the run's processes; by default where"
  " its environment names several. Needed on a TPU pod outside GKE.",
)


def _dispatch() -> None:
  if _MODE.value == "plan":
    _plan()
    return
  if not _WORKDIR.value:
    raise UserError("--workdir is missing; name a folder, such as --workdir=runs/digits")
  if _MODE.value in ("train", "teacher", "pairs") and _CHECKPOINT.value != "last":
    raise UserError(f"--checkpoint={_CHECKPOINT.value} is for --mode=evaluate and --mode=sample")
  # Imported here, so that a mistyped flag is answered before JAX starts.
  from dimo_jax import build, evaluate, pairs, records, sample, train
  from dimo_jax.checkpoint import check_which
  from dimo_jax.convert import files
  from dimo_jax.recipe import CONFIG_FILE, Recipe

  _join()
  workdir, given = Path(_WORKDIR.value), cli.CONFIG.value
  is_export = files.export_folder(workdir) is not None
  if is_export and (_MODE.value != "sample" or given is not None or _CHECKPOINT.value != "last"):
    raise UserError(
      f"--workdir={str(workdir)!r} is an export: --mode=sample takes it, without --config and"
      " --checkpoint"
    )
  if given is None and not is_export and not (workdir / CONFIG_FILE).exists():
    if _MODE.value in ("evaluate", "sample"):
      records.check_trained(workdir)
    raise UserError(
      f"--config is missing, and --workdir={str(workdir)!r} has recorded none; name a config, such"
      " as --config=configs/digits.py"
    )
  checkpoint = _CHECKPOINT.value
  check_which(checkpoint)
  if _MODE.value == "sample":
    STOP.at_once()
    experiment = None if given is None else build.build(given)
    text = _LABELS.value, _OUT.value
    sample.sample_workdir(workdir, experiment, *text, _SEED.value, checkpoint=checkpoint)
    return
  experiment = build.build(Recipe.load(workdir).config if given is None else given)
  STOP.raise_if_set()
  if _MODE.value == "train":
    with _writable(workdir):
      train.train(experiment, workdir)
      evaluate.evaluate_workdir(experiment, workdir)
  elif _MODE.value == "teacher":
    given = experiment.config.teacher.path
    if given:
      raise UserError(f"--mode=teacher trains one; teacher.path={given!r} must be empty")
    with _writable(workdir):
      train.make_teacher(experiment, workdir)
  elif _MODE.value == "pairs":
    with _writable(workdir):
      pairs.make_pairs(experiment, workdir, _NUM_PAIRS.value, _SEED.value, _OUT.value)
  else:
    records.check_trained(workdir)
    _check_writable(workdir)
    evaluate.evaluate_workdir(experiment, workdir, checkpoint=checkpoint)


def _join() -> None:
  """Joins the other processes of the run, where there are some; before JAX touches a device.

  Raises:
    UserError: flags that do not fit together, or processes that were not asked to join.
  """
  from dimo_jax import distributed

  distributed.initialize(
    _COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value
  )
  if cli.has_peers():
    STOP.share()
  distributed.check_joined()
  distributed.keep_compiled_programs()


def _plan() -> None:
  STOP.at_once()
  config, workdir = cli.CONFIG.value, Path(_WORKDIR.value or "")
  if config is None and not _WORKDIR.value:
    raise UserError(
      "--config is missing; name a config, such as --config=configs/digits.py, or a --workdir that"
      " has recorded one"
    )
  import jax

  jax.config.update("jax_platforms", "cpu")  # nothing runs, whatever devices this machine has
  from dimo_jax import plan, records, target
  from dimo_jax.recipe import Recipe

  if config is None:
    records.check_begun(workdir)
    recipe = Recipe.load(workdir)
    recipe.models(str(workdir))  # a config of another version shows here
    config = recipe.config

  if _TARGET.value:
    for name in ("devices", "device_memory_gib"):
      if flags.FLAGS[name].present:
        raise UserError(f"--{name} does not go with --target={_TARGET.value!r}, which says it")
    target.compile_for(config, _TARGET.value)
  else:
    plan.plan(config, _DEVICES.value, _DEVICE_MEMORY_GIB.value)


@contextlib.contextmanager
def _writable(workdir: Path) -> Iterator[None]:
  """The workdir made, seen by every process, and locked by process 0 against other runs."""
  from dimo_jax import distributed

  _check_writable(workdir)
  with contextlib.ExitStack() as stack:
    distributed.on_first(lambda: stack.enter_context(_lock(workdir)))
    distributed.check_shared(workdir)
    yield


def _check_writable(workdir: Path) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir) as stream:
      stream.write(b"0" * 2**20)  # a full disk shows before any compute is spent
  except OSError as error:
    raise UserError(f"--workdir={str(workdir)!r} cannot be written: {error.strerror}") from error


def _lock(workdir: Path) -> IO[str]:
  """The open lock file; the lock goes with the process, however it ends."""
  from dimo_jax.recipe import LOCK_FILE

  stream = open(workdir / LOCK_FILE, "a")  # noqa: SIM115 (closed by the caller)
  try:
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    stream.close()
    raise UserError(f"--workdir={str(workdir)!r}: another process is training there") from error
  return stream


def main() -> None:
  """Runs the command line."""
  cli.run(_dispatch, needs_config=False)


if __name__ == "__main__":
  main()
