"""Generators before a judge: one evaluation, each once, and a sampling field's values in turn."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dimo_jax import prepare
from dimo_jax.data.sources import load_source
from dimo_jax.evaluation import jobs, scoring
from dimo_jax.evaluation.compare import distance_of, write_sweep
from dimo_jax.evaluation.features import Classifier
from dimo_jax.evaluation.metrics import frechet_distance
from dimo_jax.evaluation.protocols import PROTOCOLS, Reference
from dimo_jax.evaluation.report import versions
from dimo_jax.evaluation.statistics import class_statistics
from dimo_jax.generators import AnyGenerator
from dimo_jax.preemption import STOP
from dimo_jax.recipe import Recipe
from dimo_jax.sharding import check_batch, make_mesh
from dimo_jax.types import Float, Int, UserError
from dimo_jax.writers import say

__all__ = ["AnyJudge", "OwnJudge", "check_own_protocol", "evaluate_once", "own_judge", "sweep"]


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
    scoring.say_row(generator.name, row, out)
    return row

  def _per_class(
    self, images: Float[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"]
  ) -> dict[int, float]:
    rounded = self.reference.protocol.round_images(images)
    features, _ = self.reference.classifier.features_and_logits(rounded)
    real = class_statistics(self.reference.features, self.labels)
    generated = class_statistics(features, labels)
    return {c: frechet_distance(real[c], generated[c]) for c in sorted(real.keys() & generated)}


def check_own_protocol(name: str, workdir: Path) -> ml_collections.ConfigDict:
  """The recorded config of a workdir.

  Raises:
    UserError: there is none, or it has another protocol.
  """
  config = Recipe.load(workdir).config
  own = config.evaluation.protocol
  if own != name:
    meant = "and has no classifier to be judged by" if own == "none" else "which can judge it"
    raise UserError(
      f"protocol={name!r}: {workdir} was trained with evaluation.protocol={own!r}, {meant}"
    )
  return config


def own_judge(
  name: str, workdir: Path, batch_size: int = 0, *, per_class: bool = False
) -> OwnJudge:
  """The judge of a protocol of `PROTOCOLS`, with the classifier and the data set of a workdir.

  Args:
    batch_size: images at once; 0: as in the training's own evaluation.

  Raises:
    UserError: no config or classifier there, or a training under another protocol.
  """
  config = check_own_protocol(name, workdir)
  protocol = PROTOCOLS[name]
  source = load_source(
    config.data.name,
    protocol.reference_split,
    config.data.path,
    image_size=config.data.image_size,
    tfds_name=config.data.tfds_name,
  )
  classifier = Classifier.load(workdir / prepare.CLASSIFIER_FILE)
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
    title = scoring.title_of(generator.name, row)
    say(f"{title}: {out} has its row, distance {distance_of(row):.4f}")
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
