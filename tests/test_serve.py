"""The page to draw with: bad input, batches that change no picture, a real server, a browser."""

import base64
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import dimo_jax
from dimo_jax import artifacts
from dimo_jax.serve import __main__ as command
from dimo_jax.serve.app import MAX_BODY_BYTES, make_app
from dimo_jax.serve.models import load_models
from dimo_jax.serve.painter import Busy, Painter
from dimo_jax.serve.requests import Model, Request, parse_request
from dimo_jax.types import UserError
from tests import browser, commands, runs

JSON = {"content-type": "application/json"}
LOCAL = "http://127.0.0.1"


class Recorder(artifacts.Artifact):
  """Pictures that tell what they were drawn from; its calls wait while `gate` is closed."""

  name, kind, role, num_classes, num_steps = "recorder", "masked", "teacher", 10, 4
  image_shape, temperature = (1, 4, 1), 1.5

  def __init__(self):
    self.calls, self.compiled, self.gate, self.broken = [], 0, threading.Event(), False
    self.gate.set()

  def _compile(self, num, steps, tokens, tempered):
    assert tempered and not tokens
    self.compiled += 1

    def call(labels, seeds, indices, temperatures):
      assert self.gate.wait(30)
      if self.broken:
        raise MemoryError
      self.calls.append((num, steps))
      rows = np.stack([labels, seeds, indices, temperatures], axis=-1)
      return rows.astype(np.uint8)[:, None, :, None]

    return num, call


@pytest.fixture
def recorder():
  return Recorder()


@pytest.fixture
def painter(recorder):
  painter = Painter({"teacher": Model(recorder, (2, 4))}, max_images=16)
  assert list(painter.warm_up())[-1] == (6, 6)
  recorder.calls.clear()
  painter.start()
  yield painter
  recorder.gate.set()
  painter.close()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("serve") / "run"
  runs.make(workdir)
  return workdir


@pytest.fixture(scope="module")
def warm(workdir):
  painter = Painter(load_models(str(workdir)), max_images=8)
  list(painter.warm_up())
  painter.start()
  yield painter
  painter.close()


@pytest.fixture(scope="module")
def student(workdir):
  return dimo_jax.load(workdir)


@pytest.fixture(scope="module")
def client(warm):
  return TestClient(make_app(warm, "tiny", ("127.0.0.1",)), base_url=LOCAL)


def decode(source):
  prefix, _, data = source.partition(",")
  assert prefix == "data:image/png;base64"
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def request(labels, seed=0, steps=4, temperature=1.0):
  return Request("teacher", tuple(labels), seed, steps, temperature)


def test_what_waits_for_the_same_steps_is_drawn_in_one_call(recorder, painter):
  recorder.gate.clear()
  first = painter.submit(request([0]))
  while painter._waiting:
    time.sleep(0.001)
  asked = [
    request([1, 2], 5, temperature=2.0),
    request([3], steps=2),
    request([4] * 15),
    request([6]),
  ]
  others = [painter.submit(one) for one in asked]
  recorder.gate.set()
  drawn = [future.result(30) for future in (first, *others)]
  # 15 more did not fit beside the first two; the one that came last did.
  assert recorder.calls == [(1, 4), (4, 4), (1, 2), (16, 4)]
  assert [one.num_images for one in drawn] == [1, 3, 1, 15, 3]
  assert drawn[1].images[..., 0].tolist() == [[[1, 5, 0, 2]], [[2, 5, 1, 2]]]
  assert drawn[4].images[..., 0].tolist() == [[[6, 0, 0, 1]]]
  assert all(one.seconds >= 0 for one in drawn)
  assert recorder.compiled == 6


def test_a_painter_that_fails_goes_on(recorder, painter, capsys):
  recorder.broken = True
  client = TestClient(make_app(painter, "broken"))
  answer = client.post("/draw", json={"labels": [1]})
  assert answer.status_code == 500
  assert answer.json() == {
    "error": "the pictures could not be drawn; the server's console says why"
  }
  assert "MemoryError" in capsys.readouterr().err
  recorder.broken = False
  assert client.post("/draw", json={"labels": [1]}).status_code == 200


def test_a_painter_with_too_much_to_do_says_so(recorder, painter):
  recorder.gate.clear()
  waiting = []
  with pytest.raises(Busy, match="512 pictures are waiting"):
    for _ in range(100):
      waiting.append(painter.submit(request([0] * 16)))
      while len(waiting) == 1 and painter._waiting:
        time.sleep(0.001)
  answer = TestClient(make_app(painter, "busy")).post("/draw", json={"labels": [1]})
  assert answer.status_code == 503 and "waiting" in answer.json()["error"]
  recorder.gate.set()
  painter.close()
  assert all(len(future.result(30).images) == 16 for future in waiting)
  with pytest.raises(Busy, match="stopping"):
    painter.submit(request([0]))


def test_requests_together_give_the_pictures_of_each_alone(warm, student, workdir):
  """And these are `sample`'s; temperatures are of a request."""
  asked = [
    Request("student", (3, 1, 4), 7, 1, student.temperature),
    Request("student", (3, 1), 8, 1, 0.02),
    Request("student", (3,), 7, 1, student.temperature),
    Request("teacher", (5, 2), 7, 4, 1.0),
  ]
  alone = [warm.submit(one).result(60).images for one in asked]
  together = [future.result(60) for future in [warm.submit(one) for one in asked]]
  for one, other in zip(alone, together, strict=True):
    np.testing.assert_array_equal(one, other.images)
  np.testing.assert_array_equal(alone[0], student.sample([3, 1, 4], 7))
  np.testing.assert_array_equal(alone[2], alone[0][:1])
  cold = dimo_jax.load(workdir, fields={"sampling.temperature": 0.02}).sample([3, 1], 8)
  np.testing.assert_array_equal(alone[1], cold)
  assert (cold != student.sample([3, 1], 8)).any()


def test_pictures_come_in_their_own_size_and_as_a_grid(client, student):
  answer = client.post("/draw", json={"labels": [3, 1, 4], "seed": 7}).json()
  assert (answer["steps"], answer["images_in_call"]) == (1, 3) and answer["seconds"] > 0
  wanted = student.sample([3, 1, 4], 7)[..., 0]
  np.testing.assert_array_equal([decode(source) for source in answer["images"]], wanted)
  grid = decode(answer["grid"])
  assert grid.shape[2] == 3 and grid.shape[1] > 3 * wanted.shape[2]


BAD = {
  "labels": [
    ({}, "labels=None must be a list of class ids such as [3, 1, 4]"),
    ({"labels": []}, "labels=[] must be"),
    ({"labels": [3, 10]}, "labels hold 10; class ids lie in 0 .. 9"),
    ({"labels": [-1]}, "labels hold -1; class ids lie"),
    ({"labels": [True]}, "labels hold True; class ids lie"),
    ({"labels": ["cat"]}, "labels hold 'cat'; class ids lie"),
    ({"labels": [1.0]}, "labels hold 1.0; class ids lie"),
    ({"labels": [0] * 9}, "labels hold 9 class ids; 8 pictures are the most"),
  ],
  "seed": [
    ({"labels": [1], "seed": -1}, "seed=-1 must be a whole number in 0 .. 4294967295"),
    ({"labels": [1], "seed": 2**32}, "seed=4294967296 must be"),
    ({"labels": [1], "seed": 0.5}, "seed=0.5 must be"),
    ({"labels": [1], "seed": "x" * 9999}, "seed='xxxxxxxxxxxx...xxxxxxxxxxxxx' must be"),
  ],
  "temperature": [
    ({"labels": [1], "temperature": float("nan")}, "temperature=nan must be a number in 0.01"),
    ({"labels": [1], "temperature": float("inf")}, "temperature=inf must be a number"),
    ({"labels": [1], "temperature": 0}, "temperature=0 must be a number in 0.01 .. 100"),
    ({"labels": [1], "temperature": 10**400}, "temperature=1000"),
    ({"labels": [1], "temperature": ""}, "temperature='' must be a number"),
    ({"labels": [1], "temperature": True}, "temperature=True must be a number"),
  ],
  "steps": [
    ({"labels": [1], "steps": 4}, "steps=4 must be 1 with model='student'"),
    ({"labels": [1], "model": "teacher", "steps": 3}, "steps=3 must be 4 with model='teacher'"),
    ({"labels": [1], "model": "teacher", "steps": True}, "steps=True must be 4"),
  ],
  "others": [
    ({"labels": [1], "model": "judge"}, "model='judge' must be 'student' or 'teacher'"),
    ({"labels": [1], "model": []}, "model=[] must be"),
    ({"labels": [1], "sede": 1}, "'sede' is no field of a request; did you mean 'seed'?"),
    ([1], "the request is [1]; it must be an object with 'labels'"),
  ],
}


@pytest.mark.parametrize("field", BAD)
def test_bad_values_are_answered_in_one_line(client, field):
  for fields, line in BAD[field]:
    answer = client.post("/draw", content=json.dumps(fields), headers=JSON)
    assert answer.status_code == 400, fields
    error = answer.json()["error"]
    assert error.startswith(line) and "\n" not in error and len(error) < 150, error


@pytest.mark.parametrize(
  ("content", "headers", "status", "line"),
  [
    (b"labels=1", {"content-type": "text/plain"}, 415, "content-type='text/plain' must be"),
    (b"{}", {}, 415, "content-type='' must be 'application/json'"),
    (b" " * (MAX_BODY_BYTES + 1), JSON, 413, f"the request is over {MAX_BODY_BYTES} bytes"),
    (b"{", JSON, 400, "the request is no JSON"),
    (b"\xff\xfe", JSON, 400, "the request is no JSON"),
    (b"[" * MAX_BODY_BYTES, JSON, 400, "the request is no JSON"),
    (b'{"seed": ' + b"1" * 9000 + b"}", JSON, 400, "the request is no JSON"),
    (b"{}", JSON | {"origin": "https://elsewhere.example"}, 403, "origin 'https://elsewhere"),
    (b"{}", JSON | {"host": "elsewhere.example"}, 400, "Invalid host header"),
  ],
)
def test_bad_requests_are_answered_in_one_line(client, content, headers, status, line):
  answer = client.post("/draw", content=content, headers=headers)
  assert answer.status_code == status
  text = answer.text if "host" in headers else answer.json()["error"]
  assert text.startswith(line) and "\n" not in text


def test_the_page_is_of_one_origin(client):
  assert client.post("/draw", json={"labels": [1]}, headers={"origin": LOCAL}).status_code == 200
  for path in ("/", "/page.css", "/page.js", "/nothing", "/draw"):
    answer = client.get(path)
    assert answer.status_code == {"/nothing": 404, "/draw": 405}.get(path, 200)
    assert answer.headers["content-security-policy"].startswith("default-src 'none';")
    assert "access-control-allow-origin" not in answer.headers
    assert not re.search(r"https?://", answer.text), path


def controls(models):
  app = make_app(Painter(models, 4), "<title>")
  html = TestClient(app).get("/").text
  assert '<p class="soft">&lt;title&gt;</p>' in html
  return set(re.findall(r'<(?:input|select) id="(\w+)"', html))


def test_only_controls_that_do_something_are_shown(recorder):
  recorder.role = "generator"
  one = Model(recorder, (4,))
  assert controls({"student": one}) == {"labels", "seed", "temperature"}
  assert controls({"teacher": Model(recorder, (2, 4))}) == {
    "labels", "seed", "temperature", "steps",
  }  # fmt: skip
  recorder.temperature, recorder.num_classes = None, 0
  assert controls({"student": one}) == {"num", "seed"}
  with pytest.raises(UserError, match=r"temperature=1\.0 must be left out: model='student'"):
    parse_request({"labels": [0], "temperature": 1.0}, {"student": one}, 4)
  assert parse_request({"labels": [0]}, {"student": one}, 4).temperature is None


def test_a_workdir_has_its_teacher(workdir, tmp_path):
  models = load_models(str(workdir), default_steps=(1, 2, 8))
  assert {name: model.steps for name, model in models.items()} == {
    "student": (1,),
    "teacher": (1, 2, 4),
  }
  teacher = load_models(str(workdir / "teacher"), steps=(8,))
  assert {name: model.steps for name, model in teacher.items()} == {"teacher": (4, 8)}
  other = commands.copy_run(workdir, tmp_path / "run", "teacher")
  given = load_models(str(other), str(workdir / "teacher"))
  assert given["teacher"].artifact.role == "teacher"
  with pytest.raises(UserError, match="is a teacher already"):
    load_models(str(workdir / "teacher"), str(workdir / "teacher"))
  with pytest.raises(UserError, match="is a generator, not a teacher"):
    load_models(str(workdir), str(workdir))


def test_a_run_of_a_given_teacher_shows_it(workdir, tmp_path, capsys):
  other = commands.copy_run(workdir, tmp_path / "run", "teacher")
  record = json.loads((other / "config.json").read_text())
  record["config"]["teacher"]["path"] = str(workdir / "teacher")
  (other / "config.json").write_text(json.dumps(record))
  shown = load_models(str(other))["teacher"].artifact
  own = load_models(str(workdir))["teacher"].artifact
  assert (shown.role, shown.sampler) == ("teacher", own.sampler)
  for name in ("network", "tokenizer"):
    jax.tree.map(np.testing.assert_array_equal, shown.parts.weights[name], own.parts.weights[name])
  record["config"]["teacher"]["path"] = "gone"
  (other / "config.json").write_text(json.dumps(record))
  assert list(load_models(str(other))) == ["student"]
  assert "no teacher is shown; name it with --teacher=PATH" in capsys.readouterr().out


def test_bad_addresses_are_answered_in_one_line():
  with command._bind("127.0.0.1", 0) as bound:
    bound.listen()
    port = bound.getsockname()[1]
    with pytest.raises(UserError, match=f"--port={port} cannot be served: .*; --port=0 takes"):
      command._bind("127.0.0.1", port)
  with pytest.raises(UserError, match=r"--host='no\.such\.host\.invalid'"):
    command._bind("no.such.host.invalid", 0)
  with pytest.raises(UserError, match="--port=-1 must lie in"):
    command._bind("127.0.0.1", -1)
  assert [command._is_local(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0")] == [
    True, True, True, False,
  ]  # fmt: skip


def test_a_missing_extra_is_named(monkeypatch):
  monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(
    UserError, match=r"starlette and uvicorn must be installed .* -r requirements"
  ):
    command._check_installed()


SHOWN = """
document.querySelectorAll("#teacher .pictures img").length === 2 &&
document.querySelectorAll("#student .pictures img").length === 2 &&
!document.getElementById("draw").disabled
"""


@pytest.mark.ci
def test_a_browser_draws(workdir, tmp_path, tmp_path_factory):
  """The real command: ready when warm, drawn with at both widths, stopped by a signal."""
  with commands.shared_folder(tmp_path_factory) as shared:
    process = subprocess.Popen(
      [sys.executable, "-m", "dimo_jax.serve", f"--artifact={workdir}", "--port=0", "--steps=2"],
      cwd=commands.ROOT,
      env=commands.environment(shared) | {"PYTHONUNBUFFERED": "1"},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    try:
      lines = iter(process.stdout.readline, "")
      url = next(found for line in lines if (found := re.search(r"ready: (\S+)", line)))[1]
      if browser.EXECUTABLE is None:
        pytest.skip("chromium is not installed")
      with browser.page(tmp_path / "profile") as page:
        for width in (360, 1280):
          _draw(page, url, width)
          page.screenshot(tmp_path / f"{width}.png")
          with Image.open(tmp_path / f"{width}.png") as shot:
            assert shot.width == width
        assert not [e for e in page.events if e["method"] == "Runtime.exceptionThrown"]
        asked = [e for e in page.events if e["method"] == "Network.requestWillBeSent"]
        addresses = {e["params"]["request"]["url"] for e in asked}
        assert {a for a in addresses if not a.startswith((url, "data:"))} == set()
    finally:
      process.send_signal(signal.SIGTERM)
      _, errors = process.communicate(timeout=60)
  assert process.returncode == 0 and not errors, errors


def _draw(page, url, width):
  page.open(url, width)
  page.wait("document.readyState === 'complete' && !document.getElementById('draw').disabled")
  page.run("document.getElementById('labels').value = ''")
  page.run("document.querySelectorAll('.chip')[3].click()")
  page.run("document.querySelectorAll('.chip')[5].click()")
  page.run("document.getElementById('draw').click()")
  page.wait(SHOWN)
  assert page.run("document.getElementById('labels').value") == "3, 5"
  loaded = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
  page.wait(f"document.images.length === 4 && {loaded}")
  assert page.run("document.documentElement.scrollWidth") == width
  assert "times as long" in page.run("document.getElementById('summary').textContent")
  assert re.fullmatch(
    r"[\d.]+ m?s for 2 pictures", page.run("document.querySelector('.latency').innerText")
  )
  downloads = page.run("[...document.querySelectorAll('#student a')].map(a => a.download)")
  assert downloads == [
    "student_seed0_0_class3.png",
    "student_seed0_1_class5.png",
    "student_seed0.png",
  ]
  nameless = "[...document.querySelectorAll('input, select')].filter(c => !c.labels.length).length"
  assert page.run(nameless) == 0
  page.run("document.getElementById('labels').value = '3, cat'")
  page.run("document.getElementById('draw').click()")
  page.wait("!document.getElementById('error').hidden")
  assert page.run("document.getElementById('error').textContent").startswith("labels hold 'cat';")
  assert page.run("document.documentElement.scrollWidth") == width
