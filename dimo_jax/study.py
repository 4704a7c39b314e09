"""Published ablations on digits: `python -m dimo_jax.study --workdir=runs/study`.

Runs the variants of `configs/sweeps/digits.py` over its training seeds, one row of
docs/reproduction.jsonl each, and renders the tables of docs/reproduction.md from the rows. What has
a row is not run again, so an interrupted study goes on where it was.
"""

import fcntl
import importlib
import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from configs.sweeps import digits as sweep
from dimo_jax import cli, hooks, prepare, train
from dimo_jax.build import Experiment, build
from dimo_jax.evaluation.protocols import Reference
from dimo_jax.evaluation.report import versions
from dimo_jax.health import RunStopped
from dimo_jax.samplers import Sampler
from dimo_jax.state import NetworkState
from dimo_jax.types import UserError
from dimo_jax.writers import say, write_atomically

_WORKDIR = flags.DEFINE_string("workdir", "runs/study", "Folder of the study's runs.")
_DOCS = flags.DEFINE_string("docs", "docs", "Folder of reproduction.md and reproduction.jsonl.")
_ONLY = flags.DEFINE_string("only", "", "Regular expression: the questions to run; all by default.")
_RENDER = flags.DEFINE_bool("render", False, "Render the tables from the rows; run nothing.")

_METRICS = ("frechet_distance", "precision", "recall", "class_agreement")
# The runs are short: nothing is drawn, and saved only at the end.
_QUIET = {
  "log.pictures_every_steps": 0,
  "log.evaluate_every_steps": 0,
  "log.checkpoint_every_steps": 10**6,
  "log.every_steps": 250,
}

Row = dict[str, Any]


def run_key(preset: str, overrides: Mapping[str, Any], seed: int) -> str:
  """What makes a run: questions that share a setting share its row."""
  return json.dumps([preset, dict(overrides), seed], sort_keys=True)


def _key(row: Row) -> str:
  return run_key(row["preset"], row["overrides"], row["seed"])


def read_rows(path: Path) -> list[Row]:
  """The rows of a study; none where there is no file."""
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def experiment_of(preset: str, overrides: Mapping[str, Any], seed: int) -> Experiment:
  """The built config of one run."""
  name, variant, short = sweep.PRESETS[preset]
  module = importlib.import_module(f"configs.{name}")
  config = module.get_config(variant) if variant else module.get_config()
  config.update_from_flattened_dict({**short, **_QUIET, **overrides, "seed": seed})
  return build(config)


def _evaluate(
  experiment: Experiment, reference: Reference, sampler: Sampler, network: NetworkState
) -> Row:
  """Means of the metrics over the sampling seeds."""
  values: dict[str, list[float]] = {name: [] for name in _METRICS}
  for seed in sweep.SAMPLING_SEEDS:
    experiment.config.evaluation.seed = seed
    row = hooks.evaluate_sampler(experiment, reference, sampler, network)
    for name in _METRICS:
      value = row[name]
      assert value is not None  # only the tokens' entropy may be
      values[name].append(value)
  return {name: statistics.fmean(value) for name, value in values.items()}


def run(preset: str, overrides: Mapping[str, Any], seed: int, workdir: Path) -> Row:
  """Distils and evaluates one variant; its teacher is trained once for all of a preset's runs."""
  experiment = experiment_of(preset, overrides, seed)
  shared = workdir / f"{sweep.PRESETS[preset].config}_{seed}"
  shared.mkdir(parents=True, exist_ok=True)
  with open(shared / "lock", "a") as lock:  # another process may want the same teacher
    fcntl.flock(lock, fcntl.LOCK_EX)
    tokenizer_params = prepare.fit_tokenizer(experiment, shared)
    reference = prepare.fit_classifier(experiment, shared)
    teacher_params, tokenizer_params = train.train_teacher(experiment, shared, tokenizer_params)
  assert reference is not None  # the presets have a protocol
  row: Row = {"preset": preset, "overrides": dict(overrides), "seed": seed}
  directory = shared / re.sub(r"\W+", "_", f"{preset}_{json.dumps(dict(overrides))}").strip("_")
  try:
    state = train.distill(experiment, directory, teacher_params, tokenizer_params, reference)
  except RunStopped as stopped:
    return row | {"stopped": str(stopped).partition(". ")[0]}
  student = hooks.sampling_network(experiment, state.ema_params, tokenizer_params)
  sampler = experiment.student_sampler.at(int(state.clock))
  row["student"] = _evaluate(experiment, reference, sampler, student)
  if not overrides:
    teacher = hooks.sampling_network(experiment, teacher_params, tokenizer_params)
    steps = experiment.decoding.num_steps
    row["teacher"] = {"steps": steps} | _evaluate(
      experiment, reference, experiment.decoding, teacher
    )
  return row | {"generator_updates": experiment.config.train.num_steps, "versions": versions()}


def run_all(rows_path: Path, workdir: Path, only: str) -> None:
  """Every run that has no row yet, one seed after the other."""
  questions = [q for name, q in sweep.QUESTIONS.items() if re.search(only, name)]
  if not questions:
    raise UserError(f"--only={only!r} matches none of {', '.join(sweep.QUESTIONS)}")
  runs = {
    run_key(question.preset, overrides, seed): (question.preset, overrides, seed)
    for seed in sweep.SEEDS
    for question in questions
    for overrides in question.variants.values()
  }
  for number, (key, arguments) in enumerate(runs.items(), 1):
    if key in {_key(row) for row in read_rows(rows_path)}:
      continue
    say(f"study: run {number} of {len(runs)}: {key}")
    row = run(*arguments, workdir)
    with open(rows_path, "a", encoding="utf-8") as stream:
      stream.write(json.dumps(row) + "\n")
    say(json.dumps(row.get("student", row)))


def _spread(values: list[float]) -> str:
  mean = statistics.fmean(values)
  return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def table(question: sweep.Question, rows: list[Row]) -> str:
  """One question's rows as a Markdown table: means and standard deviations over the seeds."""
  by_key = {_key(row): row for row in rows}
  lines = [
    "| | Fréchet distance | each seed | recall | class agreement |",
    "| --- | --- | --- | --- | --- |",
  ]
  for label, overrides in question.variants.items():
    found = [by_key.get(run_key(question.preset, overrides, seed)) for seed in sweep.SEEDS]
    done = [row["student"] for row in found if row and "student" in row]
    each = ", ".join(
      "not run"
      if row is None
      else f"{row['student']['frechet_distance']:.2f}"
      if "student" in row
      else "stopped"
      for row in found
    )
    cells = ["-"] * 3
    if done:
      columns = ("frechet_distance", "recall", "class_agreement")
      cells = [_spread([student[name] for student in done]) for name in columns]
    lines.append(f"| {label} | {cells[0]} | {each} | {cells[1]} | {cells[2]} |")
  stopped = sorted({row["stopped"] for row in rows if "stopped" in row and _asked(question, row)})
  return "\n".join([*lines, *(f"\nStopped by the health check: {text}." for text in stopped)])


def _asked(question: sweep.Question, row: Row) -> bool:
  return row["preset"] == question.preset and row["overrides"] in question.variants.values()


def render(text: str, rows: list[Row]) -> str:
  """The page with the part between each question's markers replaced.

  Raises:
    UserError: a question has no markers.
  """
  for name, question in sweep.QUESTIONS.items():
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
      raise UserError(f"reproduction.md has no {begin} ... {end}")
    head, _, rest = text.partition(begin)
    tail = rest.partition(end)[2]
    body = f"\n*Published.* {question.claim}\n\n{table(question, rows)}\n"
    text = f"{head}{begin}{body}{end}{tail}"
  return text


def dispatch() -> None:
  """Runs and renders what the flags say."""
  docs = Path(_DOCS.value)
  rows_path, page = docs / "reproduction.jsonl", docs / "reproduction.md"
  if not page.exists():
    raise UserError(f"--docs={_DOCS.value!r} holds no reproduction.md")
  if not _RENDER.value:
    run_all(rows_path, Path(_WORKDIR.value), _ONLY.value)
  write_atomically(page, render(page.read_text(encoding="utf-8"), read_rows(rows_path)))


if __name__ == "__main__":
  cli.run(dispatch, needs_config=False)
