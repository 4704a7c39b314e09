"""A run before a published protocol: its teacher first, its student as it trains, at the end all.

Every result is a line of `WORKDIR/eval/results.jsonl`; what stands there already, of the same
weights and settings, is not computed again.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dimo_jax.build import Experiment
from dimo_jax.checkpoint import params_hash
from dimo_jax.distributed import on_first
from dimo_jax.evaluation import compare, jobs, scoring
from dimo_jax.evaluation.generation import decode_images, encode_images
from dimo_jax.evaluation.image_sets import ImageSet, SourceImages
from dimo_jax.evaluation.inception import Inception
from dimo_jax.evaluation.published import PublishedProtocol
from dimo_jax.evaluation.references import read_reference
from dimo_jax.generators import NetworkGenerator
from dimo_jax.hooks import sampling_network
from dimo_jax.remote import local_path
from dimo_jax.samplers import Sampler
from dimo_jax.state import DistillState, NetworkState
from dimo_jax.teachers.tokenizers import Tokenizer
from dimo_jax.types import Int, Params, UInt8
from dimo_jax.writers import say, write_atomically

__all__ = ["Reconstructions", "RunJudge"]

Row = dict[str, Any]

_RESULTS = Path("eval", "results.jsonl")  # in the workdir
# What a training records of a result, by the names of its own evaluation's metrics.
_METRICS = {"fid": "frechet_distance", "fid_low": "frechet_distance_low"}
_METRICS |= {"fid_high": "frechet_distance_high"}
_METRICS |= {name: name for name in ("inception_score", "sfid", "kid", "precision", "recall")}


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstructions:
  """Finished images as a tokenizer gives them back, rounded as a protocol says."""

  images: ImageSet
  tokenizer: Tokenizer
  params: Params
  protocol: PublishedProtocol
  mesh: jax.sharding.Mesh

  @property
  def name(self) -> str:
    """The images', and what was done with them."""
    return f"{self.images.name}, reconstructed"

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, 3)."""
    return self.images.image_shape

  @property
  def labels(self) -> Int[np.ndarray, " n"] | None:
    """The images'."""
    return self.images.labels

  def __len__(self) -> int:
    return len(self.images)

  def read(self, start: int, stop: int) -> UInt8[np.ndarray, "b h w 3"]:
    """A run of images."""
    images = self.images.read(start, stop).astype(np.float32) / 127.5 - 1
    tokens = encode_images(self.tokenizer, self.params, images, self.mesh)
    decoded = decode_images(self.tokenizer, self.params, tokens, self.mesh)
    return np.asarray(self.protocol.levels(jnp.asarray(decoded)))

  def fingerprint(self) -> str:
    """Changes where the images or the tokenizer do."""
    return f"{self.images.fingerprint()} {params_hash(self.params)}"


@dataclasses.dataclass(frozen=True, eq=False)
class RunJudge:
  """The published protocol of an experiment, applied to its networks."""

  experiment: Experiment
  workdir: Path
  judge: jobs.Judge

  @classmethod
  def of(cls, experiment: Experiment, workdir: Path) -> "RunJudge | None":
    """None where the config names no published protocol, or evaluation is off.

    Raises:
      UserError: weights or statistics that cannot be read, or do not go with the protocol.
    """
    protocol, evaluation = experiment.published, experiment.config.evaluation
    if protocol is None:
      return None
    reference = read_reference(local_path(evaluation.statistics))
    inception = Inception.load(local_path(evaluation.inception))
    mesh, batch_size = experiment.mesh, evaluation.batch_size
    return cls(experiment, workdir, jobs.Judge(protocol, reference, inception, mesh, batch_size))

  @property
  def _out(self) -> Path:
    return self.workdir / _RESULTS

  def evaluate_teacher(self, teacher: NetworkState) -> list[Row]:
    """The teacher at the config's numbers of steps.

    Raises:
      Preempted: a signal came; the same call goes on.
    """
    config, decoding = self.experiment.config, self.experiment.decoding
    checkpoint = config.teacher.path or str(self.workdir / "teacher")
    source = {"model": "teacher", "checkpoint": checkpoint}
    return [
      self._evaluate_network(teacher, dataclasses.replace(decoding, num_steps=steps), source)
      for steps in config.evaluation.teacher_steps
    ]

  def evaluate_student(self, state: DistillState, tokenizer: Params) -> Row:
    """The student with its averaged weights.

    Raises:
      Preempted: a signal came; the same call goes on.
    """
    network = sampling_network(self.experiment, state.ema_params, tokenizer)
    sampler = self.experiment.student_sampler.at(int(state.clock))
    source: Row = {"model": "student", "checkpoint": str(self.workdir)}
    source |= {"step": int(state.generator.step), "training_seed": self.experiment.config.seed}
    return self._evaluate_network(network, sampler, source)

  def metrics(self, state: DistillState, tokenizer: Params) -> dict[str, float]:
    """The student's numbers as a training records them.

    No signal stops it: they must be on disk before the checkpoint of their step.
    """
    judge = dataclasses.replace(self.judge, interruptible=False)
    row = dataclasses.replace(self, judge=judge).evaluate_student(state, tokenizer)
    return {
      f"evaluation/{name}": row[key] for key, name in _METRICS.items() if row[key] is not None
    }

  def evaluate_data(self, tokenizer: Params) -> list[Row]:
    """All test images, and where there are tokens what the tokenizer makes of them: the distances
    below which a generator hardly comes. Empty where the data set has no images.

    Raises:
      Preempted: a signal came; the same call goes on.
    """
    experiment, source = self.experiment, self.experiment.test_source
    if source is None:
      return []
    images = SourceImages(source, f"{experiment.config.data.name} test split")
    protocol = self.judge.protocol
    if len(images) != protocol.num_images:
      protocol = protocol.with_images(len(images))
    judge = dataclasses.replace(self.judge, protocol=protocol)
    sets: dict[str, ImageSet] = {"real": images}
    if experiment.tokenizer.codebook_size:
      sets["tokenizer"] = Reconstructions(
        images, experiment.tokenizer, tokenizer, protocol, experiment.mesh
      )
    rows = []
    for model, found in sets.items():
      said: Row = {"model": model, "sampler": found.name, "steps": 0}
      key = {"images_fingerprint": found.fingerprint(), "departures": protocol.departures(), **said}
      evaluate = functools.partial(jobs.evaluate_images, judge, found, self._out, said)
      rows.append(self._once(key, evaluate))
    return rows

  def finish(self, teacher: NetworkState, state: DistillState) -> list[Row]:
    """Everything that is not evaluated yet; writes results.json and report.html."""
    tokenizer = teacher.autoencoder
    rows = [*self.evaluate_data(tokenizer), *self.evaluate_teacher(teacher)]
    rows.append(self.evaluate_student(state, tokenizer))
    path = self.workdir / "results.json"
    report = self.workdir / "report.html"

    def write() -> None:
      write_atomically(path, json.dumps(rows, indent=1))
      compare.write_comparison(report, [compare.load_results(self.workdir)])

    on_first(write)
    say(f"results: {path}\nreport: {report}")
    return rows

  def _evaluate_network(
    self, network: NetworkState, sampler: Sampler, source: Mapping[str, Any]
  ) -> Row:
    experiment = self.experiment
    identity = {
      "model": source["model"],
      "weights_sha256": params_hash(network.all_params),
      "tokenizer_sha256": params_hash(network.autoencoder),
      "compute_dtype": experiment.config.precision.compute_dtype,
      "batch_size": self.judge.batch_size,
    }
    generator = NetworkGenerator(
      source={**source, **identity},
      sampler=sampler,
      tokenizer=experiment.tokenizer,
      network=network,
      num_classes=experiment.config.data.num_classes,
      mesh=experiment.mesh,
    )
    return self._once(
      {**identity, "sampler": generator.settings},
      lambda: jobs.evaluate_generator(self.judge, generator, self._out, generator.source),
    )

  def _once(self, key: Mapping[str, Any], evaluate: Callable[[], Row]) -> Row:
    """The row that has all of `key`, made if there is none."""
    found = scoring.find_row(self._out, {**self.judge.identity, **key})
    return evaluate() if found is None else found
