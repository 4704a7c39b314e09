"""Prepares a data set: a listing to shards, in parallel and resumable, with tfds's metadata."""

import collections
import contextlib
import fcntl
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from dimo_jax.data.listing import (
  Listing,
  classes_sha256,
  is_imagenet,
  list_source,
  paths_in_source,
)
from dimo_jax.data.prepared import MANIFEST, UNFINISHED, labels_file
from dimo_jax.data.shards import Shard, make_features, write_shard
from dimo_jax.health import RunStopped
from dimo_jax.preemption import STOP
from dimo_jax.types import UserError
from dimo_jax.writers import clock, write_atomically

__all__ = ["prepare"]

FORMAT = 1  # of a prepared folder
_MAX_IMAGES_PER_SHARD = 1024  # 0.1 GB of photographs at 256 pixels
_MIN_IMAGES_PER_SHARD, _NUM_SHARDS = 32, 16  # of a small set
REPORT = "report.json"
_SETTINGS, _LOCK = "settings.json", "lock"  # within UNFINISHED, beside a record of each shard
_NAME = "images"  # tfds wants a data set to have one, in its files' names
_SECONDS_BETWEEN_LINES = 5

Record = dict[str, Any]  # what `write_shard` returns


def prepare(
  source: str,
  out: str,
  size: int,
  *,
  num_workers: int = 0,
  labels_path: str = "",
  val_fraction: float = 0.0,
  images_per_shard: int = 0,
) -> None:
  """Writes the images of `source` to the folder `out`, or goes on where it was interrupted.

  Images are cropped and scaled as `data.images.centre_crop` says and stored without loss. What
  cannot be read is left out and named in `out`/report.json. The bytes of `out` depend neither on
  the number of workers nor on interruptions.

  Args:
    size: pixels a side.
    num_workers: processes; 0 is one for each core.
    labels_path, val_fraction: as in `list_source`.
    images_per_shard: what a kill costs a worker; 0: as it was begun, else a sixteenth of the
      images, at least 32 and at most 1024.

  Raises:
    UserError: bad arguments, an unusable source, or an `out` that holds something else.
    Preempted: a signal came; the shards that were finished are kept.
  """
  folder = Path(out)
  _check_arguments(source, out, size, num_workers, val_fraction)
  settings: dict[str, Any] = {"format": FORMAT, "size": size}
  settings |= {"images_per_shard": images_per_shard} if images_per_shard else {}
  settings |= {"val_fraction": val_fraction} if val_fraction else {}
  _check_settings(folder, out, settings)
  print(f"listing {source}", flush=True)
  listing = list_source(source, labels_path, val_fraction)
  settings |= {
    "classes_sha256": classes_sha256(listing.classes),
    "source_sha256": listing.sha256(),
  }
  num_images = sum(map(len, listing.splits.values()))
  begun = _found(folder).get("images_per_shard")
  settings["images_per_shard"] = images_per_shard or begun or _shard_size(num_images)
  _describe(source, listing)
  if _check_settings(folder, out, settings):
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    print(f"{out} is prepared already{_left_out(folder)}", flush=True)
    return
  with _begun(folder, out, settings):
    shards = _plan(folder, listing, size, settings["images_per_shard"])
    records = _write_shards(folder, shards, num_workers or _num_cores())
    _finish(folder, source, listing, settings, shards, records)
  print(f"{out} is ready: data.name='prepared', data.path={out!r}", flush=True)


def _num_cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_arguments(
  source: str, out: str, size: int, num_workers: int, val_fraction: float
) -> None:
  if not source:
    raise UserError("--source is missing; name the folder that holds train and val, or tar files")
  if not out:
    raise UserError("--out is missing; name a folder, such as --out=data/imagenet256")
  if size < 1:
    raise UserError(f"--size={size} must be positive: pixels a side, such as --size=256")
  if num_workers < 0:
    raise UserError(f"--workers={num_workers} must not be negative; 0 is one for each core")
  if not 0 <= val_fraction < 1:
    raise UserError(f"--val_fraction={val_fraction:g} must be between 0 and 1, such as 0.1")
  if Path(out).resolve().is_relative_to(Path(source).resolve()):
    raise UserError(f"--out={out!r} must not lie in --source={source!r}")


def _check_settings(folder: Path, out: str, settings: dict[str, Any]) -> bool:
  """Whether `folder` holds this preparation, finished; UserError where it holds another thing."""
  try:
    found = _found(folder)
    changed = [key for key, value in settings.items() if found and found.get(key) != value]
    if changed:
      raise UserError(
        f"--out={out!r} holds another preparation,"
        f" {', '.join(_difference(key, found.get(key), settings[key]) for key in changed)};"
        " name a new folder"
      )
    if found:
      return (folder / MANIFEST).exists()
    if folder.is_dir() and any(entry.name != UNFINISHED for entry in folder.iterdir()):
      raise UserError(f"--out={out!r} holds other files; name a new or empty folder")
  except (OSError, ValueError) as error:
    raise UserError(f"--out={out!r} cannot be used: {error}") from error
  return False


def _shard_size(num_images: int) -> int:
  """Images in each shard: enough shards to share among workers, and not too many files."""
  return min(max(-(-num_images // _NUM_SHARDS), _MIN_IMAGES_PER_SHARD), _MAX_IMAGES_PER_SHARD)


def _found(folder: Path) -> dict[str, Any]:
  """The settings of what is prepared there already, or in part; empty where nothing is."""
  for name in (MANIFEST, f"{UNFINISHED}/{_SETTINGS}"):
    if (folder / name).exists():
      return json.loads((folder / name).read_text(encoding="utf-8"))
  return {}


def _left_out(folder: Path) -> str:
  """What a finished preparation says of the files that it could not read."""
  path = folder / REPORT  # for people, who may have taken it away
  corrupt = json.loads(path.read_text(encoding="utf-8"))["corrupt"] if path.exists() else []
  if not corrupt:
    return ""
  return f", without {len(corrupt)} files that could not be read; a new --out takes mended ones in"


def _difference(key: str, found: Any, wanted: Any) -> str:
  texts = {
    "classes_sha256": "of other classes",
    "source_sha256": "of other files",
  }
  return texts.get(key, f"with {key} {found}, not {wanted}")


def _describe(source: str, listing: Listing) -> None:
  sizes = ", ".join(f"{len(entries)} {split}" for split, entries in listing.splits.items())
  print(f"{source}: {sizes} images of {len(listing.classes)} classes", flush=True)
  if is_imagenet(listing.classes):
    print("classes: ImageNet's 1000, numbered as published teachers have them", flush=True)
  elif len(listing.classes) == 1000 or all(_is_synset(name) for name in listing.classes):
    print(
      "classes: not ImageNet's 1000, so class ids are not those of teachers trained on ImageNet",
      flush=True,
    )


def _is_synset(name: str) -> bool:
  return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


@contextlib.contextmanager
def _begun(folder: Path, out: str, settings: dict[str, Any]) -> Iterator[None]:
  """Holds the lock of a folder that is being prepared."""
  unfinished = folder / UNFINISHED
  with contextlib.ExitStack() as stack:
    try:
      unfinished.mkdir(parents=True, exist_ok=True)
      stream = stack.enter_context(open(unfinished / _LOCK, "a"))
      fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
      for path in folder.glob("*.tmp"):  # of workers that were killed
        path.unlink()
      with tempfile.TemporaryFile(dir=unfinished) as probe:
        probe.write(b"0" * 2**20)  # a full disk shows before any compute is spent
      write_atomically(unfinished / _SETTINGS, json.dumps(settings, indent=2) + "\n")
    except BlockingIOError as error:
      raise UserError(f"--out={out!r}: another process is preparing it") from error
    except OSError as error:
      raise UserError(f"--out={out!r} cannot be written: {error.strerror}") from error
    yield


def _plan(folder: Path, listing: Listing, size: int, images_per_shard: int) -> dict[str, Shard]:
  """Shards by name, such as "train-00002"; names and contents follow from the listing."""
  shards = {}
  for split, entries in listing.splits.items():
    num_shards = -(-len(entries) // images_per_shard)
    for i in range(num_shards):
      path = folder / f"{_NAME}-{split}.array_record-{i:05d}-of-{num_shards:05d}"
      chosen = entries[i * images_per_shard : (i + 1) * images_per_shard]
      shards[f"{split}-{i:05d}"] = Shard(str(path), chosen, size, len(listing.classes))
  return shards


def _write_shards(folder: Path, shards: dict[str, Shard], num_workers: int) -> dict[str, Record]:
  """The record of every shard; those of an interrupted run are read, the others made."""
  records = {}
  for name, shard in shards.items():
    record = _read_record(folder / UNFINISHED / f"{name}.json", shard)
    if record is not None:
      records[name] = record
  num_files = sum(len(shard.entries) for shard in shards.values())
  num_kept = sum(len(shards[name].entries) for name in records)
  if records:
    print(f"{num_kept} of {num_files} files were done before", flush=True)
  progress = _Progress(folder, num_files, num_kept)
  left = {name: shard for name, shard in shards.items() if name not in records}

  def keep(name: str, record: Record) -> None:
    records[name] = record
    write_atomically(folder / UNFINISHED / f"{name}.json", json.dumps(record))
    progress.add(len(shards[name].entries), record)

  _run(left, min(num_workers, max(len(left), 1)), keep)
  STOP.raise_if_set()
  return records


def _read_record(path: Path, shard: Shard) -> Record | None:
  """What is known of a finished shard; None where it is not finished."""
  if not path.exists() or not os.path.exists(shard.path):
    return None
  record = json.loads(path.read_text(encoding="utf-8"))
  return record if os.path.getsize(shard.path) == record["num_bytes"] else None


def _run(shards: dict[str, Shard], num_workers: int, keep: Callable[[str, Record], None]) -> None:
  """Writes the shards; after a signal only those that are begun."""
  queue = iter(shards.items())
  if num_workers == 1:
    for name, shard in queue:
      if STOP.signal is not None:
        break
      keep(name, write_shard(shard))
    return
  running: dict[Future, str] = {}
  context = multiprocessing.get_context("spawn")  # threads of libraries do not survive a fork
  with ProcessPoolExecutor(num_workers, context, initializer=_start_worker) as pool:
    while True:
      try:
        if STOP.signal is None:
          with _interrupts_held():
            for name, shard in itertools.islice(queue, num_workers - len(running)):
              running[pool.submit(write_shard, shard)] = name
        if not running:
          return
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in sorted(finished, key=lambda future: future.exception() is not None):
          keep(running.pop(future), future.result())
      except BrokenProcessPool as error:
        STOP.raise_if_set()  # the signal was for all of them
        raise RunStopped(
          "a worker was killed, perhaps for want of memory; run the same command again, with"
          " fewer --workers"
        ) from error


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
  """Ctrl-C waits; the workers that begin meanwhile never see it: the main process answers it."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
  """A worker has no reason to go on without the main process."""
  parent = multiprocessing.parent_process()
  assert parent is not None

  def follow() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


class _Progress:
  """Console lines: files done, rate, time left, and a word once the disk looks too small."""

  def __init__(self, folder: Path, num_files: int, num_kept: int):
    self._folder, self._num_files, self._num_kept = folder, num_files, num_kept
    self._done, self._bytes, self._corrupt = num_kept, 0, 0
    self._began = self._last = time.perf_counter()
    self._warned = False

  def add(self, num_files: int, record: Record) -> None:
    self._done += num_files
    self._bytes += record["num_bytes"]
    self._corrupt += len(record["corrupt"])
    now = time.perf_counter()
    new, left = self._done - self._num_kept, self._num_files - self._done
    free = shutil.disk_usage(self._folder).free
    if self._bytes / new * left > free and not self._warned:
      self._warned = True
      print(
        f"the disk is too small: about {self._bytes / new * left / 1e6:.0f} MB more are needed,"
        f" {free / 1e6:.0f} MB are free",
        flush=True,
      )
    if left and now - self._last < _SECONDS_BETWEEN_LINES:
      return
    self._last = now
    rate = new / (now - self._began)
    print(
      f"{self._done}/{self._num_files} files  {rate:.1f} images/s  ETA {clock(left / rate)}"
      f"  {self._corrupt} corrupt",
      flush=True,
    )


def _finish(
  folder: Path,
  source: str,
  listing: Listing,
  settings: dict[str, Any],
  shards: dict[str, Shard],
  records: dict[str, Record],
) -> None:
  """Labels, tfds's metadata and the report; the manifest comes last."""
  import tensorflow_datasets as tfds

  counts = collections.Counter[str]()
  corrupt, infos, num_images = [], [], {}
  for split in listing.splits:
    parts = [records[name] for name in shards if name.startswith(f"{split}-")]
    labels = np.array([label for part in parts for label in part["labels"]], np.int32)
    if not labels.size:
      raise UserError(f"no image of {split} can be read; the first: {parts[0]['corrupt'][0]}")
    np.save(folder / labels_file(split), labels)
    num_images[split] = len(labels)
    corrupt += [name_and_reason for part in parts for name_and_reason in part["corrupt"]]
    for part in parts:
      counts.update(part["counts"])
    template = tfds.core.ShardedFileTemplate(
      dataset_name=_NAME, data_dir=str(folder), split=split, filetype_suffix="array_record"
    )
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[len(part["labels"]) for part in parts],
        num_bytes=sum(part["num_bytes"] for part in parts),
        filename_template=template,
      )
    )
  tfds.folder_dataset.write_metadata(
    data_dir=str(folder),
    features=make_features(settings["size"], listing.classes),
    split_infos=infos,
    check_data=False,
  )

  def in_source(named: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    names, divided = [name for name, _ in named], "val_fraction" in settings
    paths = paths_in_source(names, listing, source, divided=divided)
    return [{"file": paths[i], "reason": reason} for i, (_, reason) in enumerate(named)]

  report = {
    "source": source,
    "images": num_images,
    "kinds": dict(sorted(counts.items())),
    "corrupt": in_source(corrupt),
    "skipped": in_source(listing.skipped),
  }
  write_atomically(folder / REPORT, json.dumps(report, indent=2) + "\n")
  manifest = settings | {
    "num_classes": len(listing.classes),
    "is_imagenet": is_imagenet(listing.classes),
    "splits": num_images,
  }
  write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
  shutil.rmtree(folder / UNFINISHED)
  _print_report(report, folder)


def _print_report(report: dict[str, Any], folder: Path) -> None:
  print(", ".join(f"{number} {split}" for split, number in report["images"].items()), end=" images")
  print(f" ({', '.join(f'{name}: {n}' for name, n in report['kinds'].items())})", flush=True)
  for title in ("corrupt", "skipped"):
    reasons = collections.Counter(item["reason"].partition(" (")[0] for item in report[title])
    if reasons:
      print(f"{title}: {sum(reasons.values())}, all named in {folder / REPORT}", flush=True)
    for reason, number in reasons.most_common(5):
      print(f"  {number} {reason}", flush=True)
