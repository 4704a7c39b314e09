"""Follows a training from another process: each new checkpoint is evaluated once."""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dimo_jax.checkpoint import RECORD_FILE, finished_steps
from dimo_jax.convert import files
from dimo_jax.evaluation import scoring
from dimo_jax.evaluation.compare import distance_of
from dimo_jax.generators import load_generator
from dimo_jax.judges import AnyJudge, check_own_protocol
from dimo_jax.preemption import STOP
from dimo_jax.prepare import CLASSIFIER_FILE
from dimo_jax.recipe import CONFIG_FILE, LOCK_FILE, Recipe
from dimo_jax.types import UserError
from dimo_jax.writers import say, write_atomically

__all__ = ["BEST_FILE", "check_followed", "wait_for_classifier", "watch"]

BEST_FILE = "best.json"  # the only file that a watch writes in a training's folder


def watch(
  judge: AnyJudge,
  workdir: Path,
  out: Path,
  *,
  every_seconds: float,
  until: int | None = None,
  tokenizer: str = "",
  fields: Mapping[str, Any] | None = None,
) -> None:
  """Evaluates every new checkpoint of a training once, and keeps a copy of the best.

  A checkpoint is copied first, to the folder `out`.checkpoints, and evaluated there: the training
  may delete its own meanwhile. The rows in `out` say what was done, so the same call goes on after
  a kill; those of an earlier training in the folder, by other fields, do not count. A checkpoint
  that cannot be read or evaluated is said and passed over. In `workdir` only `best.json` is
  written.

  Args:
    every_seconds: between two looks.
    until: returns once this step, or a later one, is evaluated; 0: never; None: the training's
      last.
    tokenizer: a decoder of tokens, where the training has none.
    fields: other values of config fields, by dotted name.

  Raises:
    UserError: no such fields, no training there, or one that is not for the judge's protocol.
    Preempted: a signal came.
  """
  fields = dict(fields or {})
  check_followed(workdir, fields)
  workdir = workdir.resolve()  # the rows name it
  asked = {"checkpoint": str(workdir), "fields": fields, "tokenizer": tokenizer or None}
  copies = out.with_name(f"{out.name}.checkpoints")
  skipped: set[int] = set()
  waiting: set[int] | None = None
  training: str | None = None
  while True:
    if training != (training := _record_hash(workdir)):
      skipped.clear()
    watched = {**asked, "record_sha256": training}
    rows = _rows_of(out, {**judge.identity, **watched})
    done = {row["step"] for row in rows}
    for step in sorted(finished_steps(workdir / "distill") - done - skipped):
      copy = copies / str(step)
      if not _copy_checkpoint(workdir, step, copy):
        continue
      if _record_hash(copy) != training:
        break
      generator = None
      try:
        generator = load_generator(str(copy), tokenizer=tokenizer, fields=fields)
        rows.append(judge.evaluate(generator, out, {**generator.source, **watched}))
      except UserError as error:
        if generator is not None:
          judge.fitted_to(generator)  # raises where no checkpoint will ever do
        say(f"watch: checkpoint {step} is skipped: {error}")
        skipped.add(step)
        continue
      _keep_best(workdir, copies, rows)
    if _record_hash(workdir) != training:
      continue  # another training has begun meanwhile
    if rows:
      _keep_best(workdir, copies, rows)
    seen = skipped.union(row["step"] for row in rows)
    end = until
    if end is None and (workdir / CONFIG_FILE).exists():
      last = Recipe.load(workdir).config.train.num_steps
      # Rows may be of a run before this one.
      end = last if last in finished_steps(workdir / "distill") else 0
    if end and any(step >= end for step in seen):
      if rows:
        best = min(rows, key=distance_of)["step"]
        said = f"the best of {len(rows)} is step {best}, kept in {copies / str(best)}"
      else:
        said = "no checkpoint could be evaluated"
      say(f"watch: ends after step {max(seen)}; {said}")
      return
    if seen != waiting:
      say(f"watch: waits for a checkpoint after step {max(seen, default=0)}")
      waiting = seen
    _wait(every_seconds)


def check_followed(workdir: Path, fields: Mapping[str, Any]) -> None:
  """Raises UserError where a folder is no training's, or the training has no such fields; one that
  is still empty may become one.
  """
  if not workdir.is_dir():
    raise UserError(f"{str(workdir)!r} is no folder; watch follows a training's workdir")
  if files.export_folder(workdir) is not None:
    raise UserError(f"{str(workdir)!r} is an export; watch follows a training's workdir")
  if (workdir / CONFIG_FILE).exists():
    Recipe.load(workdir).override(dict(fields))
  elif any(path.name != LOCK_FILE for path in workdir.iterdir()):
    raise UserError(f"{str(workdir)!r} holds other files and no {CONFIG_FILE}: it is no workdir")


def wait_for_classifier(
  protocol: str, workdir: Path, fields: Mapping[str, Any], *, every_seconds: float
) -> None:
  """Returns once a training has the classifier of its own protocol, which it makes at its start.

  Raises:
    UserError: as `check_followed`, or a training under another protocol.
    Preempted: a signal came.
  """
  said = False
  while not (workdir / CLASSIFIER_FILE).exists():
    check_followed(workdir, fields)
    if (workdir / CONFIG_FILE).exists():
      check_own_protocol(protocol, workdir)
    if not said:
      say(f"watch: waits for {workdir / CLASSIFIER_FILE}, which the training makes at its start")
      said = True
    _wait(every_seconds)


def _wait(seconds: float) -> None:
  waited = 0.0
  while waited < seconds:
    STOP.raise_if_set()
    time.sleep(min(1.0, seconds - waited))
    waited += 1.0
  STOP.raise_if_set()


def _rows_of(out: Path, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
  if not out.exists():
    return []
  wanted = json.loads(json.dumps(dict(wanted)))  # as it is read back
  return [
    row
    for row in scoring.read_rows(out)
    if "step" in row and all(row.get(name) == value for name, value in wanted.items())
  ]


def _record_hash(workdir: Path) -> str | None:
  """SHA-256 of a distillation's record: another training in the same folder has another one."""
  record = workdir / "distill" / RECORD_FILE
  return hashlib.sha256(record.read_bytes()).hexdigest() if record.exists() else None


def _copy_checkpoint(workdir: Path, step: int, copy: Path) -> bool:
  """A workdir of one checkpoint; False where the training has deleted it meanwhile."""
  if copy.is_dir():
    if _record_hash(copy) == _record_hash(workdir):
      return True
    shutil.rmtree(copy)  # of an earlier training in that folder
  temporary = copy.with_name(f"{copy.name}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  checkpoint = Path("distill", "checkpoints", str(step))
  try:
    shutil.copytree(workdir / checkpoint, temporary / checkpoint)
    whole = _files(workdir / checkpoint) == _files(temporary / checkpoint)
    for path in (Path(CONFIG_FILE), Path("distill", RECORD_FILE)):
      shutil.copy2(workdir / path, temporary / path)
    if (workdir / "tokenizer").is_dir():
      shutil.copytree(workdir / "tokenizer", temporary / "tokenizer")
  except (FileNotFoundError, shutil.Error) as error:
    for path in (workdir / CONFIG_FILE, workdir / "distill" / RECORD_FILE):
      if not path.exists():
        raise UserError(f"{workdir} is no training's workdir: it has no {path.name}") from error
    whole = False
  if whole:
    temporary.rename(copy)
  else:
    shutil.rmtree(temporary, ignore_errors=True)
  return whole


def _files(folder: Path) -> set[Path]:
  return {path.relative_to(folder) for path in folder.rglob("*")}


def _keep_best(workdir: Path, copies: Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Leaves the copy of the best alone, and says in the training's folder which it is."""
  best = min(rows, key=distance_of)
  for copy in copies.glob("*"):
    if copy.name != str(best["step"]) and any(copy.name == str(row["step"]) for row in rows):
      shutil.rmtree(copy)
  record = {
    "step": best["step"],
    "protocol": best["protocol"],
    "distance": distance_of(best),
    "copy": str((copies / str(best["step"])).absolute()),
  }
  write_atomically(workdir / BEST_FILE, json.dumps(record, indent=1))
