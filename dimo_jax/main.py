"""Command line: flags and dispatch. `python -m dimo_jax.main --config=configs/digits.py`."""

import os
import re
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

  logging.set_verbosity(logging.FATAL)  # orbax logs every step, and errors before it raises them
  experiment, workdir = build.build(_CONFIG.value), Path(_WORKDIR.value)
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


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    _ = _CONFIG.value and _CONFIG.value.is_locked  # a file that is missing shows at the first use
    return rest
  except (AttributeError, KeyError) as error:  # its text may name the nearest field
    words = set(re.findall(r"\w+", str(error)))
    given = [arg for arg in argv[1:] if words & set(re.split("[.=]", arg)[1:])]
    near = re.findall(r'Did you mean ("\w+")', str(error)) if given else []
    text = f"{given[-1]}: no such field" if given else f"--config: {error}"
    raise UserError("; did you mean ".join([text, *near])) from error
  except OSError as error:
    raise UserError(f"--config: {str(error).splitlines()[-1].strip()}") from error
  except (flags.Error, TypeError, ValueError) as error:
    raise UserError(" ".join(str(error).split())) from error


def main() -> None:
  """Runs the command line; every way to fail has its line and its exit code."""
  from dimo_jax.health import RunStopped, disk_is_full
  from dimo_jax.preemption import RESUME_EXIT_CODE, Preempted

  try:
    app.run(_dispatch, flags_parser=_parse_flags)
  except (UserError, RunStopped) as error:
    sys.exit(_fail(error, BAD_INPUT if isinstance(error, UserError) else STOPPED))
  except Preempted as error:
    print(error, flush=True)
    sys.exit(RESUME_EXIT_CODE)
  except Exception as error:
    if not disk_is_full(error):
      raise
    code = _fail("the disk is full; free some space and run the same command again", 1)
    os._exit(code)  # a plain exit would let TensorBoard's writer try again, and say so at length


def _fail(error: object, code: int) -> int:
  print(f"error: {error}", file=sys.stderr, flush=True)
  return code


if __name__ == "__main__":
  main()
