"""Work that keeps nothing ends at a signal at once; the rest is in test_resume.py and others."""

import os
import signal
import subprocess
import sys

import pytest

from dimo_jax import benchmark, export, main, sample
from dimo_jax.convert import __main__ as convert
from dimo_jax.preemption import STOP
from tests.commands import ROOT

STOPPED = "stopped; nothing unfinished was kept"


@pytest.mark.parametrize(
  ("lines", "code", "says"),
  [
    (
      "STOP.at_once(); raise_signal(SIGTERM)",
      143,
      [f"SIGTERM: {STOPPED}"],
    ),
    ("STOP.at_once(); raise_signal(SIGINT)", 130, [f"SIGINT: {STOPPED}"]),
    (
      "raise_signal(SIGTERM); STOP.at_once()",
      143,
      [
        "SIGTERM: stopping at the next safe point; Ctrl-C stops at once",
        f"SIGTERM: {STOPPED}",
      ],
    ),
  ],
)
def test_a_signal_ends_the_process(lines, code, says):
  program = f"""
from signal import SIGINT, SIGTERM, raise_signal
from dimo_jax.preemption import STOP
STOP.install()
{lines}
print("it went on")
"""
  command = [sys.executable, "-c", program]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  assert (result.returncode, result.stdout.splitlines(), result.stderr) == (code, says, "")


def test_what_is_unfinished_is_taken_away(tmp_path):
  for name in ("unfinished", "finished"):
    (tmp_path / name / "inner").mkdir(parents=True)
  program = f"""
from pathlib import Path
from signal import SIGTERM, raise_signal
from dimo_jax.preemption import STOP
STOP.at_once()
with STOP.unfinished(Path({str(tmp_path / "finished")!r})):
  pass
with STOP.unfinished(Path({str(tmp_path / "unfinished")!r})):
  raise_signal(SIGTERM)
"""
  assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 143
  assert [path.name for path in tmp_path.iterdir()] == ["finished"]


@pytest.mark.parametrize(
  "command",
  [benchmark.dispatch, export._dispatch, main._plan, sample._dispatch, convert._run],
  ids=["benchmark", "export", "plan", "sample", "convert"],
)
def test_commands_that_keep_nothing(command, monkeypatch):
  class Asked(Exception):
    pass

  def at_once():
    raise Asked

  monkeypatch.setattr(STOP, "at_once", at_once)
  with pytest.raises(Asked):
    command()


@pytest.fixture
def hears_interrupts():
  """Children hear them, too, of tests that run in the background, where they are ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_interrupts")
@pytest.mark.parametrize("command", ["benchmark", "convert", "evaluate", "export", "sample"])
def test_an_early_interrupt_ends_the_imports(command):
  program = [sys.executable, "-X", "importtime", "-m", f"dimo_jax.{command}"]
  with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
    assert any(line.endswith(" numpy\n") for line in process.stderr)  # JAX's come later
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
  assert process.returncode == -signal.SIGINT
  assert "Traceback" not in rest and "KeyboardInterrupt" not in rest


@pytest.mark.usefixtures("hears_interrupts")
@pytest.mark.parametrize(
  "words",
  [
    ["-c", "import other"],
    ["-m", "other.tool"],
    ["-m", "other.tool", "-m", "dimo_jax.main"],
  ],
  ids=["program", "module", "launcher"],
)
def test_a_program_that_imports_this_package_keeps_its_interrupts(words, tmp_path):
  lines = "import dimo_jax, signal\nprint(signal.getsignal(signal.SIGINT).__name__)\n"
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "__init__.py").write_text(lines)
  (tmp_path / "other" / "tool.py").write_text("")
  environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
  command = [sys.executable, *words]
  result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
  assert result.stdout == "default_int_handler\n"
