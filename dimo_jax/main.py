"""Command line: flags and dispatch. `python -m dimo_jax.main --config=configs/digits.py`."""

import errno
import sys
import tempfile
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from dimo_jax.types import UserError

MODES = ("train", "evaluate", "sample")
BAD_INPUT, STOPPED = 2, 3  # exit codes, beside preemption.RESUME_EXIT_CODE

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; --config.a.b=1 overrides.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if missing.")
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")
_LABELS = flags.DEFINE_string("labels", "", "--mode=sample: class ids, as in 3,1,4.")
_SEED = flags.DEFINE_integer("seed", 0, "--mode=sample: seed of the pictures.")
_OUT = flags.DEFINE_string("out", "", "--mode=sample: PNG file; default WORKDIR/samples.png.")


def _dispatch(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"{argv[1]!r} is not a flag; flags begin with --")
  if _CONFIG.value is None:
    raise UserError("--config is missing; name a config, such as --config=configs/digits.py")
  if not _WORKDIR.value:
    raise UserError("--workdir is missing; name a folder, such as --workdir=runs/digits")
  # Imported here, so that a mistyped flag is answered before JAX starts.
  from dimo_jax import build, evaluate, sample, train
  from dimo_jax.preemption import STOP

  logging.set_verbosity(logging.WARNING)  # orbax tells every step it takes
  experiment, workdir = build.build(_CONFIG.value), Path(_WORKDIR.value)
  STOP.install()
  if _MODE.value == "train":
    _check_writable(workdir)
    train.train(experiment, workdir)
  if _MODE.value in ("train", "evaluate"):
    evaluate.evaluate_workdir(experiment, workdir)
  if _MODE.value == "sample":
    out = Path(_OUT.value) if _OUT.value else workdir / "samples.png"
    sample.sample_workdir(experiment, workdir, _LABELS.value, _SEED.value, out)


def _check_writable(workdir: Path) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir) as stream:
      stream.write(b"0" * 2**20)  # a full disk shows before any compute is spent
  except OSError as error:
    raise UserError(f"--workdir={str(workdir)!r} cannot be written: {error.strerror}") from error


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    raise UserError(str(error).strip("'\"").replace("\n", " ")) from error


def main(argv: list[str] | None = None) -> None:
  """Runs the command line; every way to fail has its line and its exit code."""
  from dimo_jax.health import RunStopped
  from dimo_jax.preemption import RESUME_EXIT_CODE, Preempted

  try:
    app.run(_dispatch, argv=argv, flags_parser=_parse_flags)
  except UserError as error:
    sys.exit(_fail(error, BAD_INPUT))
  except RunStopped as error:
    sys.exit(_fail(error, STOPPED))
  except Preempted as error:
    print(error, flush=True)
    sys.exit(RESUME_EXIT_CODE)
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    sys.exit(_fail(f"the disk is full ({error}); free some and run the same command again", 1))


def _fail(error: object, code: int) -> int:
  print(f"error: {error}", file=sys.stderr, flush=True)
  return code


if __name__ == "__main__":
  main()
