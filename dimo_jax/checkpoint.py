"""Checkpoints of a stage, finished parameters, and the record that guards against mixed runs.

Restore precedence of a stage:
1. its finished parameters (tokenizer, classifier, teacher), if the record agrees with the config;
2. its newest readable checkpoint; damaged ones are named, moved to `damaged/` and passed over;
3. its beginning.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import serialization, traverse_util
from orbax.checkpoint import checkpoint_managers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dimo_jax.distributed import from_first, in_any, is_first, on_first
from dimo_jax.sharding import Rules, fetch, state_sharding
from dimo_jax.types import Array, Params, UInt32, UserError
from dimo_jax.writers import say, write_atomically

_MAX_LISTED = 8  # changed fields named in one line
# Fields that older records lack, with what held before there were any.
ADDED_FIELDS: dict[str, Any] = {
  "data.tokens": "",
  "dimo.reuse_samples": False,
  "dmd2.reuse_samples": True,
  "log.keep_every_steps": 0,
  "log.profile_steps": (),
  "optim.fake_score.mean_dtype": "float32",
  "optim.generator.mean_dtype": "float32",
  "teacher.pretrain.optim.mean_dtype": "float32",
  "tested.batch_size": (),
  "tested.learning_rate": (),
  "train.ema_memory": "device",
}
BEST_METRIC = "evaluation/frechet_distance"  # lower is better
RECORD_FILE = "record.json"  # in a stage's folder: what it depends on
DAMAGED_FOLDER = "damaged"  # of checkpoints, beside the others


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, which here saves when it is told to and at no other time."""

  def reached_preemption(self, step: int) -> bool:
    """No: `preemption.STOP` alone may ask, whose count of its calls this one would set back."""
    del step
    return False


class Checkpoints:
  """Asynchronous, atomic checkpoints of one stage's state: the newest few, the best, and every so
  many steps one for good.
  """

  def __init__(
    self, directory: Path, keep: int = 1, keep_every_steps: int = 0, *, read_only: bool = False
  ):
    """Opens a directory of checkpoints, named by the number of steps done.

    Args:
      keep: how many of the newest to keep, beside the best.
      keep_every_steps: keep also those of the multiples of it; 0 is off.
      read_only: change nothing there, where a training may be at work; else it is made.
    """
    self._directory = directory.absolute()
    self._keep, self._keep_every_steps, self._read_only = keep, keep_every_steps, read_only
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    bad_metrics: dict[int, str] = {}
    for path in self._directory.glob("*/metrics/metrics"):  # one bad file would fail them all
      if not path.parts[-3].isdigit():
        continue  # of an unfinished checkpoint, which orbax takes away
      try:
        json.loads(path.read_text(encoding="utf-8"))
      except ValueError as error:
        if self._read_only:
          raise UserError(
            f"checkpoint {path.parents[1]} is damaged; --mode=train puts it aside"
          ) from error
        bad_metrics[int(path.parts[-3])] = str(error)
    for step, reason in from_first(sorted(bad_metrics.items())):
      self._move_aside(step, reason)
    policies = checkpoint_managers.preservation_policy
    kept: list[Any] = [
      policies.LatestN(self._keep),
      policies.BestN(
        n=1,
        get_metric_fn=_best_metric,
        reverse=True,
        keep_checkpoints_without_metrics=False,
      ),
    ]
    if self._keep_every_steps:
      kept.append(policies.EveryNSteps(self._keep_every_steps))
    keep = policies.AnyPreservationPolicy(kept)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=keep,
      best_fn=_best_metric,  # without it the metrics are not written
      best_mode="min",
      create=not self._read_only,
      cleanup_tmp_directories=not self._read_only,
      read_only=self._read_only,
    )
    return _Manager(self._directory, options=options)

  def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
    """Starts a checkpoint; returns once the state has left the devices."""
    if from_first(step in self._manager.all_steps()):
      return
    tree = serialization.to_state_dict(state)
    self._manager.save(
      step,
      args=ocp.args.StandardSave(tree),
      metrics=dict(metrics or {}) or None,
      custom_metadata={"checksums": checksums(tree)},
    )

  def restore(
    self,
    state: Any,
    mesh: Any,
    rules: Rules,
    step: int | None = None,
    *,
    partial: bool = False,
  ) -> Any | None:
    """(state, step) from the newest readable checkpoint (or a given one); None if there is none.

    `state` gives structure, shapes and types; arrays arrive sharded over `mesh`, whatever mesh
    they were saved from. With `partial` it may be a part of what was saved, as a nested dict, and
    nothing else is read.

    Raises:
      UserError: the asked-for step does not exist, none of the checkpoints can be read, or one is
        of another version of this program.
    """
    _quiet_abandoned_reads()
    # As process 0 sees them: a shared folder may show another the newest one late.
    steps = from_first(sorted(self._manager.all_steps(), reverse=True))
    if step is not None:
      if step not in steps:
        raise UserError(f"checkpoint {step} is not in {self._directory}; there are {steps}")
      steps = [step]
    tree = serialization.to_state_dict(state)
    shardings = state_sharding(tree, mesh, rules)
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), tree, shardings
    )
    for candidate in steps:
      reason, saved, restored = "", {}, {}
      try:
        # Not the manager's restore: its barrier would hang where one process cannot read.
        path = self._directory / str(candidate) / "default"
        _check_names(path, tree, partial=partial)
        restored = _restore_part(path, abstract) if partial else _restore(path, abstract)
        saved = self._manager.metadata(candidate).custom_metadata.get("checksums")
        reason = "" if saved else "its checksums cannot be read"
      except UserError:
        raise
      except Exception as error:  # whatever a damaged file makes of itself
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
          raise
        reason = str(error).strip() or repr(error)
      if not in_any(bool(reason)):
        found = checksums(restored)
        changed = [name for name, value in found.items() if saved.get(name) != value]
        if not changed:
          return serialization.from_state_dict(state, restored), candidate
        reason = f"{changed[0]} is not what was saved ({len(changed)} arrays changed)"
      del restored  # the devices may not hold two states
      self._manager.close()
      self._move_aside(candidate, reason or "another process cannot read it")
      self._manager = self._open()
    if step is not None:
      raise UserError(f"checkpoint {step} of {self._directory} cannot be read; take another")
    aside = self._directory / DAMAGED_FOLDER
    if steps or (not self._read_only and from_first(any(aside.glob("*")))):
      which = f"the checkpoints {steps}" if steps else "the checkpoints"
      raise UserError(
        f"none of {which} of {self._directory} can be read; to begin anew move"
        f" {self._directory.parent} away"
      )
    return None

  def _move_aside(self, step: int, reason: str) -> None:
    path = self._directory / str(step)
    say(f"checkpoint {path} is damaged and skipped: {reason.splitlines()[0][:160]}")
    if not self._read_only:
      on_first(functools.partial(self._move, path, step))

  def _move(self, path: Path, step: int) -> None:
    target = self._directory / DAMAGED_FOLDER / str(step)
    target.parent.mkdir(exist_ok=True)
    for i in range(1, 1000):
      if not target.exists():
        break
      target = target.with_name(f"{step}-{i}")
    path.rename(target)

  def read(self, step: int) -> Any:
    """A checkpoint's whole tree as it was saved, on the host, whatever its structure."""
    return read_tree(self._directory / str(step) / "default")

  def last_step(self) -> int | None:
    """The newest step, if there is one."""
    return self._manager.latest_step()

  def find_step(self, which: str) -> int | None:
    """The step that "best" or a number names; None for "last", the newest that can be read.

    Raises:
      UserError: none was evaluated.
    """
    if which == "last":
      return None
    step = self.best_step() if which == "best" else int(which)
    if step is None:
      raise UserError(
        f"{self._directory.parents[1]} holds no evaluated checkpoint; take --checkpoint=last"
      )
    return step

  def best_step(self) -> int | None:
    """The step with the best evaluation, if any was evaluated."""
    return self._manager.best_step()

  def close(self) -> None:
    """Waits for a checkpoint under way."""
    self._manager.wait_until_finished()
    self._manager.close()


def finished_steps(directory: Path) -> set[int]:
  """Steps of a stage's checkpoints, by their final names: orbax renames a whole one."""
  return {int(path.name) for path in (directory / "checkpoints").glob("*") if path.name.isdigit()}


def check_which(which: str) -> None:
  """Raises UserError where no checkpoint is meant by it."""
  if which not in ("last", "best") and not which.isdecimal():
    raise UserError(f"--checkpoint={which!r} must be last, best or a step such as 1000")


def save_tree(path: Path, tree: Any) -> None:
  """Writes a tree of arrays as an orbax checkpoint without a history."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path.absolute(), jax.tree.map(np.asarray, jax.device_get(tree)))


def _check_names(path: Path, tree: Any, *, partial: bool) -> None:
  """Raises UserError where a whole checkpoint holds other arrays than `tree`."""
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    saved = set(traverse_util.flatten_dict(handler.metadata(path).tree, sep="/"))
  wanted = set(traverse_util.flatten_dict(tree, sep="/"))
  missing, unknown = sorted(wanted - saved), [] if partial else sorted(saved - wanted)
  if missing or unknown:
    what = f"lacks {missing[0]}" if missing else f"holds {unknown[0]} besides"
    raise UserError(
      f"checkpoint {path.parent} {what}: it is of another version of this program or another"
      " config; go on with that one, or begin a new workdir"
    )


def _restore(path: Path, abstract: Any) -> Any:
  with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
    return handler.restore(path, args=ocp.args.StandardRestore(abstract))


def _restore_part(path: Path, abstract: Any) -> Any:
  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    return handler.restore(path, args=args)


def read_tree(path: Path) -> Any:
  """A checkpoint's whole tree as it was saved, on the host, whatever its structure.

  Raises:
    UserError: it is missing or damaged.
  """
  _quiet_abandoned_reads()
  try:
    path = path.absolute()
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
      as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree
      )
      return handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
  except Exception as error:  # whatever a damaged file makes of itself
    if isinstance(error, MemoryError):
      raise
    lines = str(error).strip().splitlines() or [repr(error)]
    raise UserError(f"{path} is not a readable checkpoint: {lines[0][:160]}") from error


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
  """Without orbax's warnings, which are about what is meant: to read only, and of any structure.

  What a program around it logs of its own is not touched.
  """

  def of_others(record: Any) -> bool:
    return "orbax" not in Path(record.pathname).parts

  logger = logging.get_absl_logger()
  logger.addFilter(of_others)
  try:
    yield
  finally:
    logger.removeFilter(of_others)


def _quiet_abandoned_reads() -> None:
  """Orbax gives up on a damaged array while others are still being read, and each of them would
  print a traceback once it is collected: it finds the event loop closed, or is told to exit.
  """
  hook = sys.unraisablehook

  def quiet(error: Any) -> None:
    told_to_exit = isinstance(getattr(error.exc_value, "__cause__", None), GeneratorExit)
    if not (told_to_exit or "Event loop is closed" in str(error.exc_value)):
      hook(error)

  if getattr(hook, "__qualname__", "") != quiet.__qualname__:
    sys.unraisablehook = quiet


def _best_metric(metrics: Mapping[str, float]) -> float:
  return metrics[BEST_METRIC]


def checksums(tree: Any) -> dict[str, int]:
  """A number for each array by flat path; the same however the arrays are sharded."""
  flat = traverse_util.flatten_dict(tree, sep="/")
  # Waited for one by one: on CPUs, sums over devices that run at once may wait for each other.
  return {name: int(_checksum(array)) for name, array in flat.items()}


@jax.jit
def _checksum(array: Array) -> UInt32[Array, ""]:
  """The words, each times an odd number of its own, summed modulo 2^32: one changed bit shows."""
  words = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
  factors = 2 * jnp.arange(array.size, dtype=jnp.uint32).reshape(array.shape) + 1
  return jnp.sum(words.astype(jnp.uint32) * factors, dtype=jnp.uint32)


def check_record(directory: Path, fields: Mapping[str, Any]) -> None:
  """Records what a stage depends on, or compares it with the record of the run begun there.

  Raises:
    UserError: fields differ; all of them are named.
  """
  changed = changed_fields(directory, fields)
  refuse_changes(directory, changed)
  path = directory / RECORD_FILE
  if is_first() and not path.exists():
    write_atomically(path, json.dumps(dict(fields), indent=1, sort_keys=True))


def changed_fields(directory: Path, fields: Mapping[str, Any]) -> dict[str, str]:
  """`old -> new` by name, for what differs from the record of a run begun in `directory`."""
  path = directory / RECORD_FILE
  if not path.exists():
    return {}
  fields = json.loads(json.dumps(dict(fields)))
  try:
    recorded = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is damaged ({error}); move {directory} away to start again") from error
  added = {k: v for k, v in ADDED_FIELDS.items() if k in fields}
  recorded = json.loads(json.dumps(added)) | recorded  # a tuple is a list there
  return {
    name: f"{recorded.get(name)!r} -> {fields.get(name)!r}"
    for name in {*recorded, *fields}
    if recorded.get(name) != fields.get(name)
  }


def refuse_changes(directory: Path, changed: Mapping[str, str]) -> None:
  """Raises UserError, naming every changed field, if there are any."""
  if changed:
    raise UserError(
      f"{directory} was begun with another config: {listed(changed)}."
      " Undo the change, or use a new --workdir; evaluating and sampling need no --config"
    )


def listed(changed: Mapping[str, str]) -> str:
  """Changed fields in one line: the objective first, and not more than a reader can take in."""
  order = sorted(changed.items(), key=lambda item: (item[0] != "objective", item[0]))
  more = f"; and {len(order) - _MAX_LISTED} more" if len(order) > _MAX_LISTED else ""
  return "; ".join(f"{name} {change}" for name, change in order[:_MAX_LISTED]) + more


def params_hash(params: Params) -> str:
  """SHA-256 over sorted paths, shapes and bytes; all processes call it where they share arrays."""
  digest = hashlib.sha256()
  for path, leaf in sorted(traverse_util.flatten_dict(fetch(params), sep="/").items()):
    value = np.asarray(leaf)
    digest.update(f"{path} {value.dtype} {value.shape}\n".encode())
    digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def save_params(path: Path, params: Params, metadata: Mapping[str, Any]) -> None:
  """Writes a tree as safetensors, atomically, with JSON metadata."""
  flat = traverse_util.flatten_dict(params, sep="/")
  flat = {k: np.ascontiguousarray(jax.device_get(v)) for k, v in flat.items()}
  temporary = path.with_name(path.name + ".tmp")
  save_file(flat, temporary, metadata={"dimo_jax": json.dumps(dict(metadata))})
  mask = os.umask(0)  # safetensors' own files are for their owner alone
  os.umask(mask)
  temporary.chmod(0o666 & ~mask)
  temporary.replace(path)


def load_params(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """(arrays by flat path, metadata) of a safetensors file; metadata is empty for foreign files.

  Raises:
    UserError: the file is missing, cut short or no safetensors file.
  """
  try:
    with safe_open(path, framework="numpy") as file:
      arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
      metadata = (file.metadata() or {}).get("dimo_jax", "{}")
  except FileNotFoundError as error:
    raise UserError(f"{path} does not exist") from error
  except (SafetensorError, OSError) as error:
    raise UserError(f"{path} is not a readable safetensors file: {error}") from error
  return arrays, json.loads(metadata)
