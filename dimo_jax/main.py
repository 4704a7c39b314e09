"""Command line: flags and dispatch. `python -m dimo_jax.main --config=configs/digits.py`."""

import tempfile
from pathlib import Path

from absl import flags, logging

from dimo_jax import cli
from dimo_jax.types import UserError

MODES = ("train", "evaluate", "sample")

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if missing.")
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")
_LABELS = flags.DEFINE_string("labels", "", "--mode=sample: class ids, as in 3,1,4.")
_SEED = flags.DEFINE_integer("seed", 0, "--mode=sample: seed of the pictures.")
_OUT = flags.DEFINE_string("out", "", "--mode=sample: PNG file; default WORKDIR/samples.png.")


def _dispatch() -> None:
  if not _WORKDIR.value:
    raise UserError("--workdir is missing; name a folder, such as --workdir=runs/digits")
  # Imported here, so that a mistyped flag is answered before JAX starts.
  from dimo_jax import build, evaluate, sample, train
  from dimo_jax.preemption import STOP

  logging.set_verbosity(logging.FATAL)  # orbax logs every step, and errors before it raises them
  experiment, workdir = build.build(cli.CONFIG.value), Path(_WORKDIR.value)
  STOP.install()
  if _MODE.value == "train":
    _check_writable(workdir)
    train.train(experiment, workdir)
  if _MODE.value in ("train", "evaluate"):
    evaluate.evaluate_workdir(experiment, workdir)
  if _MODE.value == "sample":
    sample.sample_workdir(experiment, workdir, _LABELS.value, _SEED.value, _OUT.value)


def _check_writable(workdir: Path) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir) as stream:
      stream.write(b"0" * 2**20)  # a full disk shows before any compute is spent
  except OSError as error:
    raise UserError(f"--workdir={str(workdir)!r} cannot be written: {error.strerror}") from error


def main() -> None:
  """Runs the command line."""
  cli.run(_dispatch)


if __name__ == "__main__":
  main()
