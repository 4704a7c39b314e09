"""A page to draw with: the one-step student beside its teacher.

python -m dimo_jax.serve --artifact=DIR_OR_FILE [--teacher=DIR_OR_FILE] [--port=8000]
"""

import contextlib
import importlib.util
import ipaddress
import os
import socket
import threading
from pathlib import Path

from absl import flags

from dimo_jax import cli
from dimo_jax.preemption import STOP
from dimo_jax.types import UserError

_FLAGS = flags.FlagValues()  # its own, as those of `sample`
_ARTIFACT = flags.DEFINE_string(
  "artifact",
  None,
  "Export, workdir, teacher or checkpoint: a folder or a file.",
  flag_values=_FLAGS,
)
_TEACHER = flags.DEFINE_string(
  "teacher", "", "Teacher to show beside it; a workdir has its own.", flag_values=_FLAGS
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  "",
  "VQGAN that decodes the tokens, where an artifact holds none.",
  flag_values=_FLAGS,
)
_FAMILY = flags.DEFINE_string(
  "family", "", "Of the artifact's published weights, where the file does not say.",
  flag_values=_FLAGS,
)  # fmt: skip
_FIELD = flags.DEFINE_multi_string(
  "field", [], "Config field, as in sampling.temperature=7; may be repeated.", flag_values=_FLAGS
)
_STEPS = flags.DEFINE_string(
  "steps", "", "Of the teacher, to choose from, as in 1,4,16; its own besides.", flag_values=_FLAGS
)
_MAX_IMAGES = flags.DEFINE_integer(
  "max_images", None, "Pictures at once; 16 by default, fewer of large ones.", flag_values=_FLAGS
)
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address to serve; 0.0.0.0 is all of this machine's.", flag_values=_FLAGS
)
_PORT = flags.DEFINE_integer("port", 8000, "Port to serve; 0 takes a free one.", flag_values=_FLAGS)

_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_MAX_WAIT_S = 10  # for requests that are being answered when the server stops
_DEFAULT_MAX_IMAGES = 16
_DEFAULT_STEPS = (1, 4, 16)


def _check_installed() -> None:
  missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
  if missing:
    raise UserError(
      f"{' and '.join(missing)} must be installed for this page: pip install -r"
      " requirements-serve.txt"
    )


def _parse_steps(text: str) -> tuple[int, ...]:
  try:
    steps = tuple(int(part) for part in text.split(","))
  except ValueError as error:
    raise UserError(f"--steps={text!r} must be numbers of steps such as 1,4,16") from error
  if min(steps) < 1:
    raise UserError(f"--steps={text!r} must be 1 or more each")
  return steps


def _is_local(host: str) -> bool:
  with contextlib.suppress(ValueError):
    return ipaddress.ip_address(host).is_loopback
  return host == "localhost"


def _bind(host: str, port: int) -> socket.socket:
  """A socket that nobody can connect to before the server listens.

  Raises:
    UserError: no such address, or a port that is taken.
  """
  if not 0 <= port < 2**16:
    raise UserError(f"--port={port} must lie in 0 .. {2**16 - 1}; 0 takes a free one")
  with contextlib.ExitStack() as stack:
    try:
      family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
      bound = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
      if os.name == "posix":
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      bound.bind(address)
    except OSError as error:
      reason = f"{error.strerror}; --port=0 takes a free one"
      raise UserError(f"--host={host!r} --port={port} cannot be served: {reason}") from error
    stack.pop_all()
  return bound


def _dispatch() -> None:
  if not _ARTIFACT.value:
    raise UserError("--artifact is missing; name an export, a workdir or a checkpoint")
  if _MAX_IMAGES.value is not None and not 1 <= _MAX_IMAGES.value <= 256:
    raise UserError(f"--max_images={_MAX_IMAGES.value} must lie in 1 .. 256")
  steps = _parse_steps(_STEPS.value) if _STEPS.value else None
  _check_installed()
  with contextlib.closing(_bind(_HOST.value, _PORT.value)) as bound:
    _serve(_ARTIFACT.value, steps, bound)


def _serve(artifact: str, steps: tuple[int, ...] | None, bound: socket.socket) -> None:
  import uvicorn

  from dimo_jax.recipe import parse_field
  from dimo_jax.serve.app import make_app
  from dimo_jax.serve.models import load_models
  from dimo_jax.serve.painter import Painter
  from dimo_jax.writers import say

  models = load_models(
    artifact,
    _TEACHER.value,
    tokenizer=_TOKENIZER.value,
    family=_FAMILY.value,
    fields=dict(map(parse_field, _FIELD.value)),
    steps=steps,
    default_steps=_DEFAULT_STEPS,
  )
  fitting = min(model.artifact.default_batch_size for model in models.values())
  painter = Painter(models, _MAX_IMAGES.value or min(_DEFAULT_MAX_IMAGES, fitting))
  for name, model in models.items():
    say(f"{name}: {model.artifact.name}, steps {', '.join(map(str, model.steps))}")
  say("compiling ...")
  for done, total in painter.warm_up():
    if STOP.is_set():
      return
    say(f"compiled {done} of {total}")
  painter.start()
  host, port = bound.getsockname()[:2]
  local = _is_local(_HOST.value)
  if not local:
    say(
      f"warning: --host={_HOST.value} is open to everyone who reaches this machine; nobody is asked"
      " for a password"
    )
  title = Path(artifact).name or artifact
  app = make_app(painter, title, (*_LOCAL, _HOST.value) if local else ("*",))
  server = uvicorn.Server(
    uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=_MAX_WAIT_S)
  )
  # Not in this thread, where uvicorn would take over the signals.
  thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
  thread.start()
  while not server.started and thread.is_alive():
    thread.join(0.05)
  if not server.started:
    raise UserError(f"--port={port} cannot be served: another program listens there by now")
  shown = f"[{host}]" if ":" in host else host
  say(f"ready: http://{shown}:{port}/ (Ctrl-C stops it)")
  while thread.is_alive() and not STOP.is_set():
    thread.join(0.2)
  died = not thread.is_alive()
  server.should_exit = True
  thread.join()
  painter.close()
  if died:
    raise RuntimeError("the server ended by itself")
  say("stopped")


def main() -> None:
  """Runs the command line."""
  cli.run(_dispatch, _FLAGS, needs_config=False)


if __name__ == "__main__":
  main()
