"""Evaluation of a workdir: teacher over several step counts, student, real data; the report."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dimo_jax import prepare, train
from dimo_jax.build import Experiment
from dimo_jax.distributed import on_first
from dimo_jax.evaluation.protocols import Reference
from dimo_jax.evaluation.report import console_table, versions, write_report
from dimo_jax.hooks import evaluate_sampler, sampling_network
from dimo_jax.samplers import Sampler
from dimo_jax.sharding import fetch
from dimo_jax.state import DistillState, NetworkState
from dimo_jax.writers import read_metrics, say, write_atomically


def evaluate_workdir(experiment: Experiment, workdir: Path, *, best: bool = False) -> None:
  """Evaluates a trained workdir, its last or best student; without a protocol it says so."""
  if experiment.protocol is None:
    say("evaluation: off (evaluation.protocol='none')")
    return
  teacher, state = train.restore(experiment, workdir, best=best)
  reference = prepare.fit_classifier(experiment, workdir)
  assert reference is not None  # there is a protocol
  evaluate(experiment, workdir, teacher, state, reference)


def evaluate(
  experiment: Experiment,
  workdir: Path,
  teacher: NetworkState,
  state: DistillState,
  reference: Reference,
) -> list[dict[str, Any]]:
  """Evaluates everything, writes results.json and report.html, returns the rows.

  The floor is real against real: the test split against the training split.
  """
  config = experiment.config
  test = prepare.load_arrays(experiment.source("test"))
  floor = reference.evaluate(*test, *_tokens(experiment, teacher, test[0]))
  rows: list[dict[str, Any]] = [
    {"model": "real", "sampler": "test split", "steps": 0, **floor, "images_per_second": None}
  ]
  say(f"evaluation: floor (real test images) {floor['frechet_distance']:.4f}")

  student = sampling_network(experiment, state.ema_params, teacher.autoencoder)
  runs: list[tuple[str, Sampler, NetworkState]] = [
    ("teacher", dataclasses.replace(experiment.decoding, num_steps=steps), teacher)
    for steps in config.evaluation.teacher_steps
  ]
  target = experiment.objective.target(experiment.decoding)
  if target is not None:
    runs.append(("teacher", target, teacher))
  runs.append(("student", experiment.student_sampler.at(int(state.clock)), student))
  for model, sampler, network in runs:
    row: dict[str, Any] = {**evaluate_sampler(experiment, reference, sampler, network)}
    steps = sampler.num_steps
    rows.append({"model": model, "sampler": sampler.name, "steps": steps, **row})
    say(f"evaluation: {model} {sampler.name} {steps} steps: {row['frechet_distance']:.4f}")
  for row in rows:
    row["seed"] = config.seed
    row["sampling_seed"] = config.evaluation.seed
    row["classifier_accuracy"] = reference.classifier.test_accuracy
    row["classifier_sha256"] = reference.classifier.weight_hash()
  on_first(lambda: _write(experiment, workdir, rows, reference))
  return rows


def _tokens(experiment: Experiment, teacher: NetworkState, images: Any) -> tuple[Any, int | None]:
  codebook_size = experiment.tokenizer.codebook_size
  if not codebook_size:
    return None, None
  params = jax.tree.map(jnp.asarray, fetch(teacher.autoencoder))
  return experiment.tokenizer.encode(params, images), codebook_size


def _write(
  experiment: Experiment, workdir: Path, rows: list[dict[str, Any]], reference: Reference
) -> None:
  write_atomically(workdir / "results.json", json.dumps(rows, indent=1))
  classifier = reference.classifier
  protocol = reference.protocol
  test_labels = experiment.source("test").labels
  grids = sorted((workdir / "distill" / "pictures").glob("step_*.png"))
  chosen = grids[:1] + grids[-1:] if len(grids) > 1 else grids
  notes = [
    f"Protocol {protocol.name}: {protocol.num_images} images against the"
    f" {protocol.reference_split} split; {protocol.feature_network}, test accuracy"
    f" {classifier.test_accuracy:.4f}, seed {classifier.seed}, weights sha256"
    f" {classifier.weight_hash()}: a function of the data and its own seed, never of a generator.",
    "The normalized distance is divided by the trace of the reference covariance. Row 'real' is the"
    f" test split, {len(test_labels)} images, against the training split: the floor. A distance"
    f" falls as images are added, so rows of {protocol.num_images} images may lie below it.",
  ]
  target = experiment.objective.target(experiment.decoding)
  if target is not None:
    notes.append(
      f"The student's target is the row {target.name!r}, at the guidance and temperature of the"
      " training, not the teacher's best decoding."
    )
  path = workdir / "report.html"
  write_report(
    path,
    title=f"{experiment.config.objective} on {experiment.config.data.name}",
    results=rows,
    curves={name: read_metrics(workdir / name) for name in ("teacher", "distill")},
    grids=[(png, f"Samples after {int(png.stem[5:])} generator updates") for png in chosen],
    config_text=str(experiment.config),
    versions=versions(),
    notes=notes,
  )
  say(console_table(rows))
  say(f"results: {workdir / 'results.json'}\nreport: {path}")
