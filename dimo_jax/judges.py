"""Whatever `artifacts` can sample, before a judge: evaluations, sweeps, a training's watch."""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dimo_jax import artifacts, prepare
from dimo_jax.checkpoint import check_which, params_hash
from dimo_jax.convert import files
from dimo_jax.data.sources import load_source
from dimo_jax.evaluation import jobs, scoring
from dimo_jax.evaluation.compare import distance_of, write_sweep
from dimo_jax.evaluation.features import Classifier
from dimo_jax.evaluation.generation import sample_images
from dimo_jax.evaluation.metrics import frechet_distance
from dimo_jax.evaluation.protocols import PROTOCOLS, Reference
from dimo_jax.evaluation.report import versions
from dimo_jax.evaluation.statistics import class_statistics
from dimo_jax.preemption import STOP
from dimo_jax.recipe import Recipe
from dimo_jax.remote import local_path
from dimo_jax.samplers import Sampler, plain_settings
from dimo_jax.sharding import check_batch, local_rows, make_mesh, replicated, shard_batch
from dimo_jax.state import NetworkState
from dimo_jax.teachers.tokenizers import Tokenizer
from dimo_jax.types import Array, Float, Int, UInt8, UserError
from dimo_jax.writers import say, write_atomically

__all__ = ["OwnJudge", "evaluate_once", "load_generator", "own_judge", "sweep", "watch"]

BEST_FILE = "best.json"  # the only file that a watch writes in a training's folder


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkGenerator:
  """Weights with our own networks and samplers; the batch of b images that begins at `start` is
  drawn with `fold_in(key(seed), start // b)`, as in a training's evaluation.

  Attributes:
    source: what identifies the weights, for the result.
    network: on the devices.
  """

  source: Mapping[str, Any]
  sampler: Sampler
  tokenizer: Tokenizer
  network: NetworkState
  num_classes: int
  mesh: jax.sharding.Mesh
  rounding = None

  @property
  def name(self) -> str:
    """Model, sampler and steps."""
    return f"{self.source['model']}, {self.sampler.name}, {self.sampler.num_steps} steps"

  @property
  def image_shape(self) -> tuple[int, int, int] | None:
    """(height, width, channels); None without a decoder."""
    return self.tokenizer.image_shape

  @property
  def settings(self) -> dict[str, Any]:
    """The sampler's fields."""
    return plain_settings(self.sampler)

  def with_steps(self, steps: int) -> "NetworkGenerator":
    """The same with another number of steps.

    Raises:
      UserError: a student, which has its own number, or none at all.
    """
    if self.source["model"] == "student" and steps != self.sampler.num_steps:
      raise UserError(f"steps={steps} is for teachers; the student takes {self.sampler.num_steps}")
    assert dataclasses.is_dataclass(self.sampler)
    if steps == self.sampler.num_steps:
      return self
    return dataclasses.replace(self, sampler=dataclasses.replace(self.sampler, num_steps=steps))

  def batch(self, labels: Int[np.ndarray, " b"], seed: int, start: int) -> Float[Array, "b h w c"]:
    """Images in [-1, 1], on the devices."""
    key = jax.random.fold_in(jax.random.key(seed), start // len(labels))
    rows = local_rows(len(labels), self.mesh)
    condition = {"class_id": shard_batch(labels[rows], self.mesh)}
    return sample_images(self.sampler, self.tokenizer, self.network, condition, key, self.mesh)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class ProgramGenerator:
  """An exported program: its images are levels, rounded to the nearest."""

  source: Mapping[str, Any]
  artifact: artifacts.Artifact
  rounding = "nearest"

  @property
  def name(self) -> str:
    """The artifact's."""
    return self.artifact.name

  @property
  def image_shape(self) -> tuple[int, int, int] | None:
    """(height, width, channels)."""
    return self.artifact.image_shape

  @property
  def num_classes(self) -> int:
    """The artifact's."""
    return self.artifact.num_classes

  @property
  def settings(self) -> dict[str, Any]:
    """What is known of its sampler."""
    return {"name": "exported program", "steps": self.artifact.num_steps}

  def with_steps(self, steps: int) -> "ProgramGenerator":
    """Itself.

    Raises:
      UserError: another number of steps than the program's.
    """
    if steps != self.artifact.num_steps:
      raise UserError(f"steps={steps}: {self.name} is a program of {self.artifact.num_steps} steps")
    return self

  def batch(
    self, labels: Int[np.ndarray, " b"], seed: int, start: int
  ) -> UInt8[np.ndarray, "b h w c"]:
    """The batch that begins at `start` is drawn with the seed `seed + start`."""
    return self.artifact.sample(labels, seed + start, batch_size=len(labels))


AnyGenerator = NetworkGenerator | ProgramGenerator


def load_generator(
  path: str, *, which: str = "last", tokenizer: str = "", fields: Mapping[str, Any] | None = None
) -> AnyGenerator:
  """Whatever `artifacts.load` takes; of a workdir the student.

  Args:
    which: of a workdir's checkpoints: "last", "best" or a step.
    tokenizer: a decoder of tokens, where the artifact holds none.
    fields: other values of config fields, by dotted name.

  Raises:
    UserError: nothing there, no such fields, or options that do not go together.
  """
  place = Path(path)
  source: dict[str, Any] = {"checkpoint": path}
  if tokenizer:
    source["tokenizer"] = tokenizer
  if (place / "distill").is_dir():
    check_which(which)
    run = artifacts.read_run(place, checkpoint=which)
    parts = run.parts()
    parts = dataclasses.replace(parts, recipe=parts.recipe.override(fields or {}))
    if tokenizer:
      parts = artifacts.with_tokenizer(parts, tokenizer)
    source |= {"step": run.step, "training_seed": run.recipe.config.seed}
    source |= {"teacher_sha256": run.teacher_sha256}
    return _network_generator(artifacts.NetworkArtifact(parts), source, fields)
  if which != "last":
    raise UserError(f"--checkpoint={which} is for workdirs")
  artifact = artifacts.load(path, tokenizer=tokenizer or None, fields=fields or None)
  source |= _of_export(path)
  if isinstance(artifact, artifacts.NetworkArtifact):
    return _network_generator(artifact, source, fields)
  assert isinstance(artifact, artifacts.ProgramArtifact)
  source |= {"model": _model(artifact), "weights_sha256": params_hash(artifact.weights)}
  program = hashlib.sha256(artifact.program.mlir_module_serialized).hexdigest()
  return ProgramGenerator(source | {"program_sha256": program}, artifact)


def _of_export(path: str) -> dict[str, Any]:
  """Where an export's weights come from; empty for anything else."""
  folder = files.export_folder(local_path(path))
  if folder is None:
    return {}
  manifest = json.loads((folder / files.MANIFEST).read_text(encoding="utf-8"))
  return {name: manifest[name] for name in ("step", "teacher_sha256")}


def _model(artifact: artifacts.Artifact) -> str:
  return "student" if artifact.role == "generator" else "teacher"


def _network_generator(
  artifact: artifacts.NetworkArtifact,
  source: Mapping[str, Any],
  fields: Mapping[str, Any] | None,
) -> NetworkGenerator:
  weights, mesh = artifact.parts.weights, make_mesh()
  network = artifact.models.teacher.frozen_state(weights["network"], weights["tokenizer"])
  identity = {
    "model": _model(artifact),
    "weights_sha256": params_hash(weights["network"]),
    "tokenizer_sha256": params_hash(weights["tokenizer"]),
    "compute_dtype": artifact.parts.recipe.config.precision.compute_dtype,
    "fields": dict(fields or {}),
  }
  return NetworkGenerator(
    source={**source, **identity},
    sampler=artifact.sampler,
    tokenizer=artifact.models.tokenizer,
    network=jax.device_put(network, replicated(mesh)),
    num_classes=artifact.num_classes,
    mesh=mesh,
  )


@dataclasses.dataclass(frozen=True)
class OwnJudge:
  """A protocol whose features are those of a classifier trained on the same data.

  Attributes:
    labels: of the reference split.
    seed: of the generated images.
    batch_size: images at once.
    per_class: adds `per_class`, the distance of every class to its own reference images.
  """

  reference: Reference
  labels: Int[np.ndarray, " n"]
  seed: int
  batch_size: int
  per_class: bool = False

  @property
  def identity(self) -> dict[str, Any]:
    """What rows of the same judge share."""
    return {
      "protocol": self.reference.protocol.name,
      "classifier_sha256": self.reference.classifier.weight_hash(),
      "statistics_sha256": self.reference.sha256,
      "seed": self.seed,
    }

  def fitted_to(self, generator: jobs.Generator) -> "OwnJudge":
    """Itself.

    Raises:
      UserError: images of another size than the classifier's, or other classes.
    """
    wanted = tuple(self.reference.classifier.image_shape)
    if generator.image_shape != wanted:
      raise UserError(
        f"{generator.name} has images {generator.image_shape},"
        f" protocol={self.reference.protocol.name!r} is for {wanted}"
      )
    num_classes = self.reference.classifier.module.num_classes
    if generator.num_classes != num_classes:
      raise UserError(
        f"{generator.name} has {generator.num_classes} classes, the classifier of"
        f" protocol={self.reference.protocol.name!r} has {num_classes}"
      )
    return self

  def evaluate(
    self, generator: jobs.Generator, out: Path, source: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Generates the protocol's images and evaluates them; adds the row to `out`, returns it.

    Raises:
      UserError: images of another size than the classifier's.
      Preempted: a signal came.
    """
    self.fitted_to(generator)
    labels, size = self.reference.protocol.labels(self.labels), self.batch_size
    filled = np.resize(labels, -(-len(labels) // size) * size).astype(np.int32)
    generator.batch(filled[:size], self.seed, 0)  # compiles
    began = time.perf_counter()
    batches = []
    for start in range(0, len(filled), size):
      images = np.asarray(generator.batch(filled[start : start + size], self.seed, start))
      levels = images.dtype == np.uint8
      batches.append(images.astype(np.float32) / 127.5 - 1 if levels else images)
      STOP.raise_if_set()
    rate = len(filled) / (time.perf_counter() - began)
    settings, images = dict(generator.settings), np.concatenate(batches)[: len(labels)]
    row = {
      **self.reference.evaluate(images, labels),
      **({"per_class": self._per_class(images, labels)} if self.per_class else {}),
      **source,
      "sampler": settings,
      "steps": settings["steps"],
      **self.identity,
      "batch_size": size,
      "images_per_second": rate,
      "versions": versions(),
    }
    scoring.append_row(out, row)
    say(json.dumps(row))
    return row

  def _per_class(
    self, images: Float[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"]
  ) -> dict[int, float]:
    rounded = self.reference.protocol.round_images(images)
    features, _ = self.reference.classifier.features_and_logits(rounded)
    real = class_statistics(self.reference.features, self.labels)
    generated = class_statistics(features, labels)
    return {c: frechet_distance(real[c], generated[c]) for c in sorted(real.keys() & generated)}


def own_judge(
  name: str, workdir: Path, batch_size: int = 0, *, per_class: bool = False
) -> OwnJudge:
  """The judge of a protocol of `PROTOCOLS`, with the classifier and the data set of a workdir.

  Args:
    batch_size: images at once; 0: as in the training's own evaluation.

  Raises:
    UserError: no config or classifier there, or a training under another protocol.
  """
  recipe = Recipe.load(workdir)
  config = recipe.config
  if config.evaluation.protocol != name:
    raise UserError(
      f"protocol={name!r}: {workdir} was trained with evaluation.protocol="
      f"{config.evaluation.protocol!r}"
    )
  protocol = PROTOCOLS[name]
  source = load_source(
    config.data.name,
    protocol.reference_split,
    config.data.path,
    image_size=config.data.image_size,
    tfds_name=config.data.tfds_name,
  )
  classifier = Classifier.load(workdir / "classifier" / "classifier.safetensors")
  images, labels = prepare.load_arrays(source)
  reference = protocol.reference(classifier, images, labels)
  batch_size = batch_size or config.evaluation.batch_size
  check_batch(batch_size, make_mesh(), "batch_size")
  whole = -(-protocol.num_images // jax.device_count()) * jax.device_count()
  batch_size = min(batch_size, whole)
  return OwnJudge(reference, labels, config.evaluation.seed, batch_size, per_class)


AnyJudge = jobs.Judge | OwnJudge


def evaluate_once(
  judge: AnyJudge, generator: AnyGenerator, out: Path, source: Mapping[str, Any]
) -> dict[str, Any]:
  """The row in `out` of the same weights, settings and judge, evaluated if there is none.

  Args:
    source: what identifies the weights.

  Raises:
    UserError: a generator that is not for the judge's protocol.
    Preempted: a signal came; the same call goes on.
  """
  fitted = judge.fitted_to(generator)
  key = {**fitted.identity, "batch_size": fitted.batch_size, **source}
  row = scoring.find_row(out, key | {"sampler": dict(generator.settings)})
  per_class = isinstance(judge, OwnJudge) and judge.per_class
  if row is not None and (not per_class or "per_class" in row):
    say(f"{generator.name}: {out} has its row, distance {distance_of(row):.4f}")
    return row
  return judge.evaluate(generator, out, source)


def sweep(
  judge: AnyJudge,
  load: Callable[[float], AnyGenerator],
  field: str,
  values: Sequence[float],
  out: Path,
) -> dict[str, Any]:
  """Evaluates a network at each value of a sampling field; rows in `out`, the curve in `out`.html.

  Values that have their row already are not computed again.

  Returns:
    The row with the lowest distance.
  """
  rows = []
  for value in values:
    generator = load(value)
    source = {**generator.source, "sweep": {"field": field, "value": value}}
    rows.append(evaluate_once(judge, generator, out, source))
  page = out.with_name(f"{out.name}.html")
  write_sweep(page, field, rows)
  best = min(rows, key=distance_of)
  say(f"best: {field}={best['sweep']['value']:g}, distance {distance_of(best):.4f}; curve: {page}")
  return best


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
  workdir = workdir.resolve()  # the rows name it
  fields = dict(fields or {})
  if (workdir / "config.json").exists():
    Recipe.load(workdir).override(fields)  # refuses before anything is computed
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
    for step in sorted(_finished_steps(workdir) - done - skipped):
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
    if end is None and (workdir / "config.json").exists():
      last = Recipe.load(workdir).config.train.num_steps
      end = last if last in _finished_steps(workdir) else 0  # rows may be of a run before this one
    if end and any(step >= end for step in seen):
      return
    if seen != waiting:
      say(f"watch: waits for a checkpoint after step {max(seen, default=0)}")
      waiting = seen
    waited = 0.0
    while waited < every_seconds:
      STOP.raise_if_set()
      time.sleep(min(1.0, every_seconds - waited))
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
  record = workdir / "distill" / "record.json"
  return hashlib.sha256(record.read_bytes()).hexdigest() if record.exists() else None


def _finished_steps(workdir: Path) -> set[int]:
  """Checkpoints under their final names: orbax renames a whole one."""
  folder = workdir / "distill" / "checkpoints"
  return {int(path.name) for path in folder.glob("*") if path.name.isdigit()}


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
    for path in (Path("config.json"), Path("distill", "record.json")):
      shutil.copy2(workdir / path, temporary / path)
    if (workdir / "tokenizer").is_dir():
      shutil.copytree(workdir / "tokenizer", temporary / "tokenizer")
  except (FileNotFoundError, shutil.Error) as error:
    for path in (workdir / "config.json", workdir / "distill" / "record.json"):
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
