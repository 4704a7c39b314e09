"""Evaluation of a workdir's own protocol, and the command line of published ones.

python -m dimo_jax.evaluate JOB --help
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from absl import logging

from dimo_jax import cli, generators, judges, prepare, train, watch
from dimo_jax.build import Experiment
from dimo_jax.checkpoint import params_hash
from dimo_jax.data.sources import load_source
from dimo_jax.distributed import on_first
from dimo_jax.evaluation import compare, jobs
from dimo_jax.evaluation.generation import decode_images, encode_images
from dimo_jax.evaluation.image_sets import SourceImages, open_images
from dimo_jax.evaluation.inception import Inception
from dimo_jax.evaluation.protocols import PROTOCOLS, Reference
from dimo_jax.evaluation.published import PUBLISHED, PublishedProtocol
from dimo_jax.evaluation.references import read_reference
from dimo_jax.evaluation.report import console_table, versions, write_report
from dimo_jax.hooks import evaluate_sampler, sampling_network
from dimo_jax.recipe import CONFIG_FILE, parse_field
from dimo_jax.remote import local_path
from dimo_jax.run_judge import RunJudge
from dimo_jax.samplers import Sampler, plain_settings
from dimo_jax.sharding import make_mesh
from dimo_jax.state import DistillState, NetworkState
from dimo_jax.types import UserError, choose
from dimo_jax.writers import read_metrics, say, write_atomically


def evaluate_workdir(experiment: Experiment, workdir: Path, *, checkpoint: str = "last") -> None:
  """Evaluates a trained workdir, its last or best student or that of a step; without a protocol it
  says so.
  """
  name = experiment.config.evaluation.protocol
  if experiment.protocol is None and experiment.published is None:
    lacks = "" if name == "none" else ", and neither evaluation.inception nor .statistics given"
    say(f"evaluation: off (evaluation.protocol={name!r}{lacks})")
    pictures = workdir / "distill" / "pictures"
    if pictures.is_dir():
      own = "".join(f" --import={file}" for file in cli.IMPORTED)
      more = f"python -m dimo_jax.main --workdir={workdir} --mode=sample{own}"
      say(f"pictures: {pictures}; more: {more}")
    return
  judge = RunJudge.of(experiment, workdir)
  teacher, state = train.restore(experiment, workdir, checkpoint=checkpoint)
  if judge is not None:
    judge.finish(teacher, state)
    return
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

  The floor is real against real: the test split against the training split; above it, what a
  tokenizer makes of the test split.
  """
  config = experiment.config
  test, labels = prepare.load_arrays(experiment.source("test"))
  rows: list[dict[str, Any]] = []

  def floor(model: str, sampler: str, images: Any, *tokens: Any) -> None:
    row = reference.evaluate(images, labels, *tokens)
    said = {"model": model, "sampler": sampler, "steps": 0, "images_per_second": None}
    rows.append(said | row)
    say(f"evaluation: {model}, {sampler}: {row['frechet_distance']:.4f}")

  codebook_size = experiment.tokenizer.codebook_size
  if codebook_size:
    args = experiment.tokenizer, teacher.autoencoder
    tokens = encode_images(*args, test, experiment.mesh)
    floor("real", "test split", test, tokens, codebook_size)
    decoded = decode_images(*args, tokens, experiment.mesh)
    floor("tokenizer", "test split, reconstructed", decoded, tokens, codebook_size)
  else:
    floor("real", "test split", test)

  student = sampling_network(experiment, state.ema_params, teacher.autoencoder)
  runs: list[tuple[str, Sampler, NetworkState]] = [
    ("teacher", dataclasses.replace(experiment.decoding, num_steps=steps), teacher)
    for steps in config.evaluation.teacher_steps
  ]
  target = experiment.objective.target(experiment.decoding)
  if target is not None:
    runs.append(("teacher", target, teacher))
  runs.append(("student", experiment.student_sampler.at(int(state.clock)), student))
  step = int(state.generator.step)
  sources = {  # paths are relative to the workdir, which may move
    "teacher": {"checkpoint": config.teacher.path or "teacher"},
    "student": {"checkpoint": f"distill/checkpoints/{step}", "step": step},
  }
  for model, sampler, network in runs:
    row: dict[str, Any] = {**evaluate_sampler(experiment, reference, sampler, network)}
    steps = sampler.num_steps
    said = {"model": model, "sampler": sampler.name, "steps": steps, **sources[model]}
    said |= {"weights_sha256": params_hash(network.all_params)}
    rows.append(said | row | {"sampler_settings": plain_settings(sampler)})
    say(f"evaluation: {model}, {sampler.name}, steps={steps}: {row['frechet_distance']:.4f}")
  for row in rows:
    row["protocol"] = reference.protocol.name
    row["seed"] = config.seed
    row["sampling_seed"] = config.evaluation.seed
    row["classifier_accuracy"] = reference.classifier.test_accuracy
    row["classifier_sha256"] = reference.classifier.weight_hash()
    row["statistics_sha256"] = reference.sha256
    row["versions"] = versions()
  on_first(lambda: _write(experiment, workdir, rows, reference))
  return rows


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
  if experiment.tokenizer.codebook_size:
    notes.append("Row 'tokenizer' is the test split encoded and decoded, with no model between.")
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


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise UserError(message)


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog="python -m dimo_jax.evaluate", allow_abbrev=False, epilog=cli.IMPORT_HELP)
  kinds = parser.add_subparsers(dest="job", required=True, metavar="JOB")

  def job(name: str, run: Callable[..., None], text: str) -> argparse.ArgumentParser:
    sub = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
    sub.set_defaults(run=run, job=name)
    return sub

  def network(sub: argparse.ArgumentParser, *own: str) -> None:
    sub.add_argument("--protocol", required=True, help=", ".join([*PUBLISHED, *own]))
    sub.add_argument("--inception", default="", help="weights: a path, gs://... or hf://...")
    sub.add_argument("--out", required=True, type=Path, help="file that the result goes to")
    sub.add_argument(
      "--batch_size", type=int, default=0, help="default: 32 for each device, or the training's"
    )

  def judged(sub: argparse.ArgumentParser, *own: str) -> None:
    network(sub, *own)
    sub.add_argument("--statistics", default="", help=".npz to compare with: a path, gs://, hf://")
    sub.add_argument("--num_images", type=int, default=0, help="another number; result says so")

  def generated(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", help="export, workdir, teacher, or published weights")
    sub.add_argument(
      "--field", action="append", default=[], help="as in sampling.temperature=7; may be repeated"
    )
    sub.add_argument("--tokenizer", default="", help="decoder of tokens, where it holds none")
    sub.add_argument("--classifier_from", default="", help="own protocols: the workdir with it")
    sub.add_argument("--per_class", action="store_true", help="own protocols: also by class")
    judged(sub, *PROTOCOLS)

  def which(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
      "--checkpoint", dest="which", default="last", help="of a workdir: last, best or a step"
    )

  sub = job("images", _images, "Evaluates a folder of images, or an .npz of them.")
  sub.add_argument("images", help="folder or .npz file")
  judged(sub)
  sub = job("stats", _stats, "Makes a statistics file of real images.")
  sub.add_argument("--source", required=True, help="folder, npz or tfds")
  sub.add_argument("--path", default="", help="folder, .npz file, or tfds' data_dir")
  sub.add_argument("--tfds_name", default="", help="tfds: the data set")
  sub.add_argument("--split", default="train", help="tfds: train or test")
  sub.add_argument("--crop", action="store_true", help="scale and crop to the protocol's size")
  network(sub)

  sub = job("checkpoint", _checkpoint, "Samples a network and evaluates the images.")
  sub.add_argument("--steps", default="", help="of a teacher, as in 4,8,16")
  which(sub)
  generated(sub)
  sub = job("sweep", _sweep, "Evaluates a network over values of a sampling setting.")
  which(sub)
  sub.add_argument("--values", required=True, help="such as 1,3,5,7, of the --field without one")
  generated(sub)
  sub = job("watch", _watch, "Follows a training and evaluates each new checkpoint once.")
  sub.add_argument("--every_seconds", type=float, default=60.0, help="between two looks")
  sub.add_argument(
    "--until", type=int, help="ends once this step is done; 0: never; else the training's last"
  )
  generated(sub)
  sub = job("compare", _compare, "Writes one page that compares results.")
  sub.add_argument("results", nargs="+", help="workdirs with results.json, or files of results")
  sub.add_argument("--out", default="compare.html", type=Path)
  return parser


def _published(arguments: argparse.Namespace) -> jobs.Judge:
  protocol = choose(PUBLISHED, arguments.protocol, "protocol")
  if arguments.num_images:
    protocol = protocol.with_images(arguments.num_images)
  if not arguments.statistics:
    raise UserError(f"statistics='' must be {protocol.statistics}, with protocol={protocol.name!r}")
  reference = read_reference(local_path(arguments.statistics))
  inception, mesh, batch_size = _network(arguments)
  return jobs.Judge(protocol, reference, inception, mesh, batch_size)


def _network(arguments: argparse.Namespace) -> tuple[Inception, Any, int]:
  if not arguments.inception:
    raise UserError("inception='' must be the weights, pt_inception-2015-12-05-6726825d.pth")
  mesh = make_mesh()
  inception = Inception.load(local_path(arguments.inception))
  return inception, mesh, arguments.batch_size or 32 * mesh.size


def _judge(arguments: argparse.Namespace) -> judges.AnyJudge:
  """What evaluates a generator under any protocol."""
  choose({**PUBLISHED, **PROTOCOLS}, arguments.protocol, "protocol")
  if arguments.protocol not in PROTOCOLS:
    if arguments.per_class:
      raise UserError(
        f"--per_class is not for protocol={arguments.protocol!r}: a class has fewer images than"
        " Inception has features"
      )
    if arguments.classifier_from:
      raise UserError(f"--classifier_from is not for protocol={arguments.protocol!r}")
    return _published(arguments)
  workdir = _own_workdir(arguments)
  if not (workdir / prepare.CLASSIFIER_FILE).exists():
    if (workdir / CONFIG_FILE).exists():
      judges.check_own_protocol(arguments.protocol, workdir)
    raise UserError(
      f"protocol={arguments.protocol!r} needs a run's classifier, and {str(workdir)!r} has none:"
      " name the workdir of a run with that protocol by --classifier_from"
    )
  return judges.own_judge(
    arguments.protocol, workdir, arguments.batch_size, per_class=arguments.per_class
  )


def _own_workdir(arguments: argparse.Namespace) -> Path:
  """The workdir whose classifier is the network of an own protocol."""
  if arguments.num_images or arguments.statistics or arguments.inception:
    raise UserError(
      f"protocol={arguments.protocol!r} has its own number of images, statistics and network"
    )
  return Path(arguments.classifier_from or arguments.checkpoint)


def _not_own(arguments: argparse.Namespace) -> PublishedProtocol:
  """The published protocol of a job that takes no other."""
  if arguments.protocol in PROTOCOLS:
    raise UserError(
      f"protocol={arguments.protocol!r} is for checkpoint, sweep and watch, whose run has its"
      f" network; {arguments.job} takes one of {', '.join(PUBLISHED)}"
    )
  return choose(PUBLISHED, arguments.protocol, "protocol")


def _images(arguments: argparse.Namespace) -> None:
  _not_own(arguments)
  images = open_images(arguments.images)
  jobs.evaluate_images(_published(arguments), images, arguments.out)


def _stats(arguments: argparse.Namespace) -> None:
  protocol = _not_own(arguments)
  choose(dict.fromkeys(("folder", "npz", "tfds")), arguments.source, "source")
  size = protocol.image_size if arguments.crop else 0
  if arguments.source == "tfds":
    source = load_source(
      "tfds", arguments.split, arguments.path, image_size=size, tfds_name=arguments.tfds_name
    )
    images: Any = SourceImages(source, f"{arguments.tfds_name} {arguments.split}")
  else:
    if Path(arguments.path).is_dir() != (arguments.source == "folder"):
      raise UserError(f"path={arguments.path!r} is no {arguments.source}")
    if size and arguments.source == "npz":
      raise UserError("--crop is for folders and tfds; images of an .npz are taken as they are")
    images = open_images(arguments.path, size)
  inception, mesh, batch_size = _network(arguments)
  jobs.make_statistics(images, protocol, inception, mesh, arguments.out, batch_size=batch_size)


def _fields(settings: list[str]) -> dict[str, Any]:
  return dict(map(parse_field, settings))


def _load(arguments: argparse.Namespace, fields: Mapping[str, Any]) -> generators.AnyGenerator:
  return generators.load_generator(
    arguments.checkpoint, which=arguments.which, tokenizer=arguments.tokenizer, fields=fields
  )


def _checkpoint(arguments: argparse.Namespace) -> None:
  generator = _load(arguments, _fields(arguments.field))
  judge = _judge(arguments)
  steps = _numbers("steps", arguments.steps, int)
  generators = [generator.with_steps(number) for number in steps] or [generator]
  for taken in generators:
    judges.evaluate_once(judge, taken, arguments.out, taken.source)


def _sweep(arguments: argparse.Namespace) -> None:
  values = _numbers("values", arguments.values, float)
  if not values:
    raise UserError("values='' must be numbers such as 1,3,5")
  swept = [field for field in arguments.field if "=" not in field]
  if len(swept) != 1:
    raise UserError(
      f"--field: {', '.join(swept) or 'none'} without a value, where --values are of one:"
      " --field=sampling.temperature --values=1,3,5"
    )
  fixed = _fields([field for field in arguments.field if "=" in field])

  def load(value: float) -> generators.AnyGenerator:
    return _load(arguments, {**fixed, swept[0]: value})

  # A field that is mistyped, or means nothing to the network, shows before anything is computed.
  settings = [load(value).settings for value in sorted(set(values))[:2]]
  if len(settings) == 2 and settings[0] == settings[1]:
    raise UserError(f"--field={swept[0]} changes nothing in how {arguments.checkpoint} is sampled")
  judges.sweep(_judge(arguments), load, swept[0], values, arguments.out)


def _watch(arguments: argparse.Namespace) -> None:
  workdir, fields = Path(arguments.checkpoint), _fields(arguments.field)
  period = arguments.every_seconds
  watch.check_followed(workdir, fields)
  if arguments.protocol in PROTOCOLS and _own_workdir(arguments) == workdir:
    watch.wait_for_classifier(arguments.protocol, workdir, fields, every_seconds=period)
  watch.watch(
    _judge(arguments),
    workdir,
    arguments.out,
    every_seconds=period,
    until=arguments.until,
    tokenizer=arguments.tokenizer,
    fields=fields,
  )


def _compare(arguments: argparse.Namespace) -> None:
  compare.write_comparison(arguments.out, compare.load_all(arguments.results))
  say(f"comparison: {arguments.out}")


def _numbers(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
  try:
    return [kind(part) for part in text.split(",")] if text else []
  except ValueError as error:
    raise UserError(f"{name}={text!r} must be numbers such as 4,8,16") from error


def _check_out(out: Path) -> None:
  """Raises UserError where a file cannot be written."""
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent):
      pass
  except OSError as error:
    raise UserError(f"--out={out} cannot be written: {error.strerror}") from error
  if out.is_dir():
    raise UserError(f"--out={out} is a folder; it must be a file")


def main() -> None:
  """Runs the command line."""

  def command() -> None:
    arguments = _parser().parse_args(sys.argv[1:])
    logging.set_verbosity(logging.FATAL)  # orbax logs errors before it raises them
    _check_out(arguments.out)
    arguments.run(arguments)

  cli.guarded(command)


if __name__ == "__main__":
  main()
