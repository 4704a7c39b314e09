"""Files on a hub, here a fake one on this machine, and in buckets."""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest
from etils import epath

from dimo_jax import remote
from dimo_jax.types import UserError
from tests.commands import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = """
import sys
from dimo_jax.remote import local_path
from dimo_jax.types import UserError
try:
  print(local_path(sys.argv[1]))
except UserError as error:
  print("UserError", error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
  """What huggingface_hub asks for: public files, one gated and one private repository."""

  def __init__(self, files, requests, *arguments):
    self.files, self.requests = files, requests
    super().__init__(*arguments)

  def do_HEAD(self):
    self.answer(body=False)

  def do_GET(self):
    self.answer(body=True)

  def answer(self, *, body):
    token = self.headers.get("Authorization", "")
    self.requests.append((self.command, self.path, token))
    owner_repo, _, rest = self.path.lstrip("/").partition("/resolve/")
    revision, _, file = rest.partition("/")
    known = {repo for repo, _ in self.files}
    if owner_repo == "owner/gated" and token != "Bearer hf_secret":
      return self.refuse(403, "GatedRepo")
    if owner_repo not in known or (owner_repo == "owner/private" and token != "Bearer hf_secret"):
      return self.refuse(401, "RepoNotFound")
    if revision not in ("main", "v2", COMMIT):
      return self.refuse(404, "RevisionNotFound")
    data = self.files.get((owner_repo, file))
    if data is None:
      return self.refuse(404, "EntryNotFound")
    data += revision.encode() if revision == "v2" else b""
    self.send_response(200)
    self.send_header("X-Repo-Commit", COMMIT if revision != "v2" else COMMIT[::-1])
    self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    if body:
      self.wfile.write(data)

  def refuse(self, code, name):
    self.send_response(code)
    self.send_header("X-Error-Code", name)
    self.send_header("X-Error-Message", name)
    self.send_header("Content-Length", "0")
    self.end_headers()

  def log_message(self, *arguments):
    pass


@contextlib.contextmanager
def serving():
  """(endpoint, requests seen) of a hub with a few files."""
  files = {
    ("owner/repo", "weights.bin"): b"weights",
    ("owner/repo", "sub/folder/weights.bin"): b"deeper",
    ("owner/gated", "weights.bin"): b"gated",
    ("owner/private", "weights.bin"): b"private",
    ("owner/vqgan", "ckpts/last.ckpt"): b"vqgan",
    ("owner/vqgan", "ckpts/model.yaml"): b"settings",
  }
  requests = []
  handler = functools.partial(Hub, files, requests)
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}", requests
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


def downloads(requests):
  return sum(command == "GET" and "/resolve/" in path for command, path, _ in requests)


@pytest.fixture
def fetch(tmp_path):
  """fetch(location, **environment) -> what a fresh process prints, its cache kept in between."""

  def run(location, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    hub = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
      [sys.executable, "-c", FETCH, location],
      env=clean | hub | environment,
      capture_output=True,
      text=True,
      check=True,
    )
    return result.stdout.splitlines()[-1]

  return run


def test_files_of_a_hub_are_fetched_once_and_kept(fetch):
  with serving() as (endpoint, requests):
    path = pathlib.Path(fetch("hf://owner/repo/weights.bin", HF_ENDPOINT=endpoint))
    assert path.read_bytes() == b"weights"
    deep = fetch("hf://owner/repo/sub/folder/weights.bin@main", HF_ENDPOINT=endpoint)
    assert pathlib.Path(deep).read_bytes() == b"deeper"
    other = fetch("hf://owner/repo/weights.bin@v2", HF_ENDPOINT=endpoint)
    assert pathlib.Path(other).read_bytes() == b"weightsv2"
    assert downloads(requests) == 3
    assert fetch("hf://owner/repo/weights.bin", HF_ENDPOINT=endpoint) == str(path)
    assert downloads(requests) == 3


def test_the_settings_beside_a_file_of_a_hub_come_with_it(fetch):
  with serving() as (endpoint, _):
    path = pathlib.Path(fetch("hf://owner/vqgan/ckpts/last.ckpt", HF_ENDPOINT=endpoint))
    assert path.read_bytes() == b"vqgan"
    assert (path.parent / "model.yaml").read_bytes() == b"settings"
    offline = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "1"}
    assert fetch("hf://owner/vqgan/ckpts/last.ckpt", **offline) == str(path)


def test_tokens_and_offline_mode_are_heeded(fetch):
  with serving() as (endpoint, requests):
    path = fetch("hf://owner/repo/weights.bin", HF_ENDPOINT=endpoint)
    private = fetch("hf://owner/private/weights.bin", HF_ENDPOINT=endpoint, HF_TOKEN="hf_secret")
    assert pathlib.Path(private).read_bytes() == b"private"
    count = len(requests)
    offline = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "1"}
    assert fetch("hf://owner/repo/weights.bin", **offline) == path
    assert "not in the cache" in fetch("hf://owner/gated/weights.bin", **offline)
    assert len(requests) == count


@pytest.mark.slow  # the hub's client tries again and again
def test_a_hub_that_is_away_is_one_line(fetch):
  with serving() as (endpoint, _):
    pass
  assert "the hub cannot be reached" in fetch("hf://owner/repo/other.bin", HF_ENDPOINT=endpoint)


@pytest.mark.parametrize(
  ("location", "needle"),
  [
    ("hf://owner/none/weights.bin", "there is no owner/none, or it is private and HF_TOKEN"),
    ("hf://owner/private/weights.bin", "there is no owner/private, or it is private and HF_TOKEN"),
    ("hf://owner/gated/weights.bin", "owner/gated wants its terms accepted"),
    ("hf://owner/repo/none.bin", "owner/repo has no file 'none.bin'"),
    ("hf://owner/repo/weights.bin@v9", "owner/repo has no revision 'v9'"),
    ("hf://ow ner/repo/weights.bin", "ow ner/repo"),
  ],
)
def test_what_a_hub_refuses_is_one_line(fetch, location, needle):
  with serving() as (endpoint, _):
    line = fetch(location, HF_ENDPOINT=endpoint)
  assert line.startswith("UserError") and location in line and needle in line


@pytest.mark.parametrize(
  "location", ["hf://", "hf://owner", "hf://owner/", "hf:///repo", "hf://o/r/f@"]
)
def test_what_lies_on_a_hub_has_an_owner_and_a_repository(location):
  with pytest.raises(UserError, match="hf://owner/repo/file"):
    remote.local_path(location)


def test_local_paths_stay_as_they_are(tmp_path):
  assert remote.local_path(str(tmp_path)) == tmp_path
  assert remote.local_path(tmp_path) == tmp_path
  assert remote.local_path("weights@2.bin") == pathlib.Path("weights@2.bin")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """A folder that `gs://bucket` stands for, and a cache of its own."""
  folder, real = tmp_path / "bucket", epath.Path
  folder.mkdir()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(epath, "Path", lambda text: real(text.replace("gs://bucket", str(folder))))
  return folder


def test_files_of_a_bucket_are_kept_until_they_change(bucket):
  (bucket / "teacher").mkdir()
  weights = bucket / "teacher" / "weights.bin"
  weights.write_bytes(b"first")
  path = remote.local_path("gs://bucket/teacher/weights.bin")
  assert path.read_bytes() == b"first" and bucket not in path.parents
  stamp = path.stat().st_mtime_ns
  assert remote.local_path("gs://bucket/teacher/weights.bin").stat().st_mtime_ns == stamp
  weights.write_bytes(b"second")
  assert remote.local_path("gs://bucket/teacher/weights.bin").read_bytes() == b"second"
  (bucket / "teacher" / "config.json").write_text(json.dumps({}))
  folder = remote.local_path("gs://bucket/teacher")
  assert sorted(file.name for file in folder.iterdir()) == ["config.json", "weights.bin"]
  assert (folder / "weights.bin").read_bytes() == b"second"


def contents(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_folders_of_a_bucket_are_mirrored_whole(bucket):
  run = bucket / "run"
  for name in ("config.json", "teacher/teacher.safetensors", "distill/checkpoints/20/_METADATA"):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(name)
  folder = remote.local_path("gs://bucket/run")
  assert contents(folder) == contents(run) and len(contents(folder)) == 3
  kept = (folder / "config.json").stat().st_ino
  shutil.rmtree(run / "distill" / "checkpoints" / "20")
  (run / "distill" / "checkpoints" / "40").write_text("now a file")
  (run / "teacher" / "teacher.safetensors").unlink()
  (run / "teacher").rmdir()
  (run / "teacher").write_text("now a file")
  assert remote.local_path("gs://bucket/run") == folder
  assert contents(folder) == contents(run) and len(contents(folder)) == 3
  assert not (folder / "distill" / "checkpoints" / "20").exists()
  assert (folder / "config.json").stat().st_ino == kept
  (run / "teacher").unlink()
  (run / "teacher").mkdir()
  (run / "teacher" / "x").write_text("a folder again")
  assert contents(remote.local_path("gs://bucket/run")) == contents(run)


def test_a_bucket_may_list_the_folder_itself(bucket, monkeypatch):
  (bucket / "run").mkdir()
  (bucket / "run" / "x").write_text("x")
  kind = type(epath.Path("gs://bucket/run"))
  listed = kind.iterdir
  monkeypatch.setattr(kind, "iterdir", lambda folder: [folder, *listed(folder)])
  assert contents(remote.local_path("gs://bucket/run")) == {"x": b"x"}


def test_the_settings_beside_a_file_of_a_bucket_come_and_go_with_it(bucket):
  (bucket / "last.ckpt").write_bytes(b"vqgan")
  path = remote.local_path("gs://bucket/last.ckpt")
  assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
  (bucket / "model.yaml").write_text("settings")
  (bucket / "other.bin").write_text("stays")
  assert remote.local_path("gs://bucket/last.ckpt") == path
  assert contents(path.parent) == {"last.ckpt": b"vqgan", "model.yaml": b"settings"}
  assert remote.local_path("gs://bucket/model.yaml").read_text() == "settings"
  (bucket / "model.yaml").unlink()
  assert [file.name for file in remote.local_path("gs://bucket/last.ckpt").parent.iterdir()] == [
    "last.ckpt"
  ]


def test_a_path_that_lost_a_slash_is_still_elsewhere(bucket, tmp_path, monkeypatch):
  (bucket / "weights.bin").write_bytes(b"x")
  path = remote.local_path(pathlib.Path("gs://bucket/weights.bin"))
  assert path.read_bytes() == b"x" and bucket not in path.parents
  with pytest.raises(UserError, match=r"'hf://owner' is nothing on a hub"):
    remote.local_path(pathlib.Path("hf://owner"))
  assert remote.local_path(tmp_path / "a") == tmp_path / "a"


def test_what_a_bucket_lacks_is_one_line(bucket):
  with pytest.raises(UserError, match=r"gs://bucket/none does not exist"):
    remote.local_path("gs://bucket/none")


def test_a_bucket_without_its_package_says_which(monkeypatch):
  def missing(text):
    raise ImportError("Please install gcsfs to access Google Storage")

  monkeypatch.setattr(epath, "Path", missing)
  with pytest.raises(UserError, match=r"gs://b/x cannot be read: Please install gcsfs"):
    remote.local_path("gs://b/x")
