"""Where a file lies: here, in a bucket (`gs://...`), or on a hub (`hf://owner/repo/file`)."""

import hashlib
import os
import re
import shutil
from pathlib import Path

from dimo_jax.types import UserError

_HUB, _SEPARATOR = "hf://", "://"
_COLLAPSED = re.compile(r"^(\w{2,}:)/(?!/)")  # what pathlib makes of a scheme's two slashes
_HUB_FORM = "hf://owner/repo/file or hf://owner/repo, with @revision if it is not the main branch"


def local_path(location: str | Path) -> Path:
  """The path of a file or folder on this machine, fetched there if need be.

  Args:
    location: a path; `gs://...` or another scheme that etils.epath knows, a file or a folder of
      files, kept in `$XDG_CACHE_HOME/dimo_jax` until it changes; or `hf://owner/repo/file`, or
      `hf://owner/repo` for the folder of them all, with `@revision` if it is not the main branch,
      kept in huggingface_hub's cache. Of the latter,
      HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are heeded.

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
    return Path(huggingface_hub.hf_hub_download(f"{owner}/{repo}", file, revision=revision or None))
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
    if not source.is_dir():
      return _copy(source, folder)
    for file in source.iterdir():
      if not file.is_dir():
        _copy(file, folder)
    return folder
  except (ImportError, OSError, ValueError) as error:
    raise UserError(f"{location} cannot be read: {_first_line(error)}") from error


def _copy(source, folder: Path) -> Path:
  """Copies a file of a bucket, unless the copy is as new and as long."""
  folder.mkdir(parents=True, exist_ok=True)
  target, there = folder / source.name, source.stat()
  if target.exists():
    here = target.stat()
    if here.st_size == there.length and here.st_mtime >= there.mtime:
      return target
  temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
  with source.open("rb") as reader, open(temporary, "wb") as writer:
    shutil.copyfileobj(reader, writer)
  os.replace(temporary, target)
  return target


def _cache() -> Path:
  root = os.environ.get("XDG_CACHE_HOME")
  return (Path(root) if root else Path.home() / ".cache") / "dimo_jax"


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0] if lines else repr(error)
