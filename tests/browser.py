"""Headless Chromium, told what to do by its DevTools protocol over two pipes."""

import base64
import contextlib
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

EXECUTABLE = shutil.which("chromium")
_TIMEOUT_S = 60
# The browser reads descriptor 3 and writes 4.
_LAUNCHER = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
  """One tab."""

  def __init__(self, reader: int, writer: int):
    self._reader, self._writer = reader, writer
    self._buffer, self._id, self._session = b"", 0, None
    self.events: list[dict[str, Any]] = []
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]
    for domain in ("Page", "Runtime", "Network", "Log"):
      self.call(f"{domain}.enable")

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    """A command's result; events that come meanwhile are kept."""
    self._id += 1
    message = {"id": self._id, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._writer, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._receive()
      if answer.get("id") == self._id:
        assert "error" not in answer, answer
        return answer["result"]
      self.events.append(answer)

  def _receive(self) -> dict[str, Any]:
    while b"\0" not in self._buffer:
      ready, _, _ = select.select([self._reader], [], [], _TIMEOUT_S)
      assert ready, "the browser does not answer"
      chunk = os.read(self._reader, 2**16)
      assert chunk, "the browser has gone"
      self._buffer += chunk
    text, _, self._buffer = self._buffer.partition(b"\0")
    return json.loads(text)

  def open(self, url: str, width: int, height: int = 800, *, dark: bool = False) -> None:
    """Loads an address in a window of that size."""
    mobile = width < 600
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    self.call("Emulation.setDeviceMetricsOverride", **size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    self.call("Emulation.setEmulatedMedia", features=[scheme])
    self.call("Page.navigate", url=url)

  def run(self, expression: str) -> Any:
    """The value of a JavaScript expression."""
    found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
    assert "exceptionDetails" not in found, found
    return found["result"].get("value")

  def wait(self, expression: str, timeout_s: float = 30) -> None:
    """Waits until an expression is true."""
    end = time.monotonic() + timeout_s
    while not self.run(expression):
      assert time.monotonic() < end, expression
      time.sleep(0.05)

  def screenshot(self, path: pathlib.Path) -> None:
    """Writes the whole page as a PNG."""
    shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
    path.write_bytes(base64.b64decode(shot["data"]))


def _pipe_ends() -> list[int]:
  """Both ends of two pipes, none of them 3 or 4, which the browser is to have."""
  ends = [*os.pipe(), *os.pipe()]
  moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
  for end in ends:
    os.close(end)
  return moved


@contextlib.contextmanager
def page(profile: pathlib.Path) -> Iterator[Page]:
  """A tab of a browser of its own."""
  commands_out, commands_in, answers_out, answers_in = _pipe_ends()
  arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
  arguments += ["--no-first-run", f"--user-data-dir={profile}"]
  ends = [str(commands_out), str(answers_in)]
  process = subprocess.Popen(
    [sys.executable, "-c", _LAUNCHER, *ends, EXECUTABLE, *arguments],
    pass_fds=(commands_out, answers_in),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  os.close(commands_out)
  os.close(answers_in)
  try:
    yield Page(answers_out, commands_in)
  finally:
    os.close(commands_in)  # the browser ends with its pipe
    process.terminate()
    process.wait(timeout=30)
    os.close(answers_out)
