"""What every command shares: the `--config` flag, one line for a mistake, exit codes."""

import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from dimo_jax.allocator import keep_freed_memory
from dimo_jax.preemption import RESUME_EXIT_CODE, STOP, Preempted
from dimo_jax.types import UserError

BAD_INPUT, STOPPED = 2, 3  # exit codes, beside preemption.RESUME_EXIT_CODE

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; --config.a.b=1 overrides.")


def run(dispatch: Callable[[], None]) -> None:
  """Parses the flags and runs a command; see `guarded`."""
  guarded(lambda: app.run(lambda argv: _checked(argv, dispatch), flags_parser=_parse_flags))


def guarded(command: Callable[[], None]) -> None:
  """Runs a command; every way to fail has its line and its exit code."""
  STOP.install()  # before the long imports: an early Ctrl-C would break into them
  keep_freed_memory()
  from dimo_jax.health import RunStopped, disk_is_full

  try:
    command()
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


def _checked(argv: list[str], dispatch: Callable[[], None]) -> None:
  _check(argv)
  dispatch()


def _check(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"{argv[1]!r} is not a flag; flags begin with --")
  if CONFIG.value is None:
    raise UserError("--config is missing; name a config, such as --config=configs/digits.py")


def parse_config(arguments: Sequence[str]) -> ConfigDict:
  """The config of `--config` and `--config.a.b=1` arguments, for a command that has other flags.

  Raises:
    UserError: no config, no such file or field, or any other argument.
  """
  rest = _parse_flags(["", *arguments])
  _check(rest)
  return CONFIG.value


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    _ = CONFIG.value and CONFIG.value.is_locked  # a file that is missing shows at the first use
    return rest
  except (AttributeError, KeyError) as error:  # its text may name the nearest field
    words = set(re.findall(r"\w+", str(error)))
    given = [arg for arg in argv[1:] if words & set(re.split("[.=]", arg)[1:])]
    near = re.findall(r'Did you mean "(\w+)"', str(error)) if given else []
    text = f"{given[-1]}: no such field" if given else f"--config: {error}"
    raise UserError(text + "".join(f"; did you mean {name!r}?" for name in near)) from error
  except OSError as error:
    raise UserError(f"--config: {str(error).splitlines()[-1].strip()}") from error
  except (flags.Error, TypeError, ValueError) as error:
    # A config file's own error arrives with its whole traceback; its last line says it.
    lines = str(error).strip().splitlines()
    text = lines[-1].partition(": ")[2] if "Traceback" in str(error) else " ".join(lines)
    raise UserError(" ".join(text.split())) from error


def _fail(error: object, code: int) -> int:
  print(f"error: {error}", file=sys.stderr, flush=True)
  return code
