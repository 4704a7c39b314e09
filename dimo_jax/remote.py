"""Where a file lies: here, in a bucket (`gs://...`), or on a hub (`hf://owner/repo/file`)."""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import uuid
from pathlib import Path, PurePosixPath

from dimo_jax.types import UserError

SETTINGS_FILE = "model.yaml"  # what taming-transformers' checkpoints have beside them

_HUB, _SEPARATOR = "hf://", "://"
_COLLAPSED = re.compile(r"^(\w{2,}:)/(?!/)")  # what pathlib makes of a scheme's two slashes
_HUB_FORM = "hf://owner/repo/file or hf://owner/repo, with @revision if it is not the main branch"


def local_path(location: str | Path) -> Path:
  """The path of a file or folder on this machine, fetched there if need be.

  Args:
    location: a path; `gs://...` or another scheme that etils.epath knows, a file or a folder with
      all that it holds, kept in `$XDG_CACHE_HOME/dimo_jax` until it changes; or
      `hf://owner/repo/file`, or `hf://owner/repo` for the folder of them all, with `@revision` if
      it is not the main branch, kept in huggingface_hub's cache. Of the latter, HF_TOKEN,
      HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are heeded. A file comes with the `model.yaml` beside
      it, where there is one.

  Raises:
    UserError: it is not there, or cannot be reached.
  """
  text = _COLLAPSED.sub(r"\1//", str(location)) if isinstance(location, Path) else location
  if text.startswith(_HUB):
    return _from_hub(text)
  return _from_bucket(text) if _SEPARATOR in text else Path(location)


def _from_hub(location: str) -> Path:
  name, _, revision = location.removeprefix(_HUB).partition("@")
  owner, _, rest = name.partition("/")
  repo, _, file = rest.partition("/")
  if not (owner and repo) or (revision == "" and "@" in location):
    raise UserError(f"{location!r} is nothing on a hub: write {_HUB_FORM}")

  import huggingface_hub  # half a second that few need
  from huggingface_hub import errors

  try:
    if not file:
      return Path(huggingface_hub.snapshot_download(f"{owner}/{repo}", revision=revision or None))
    fetch = functools.partial(
      huggingface_hub.hf_hub_download, f"{owner}/{repo}", revision=revision or None
    )
    path = Path(fetch(file))
    with contextlib.suppress(errors.EntryNotFoundError):  # nor in the cache of an offline machine
      fetch(str(PurePosixPath(file).with_name(SETTINGS_FILE)))
    return path
  except errors.GatedRepoError as error:
    reason = f"{owner}/{repo} wants its terms accepted; do that there, and set HF_TOKEN"
    raise UserError(f"{location}: {reason}") from error
  except errors.RepositoryNotFoundError as error:
    reason = f"there is no {owner}/{repo}, or it is private and HF_TOKEN is not set for it"
    raise UserError(f"{location}: {reason}") from error
  except errors.RevisionNotFoundError as error:
    raise UserError(f"{location}: {owner}/{repo} has no revision {revision!r}") from error
  except errors.LocalEntryNotFoundError as error:
    reason = "it is not in the cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
    raise UserError(f"{location}: {reason}") from error
  except errors.EntryNotFoundError as error:
    raise UserError(f"{location}: {owner}/{repo} has no file {file!r}") from error
  except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
    raise UserError(f"{location}: {_first_line(error)}") from error


def _from_bucket(location: str) -> Path:
  from etils import epath

  try:
    source = epath.Path(location)
    if not source.exists():
      raise UserError(f"{location} does not exist")
    folder = _cache() / hashlib.sha256(location.encode()).hexdigest()[:16]
    if source.is_dir():
      _mirror(source, folder)
      return folder
    _copy(source, folder / source.name)
    beside = source.parent / SETTINGS_FILE
    if beside.exists():
      _copy(beside, folder / SETTINGS_FILE)
    else:
      _remove(folder / SETTINGS_FILE)
    return folder / source.name
  except (ImportError, OSError, ValueError) as error:
    raise UserError(f"{location} cannot be read: {_first_line(error)}") from error


def _mirror(source, folder: Path) -> None:
  """Makes a folder hold what a bucket's does, and nothing else."""
  if not folder.is_dir():
    _remove(folder)
  folder.mkdir(parents=True, exist_ok=True)
  found = [path for path in source.iterdir() if path != source]  # some list the folder itself
  for path in found:
    (_mirror if path.is_dir() else _copy)(path, folder / path.name)
  for path in {*folder.iterdir()} - {folder / path.name for path in found}:
    _remove(path)


def _copy(source, target: Path) -> None:
  """Copies a file of a bucket, unless the copy is as new and as long."""
  there = source.stat()
  if target.is_file():
    here = target.stat()
    if here.st_size == there.length and here.st_mtime >= there.mtime:
      return
  else:
    _remove(target)
  target.parent.mkdir(parents=True, exist_ok=True)
  temporary = _cache() / f"{uuid.uuid4().hex}.tmp"  # no part of a folder that is mirrored
  with source.open("rb") as reader, open(temporary, "wb") as writer:
    shutil.copyfileobj(reader, writer)
  os.replace(temporary, target)


def _remove(path: Path) -> None:
  """Removes a file, or a folder with all that it holds, if it is there."""
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _cache() -> Path:
  root = os.environ.get("XDG_CACHE_HOME")
  return (Path(root) if root else Path.home() / ".cache") / "dimo_jax"


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0] if lines else repr(error)
