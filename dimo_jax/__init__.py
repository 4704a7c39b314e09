"""One-step generators by distribution-matching distillation, in JAX and Flax."""

import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dimo_jax.artifacts import Artifact, load

__all__ = ["Artifact", "load"]

# While `python -m dimo_jax.COMMAND` is found and imported, JAX with it, Ctrl-C ends it without a
# traceback; then the command sees to signals itself. Python's own words come before the program's.
_COMMAND = sys.orig_argv[-len(sys.argv)] if sys.argv[:1] == ["-m"] else ""
_IS_COMMAND = _COMMAND.removeprefix("-m").startswith(f"{__name__}.")
if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, signal.SIG_DFL)


def __getattr__(name: str) -> Any:
  """`load` and `Artifact`, imported when they are first asked for."""
  if name in __all__:
    from dimo_jax import artifacts

    return getattr(artifacts, name)
  raise AttributeError(f"module 'dimo_jax' has no attribute {name!r}")
