"""What every command shares: --config and --import, one line for a mistake, exit codes."""

import argparse
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from dimo_jax.allocator import keep_freed_memory
from dimo_jax.preemption import RESUME_EXIT_CODE, STOP, Preempted
from dimo_jax.types import UserError, suggest

BAD_INPUT, STOPPED = 2, 3  # exit codes, beside preemption.RESUME_EXIT_CODE

IMPORTED: list[str] = []  # the files of --import, as they were given
IMPORT_HELP = "--import: Python file of rows of your own, imported first; may be repeated."
_CONFIG_HELP = "Config file, such as configs/digits.py; --config.a.b=1 sets a field of it."
_TYPES = {  # by what Python and absl say of a value that is none
  "could not convert string to float": "a number",
  "invalid literal for int()": "a whole number",
  "Non-boolean argument": "True or False",
}
CONFIG = config_flags.DEFINE_config_file("config", None, _CONFIG_HELP)


def run(
  dispatch: Callable[[], None],
  flag_values: flags.FlagValues = flags.FLAGS,
  *,
  needs_config: bool = True,
) -> None:
  """Parses the flags and runs a command; see `guarded`.

  Args:
    flag_values: a command's own flags, where they are not absl's global ones, and `config` one of
      them or not.
    needs_config: whether --config must be given.
  """
  guarded(
    lambda: app.run(
      lambda argv: _checked(argv, dispatch, needs_config),
      flags_parser=lambda argv: _parse_flags(argv, flag_values),
    )
  )


def guarded(command: Callable[[], None]) -> None:
  """Runs a command; every way to fail has its line and its exit code.

  It looks at `STOP` and saves what it needs to go on, or calls `STOP.at_once`.
  """
  STOP.install()  # before the imports that are still to come: Ctrl-C would break into them
  keep_freed_memory()
  from dimo_jax.health import RunStopped, disk_is_full

  try:
    _import_files()
    command()
  except (UserError, RunStopped) as error:
    sys.exit(_fail(error, BAD_INPUT if isinstance(error, UserError) else STOPPED))
  except Preempted as error:
    from dimo_jax.writers import say

    say(str(error))
    sys.exit(RESUME_EXIT_CODE)
  except Exception as error:
    if disk_is_full(error):
      _fail("the disk is full; free some space and run the same command again", 1)
    elif not has_peers():
      raise
    else:
      traceback.print_exc()
      text = (
        "if another process of the run is gone: what was saved is kept, run the same command again"
      )
      print(text, file=sys.stderr, flush=True)
    # A plain exit would let TensorBoard's writer try again, and say so at length; and it would wait
    # for the other processes, which wait for this one.
    os._exit(1)


def _import_files() -> None:
  """Takes every --import=FILE.py off the command line and imports the file, as a config would be:
  what it registers is known from then on.
  """
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
  parser.add_argument("--import", action="append", default=[], dest="files")
  try:
    known, sys.argv[1:] = parser.parse_known_args(sys.argv[1:])
  except argparse.ArgumentError as error:
    raise UserError(f"--import: {error.message}; it takes a Python file") from error
  for file in known.files:
    IMPORTED.append(file)
    path = Path(file)
    if path.suffix != ".py" or not path.stem.isidentifier():
      raise UserError(f"--import={file} must be a Python file that registers what is your own")
    if not path.is_file():
      raise UserError(f"--import={file} does not exist")
    folder = str(path.parent.resolve())
    if folder not in sys.path:
      sys.path.append(folder)  # for what it imports itself; after ours, such as configs
    found = importlib.util.find_spec(path.stem)
    if found is None or found.origin is None or Path(found.origin).resolve() != path.resolve():
      raise UserError(f"--import={file}: there is another module {path.stem!r}; rename the file")
    importlib.import_module(path.stem)


def has_peers() -> bool:
  """Whether this process is one of several of a run."""
  import jax

  return jax.distributed.is_initialized()


def _checked(argv: list[str], dispatch: Callable[[], None], needs_config: bool) -> None:
  if len(argv) > 1:
    raise UserError(f"{argv[1]!r} is not a flag; flags begin with --")
  if needs_config and CONFIG.value is None:
    raise UserError("--config is missing; name a config, such as --config=configs/digits.py")
  logging.set_verbosity(logging.FATAL)  # orbax logs every step, and errors before it raises them
  dispatch()


def _parse_flags(argv: list[str], flag_values: flags.FlagValues) -> list[str]:
  own = flag_values is not flags.FLAGS
  if {"--help", "-h"} & set(argv):
    shared = "" if own else f"\n  --config: {_CONFIG_HELP}"
    shared += f"\n  {IMPORT_HELP}"
    flags_help = flag_values.get_help() if own else flag_values.main_module_help()
    print(f"{sys.modules['__main__'].__doc__}\n{flags_help}\n\n{__name__}:{shared}")
    sys.exit(0)
  if own:
    flags.FLAGS.mark_as_parsed()  # absl reads its own
  try:
    rest = flag_values(argv)
    if "config" in flag_values:  # a file that is missing shows at the first use
      _ = flag_values["config"].value and flag_values["config"].value.is_locked
    return rest
  except (AttributeError, KeyError) as error:  # its text may name the nearest field
    words = set(re.findall(r"\w+", str(error)))
    given = [arg for arg in argv[1:] if words & set(re.split("[.=]", arg)[1:])]
    near = re.findall(r'Did you mean "(\w+)"', str(error)) if given else []
    text = f"{given[-1]}: no such field" if given else f"--config: {error}"
    raise UserError(text + "".join(f"; did you mean {name!r}?" for name in near)) from error
  except OSError as error:
    text = str(error).splitlines()[-1].strip()
    missing = re.search(r"No such file or directory: '(.+)'", text)
    if missing:
      path = Path(missing[1])
      names = [p.name for p in path.parent.glob("[!_]*.py")]
      text = f"{path} does not exist" + (suggest(path.name, names) if names else "")
    raise UserError(f"--config: {text}") from error
  except (flags.Error, TypeError, ValueError) as error:
    # A config file's own error arrives with its whole traceback; its last line says it.
    lines = str(error).strip().splitlines()
    text = lines[-1].partition(": ")[2] if "Traceback" in str(error) else " ".join(lines)
    if "get_config() takes 0 positional arguments" in text:
      text = "--config: this file has no variants; leave out the colon and what follows it"
    raise UserError(_of_type(" ".join(text.split()))) from error


def _of_type(text: str) -> str:
  """A library's words for a flag's value of the wrong type in the words of our other errors."""
  flag, separator, reason = text.removeprefix("flag ").partition(": ")
  for words, kind in _TYPES.items():
    if separator and words in reason:
      return f"{flag} must be {kind}"
  return text


def _fail(error: object, code: int) -> int:
  print(f"error: {error}", file=sys.stderr, flush=True)
  return code
