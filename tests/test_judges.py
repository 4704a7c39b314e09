"""Evaluations, sweeps and the command line, on a tiny trained workdir."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from dimo_jax import artifacts, evaluate, generators, judges, watch
from dimo_jax.checkpoint import params_hash
from dimo_jax.evaluation import report, scoring
from dimo_jax.preemption import Preempted
from dimo_jax.types import UserError
from tests import commands


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return commands.reference(tmp_path_factory)


def run(*arguments):
  """A command without the process around it."""
  parsed = evaluate._parser().parse_args([str(argument) for argument in arguments])
  parsed.run(parsed)


@pytest.fixture(scope="module")
def checkpoint_row(workdir, tmp_path_factory):
  out = tmp_path_factory.mktemp("out") / "results.jsonl"
  run("checkpoint", workdir, "--protocol=debug", f"--out={out}", "--per_class")
  (row,) = scoring.read_rows(out)
  return row


def test_a_checkpoint_under_its_own_protocol(workdir, checkpoint_row):
  assert checkpoint_row["protocol"] == "debug" and checkpoint_row["model"] == "student"
  assert checkpoint_row["step"] == commands.NUM_STEPS and checkpoint_row["num_images"] == 96
  (student,) = [row for row in commands.results(workdir) if row["model"] == "student"]
  for name in ("frechet_distance", "class_agreement", "precision", "recall", "nearest_distance"):
    assert checkpoint_row[name] == pytest.approx(student[name], rel=1e-4), name
  assert checkpoint_row["classifier_sha256"] == student["classifier_sha256"]
  assert set(checkpoint_row["per_class"]) == {str(c) for c in range(10)}
  assert min(checkpoint_row["per_class"].values()) > 0
  assert checkpoint_row["sampler"]["r_init"] == 0.6 and checkpoint_row["steps"] == 1
  for name in ("weights_sha256", "step", "statistics_sha256", "density", "coverage"):
    assert checkpoint_row[name] == student[name], name
  assert student["sampler_settings"] == checkpoint_row["sampler"]
  assert checkpoint_row["tokenizer_sha256"] == params_hash(
    artifacts.load(workdir).parts.weights["tokenizer"]
  )
  assert student["checkpoint"] == f"distill/checkpoints/{commands.NUM_STEPS}"
  assert student["versions"]["device"] == "1 x cpu (cpu)"
  assert student["versions"].keys() == report.versions().keys()


@dataclasses.dataclass(frozen=True)
class Recorded:
  """A generator of given images; levels where they are integers."""

  images: np.ndarray
  name = "recorded"
  image_shape, num_classes, rounding = (8, 8, 1), 10, None
  settings = {"name": "recorded", "steps": 1}  # noqa: RUF012

  def batch(self, labels, seed, start):
    return np.resize(self.images[start : start + len(labels)], (len(labels), 8, 8, 1))


def test_whole_batches_are_made_and_the_first_images_judged(workdir, tmp_path, capsys):
  judge = judges.own_judge("debug", workdir, 40)  # three batches for 96 images
  labels = judge.reference.protocol.labels(judge.labels)
  levels = np.random.default_rng(0).integers(0, 256, (96, 8, 8, 1), np.uint8)
  floats = (levels / 127.5 - 1).astype(np.float32)
  expected = judge.reference.evaluate(floats, labels)
  for images in (floats, levels):
    row = judge.evaluate(Recorded(images), tmp_path / "results.jsonl", {})
    assert {name: row[name] for name in expected} == expected
    assert f"recorded: debug: Fréchet distance {row['frechet_distance']:.4g}, " in (
      capsys.readouterr().out
    )


def test_a_row_without_its_classes_is_not_enough(workdir, tmp_path):
  out, judge = tmp_path / "results.jsonl", judges.own_judge("debug", workdir, 96)
  generator = generators.load_generator(str(workdir))
  for per_class in (False, False, True, True, False):
    judge = dataclasses.replace(judge, per_class=per_class)
    row = judges.evaluate_once(judge, generator, out, {})
    assert not per_class or len(row["per_class"]) == 10
  assert ["per_class" in row for row in scoring.read_rows(out)] == [False, True]
  with pytest.raises(UserError, match=r"has 3 classes, the classifier of .* has 10"):
    judges.evaluate_once(judge, dataclasses.replace(generator, num_classes=3), out, {})


def test_a_teacher_over_steps(workdir, tmp_path):
  out = tmp_path / "results.jsonl"
  options = ("--protocol=debug", f"--out={out}", f"--classifier_from={workdir}", "--steps=1,2")
  run("checkpoint", workdir / "teacher", *options)
  rows = scoring.read_rows(out)
  assert [(row["model"], row["steps"]) for row in rows] == [("teacher", 1), ("teacher", 2)]
  assert rows[0]["frechet_distance"] != rows[1]["frechet_distance"]
  assert rows[0]["weights_sha256"] == rows[1]["weights_sha256"]


@pytest.mark.ci
def test_a_sweep_finds_its_best_point(workdir, checkpoint_row, tmp_path):
  out, own = tmp_path / "sweep.jsonl", checkpoint_row["sampler"]["temperature"]
  options = ("--protocol=debug", f"--out={out}")
  run("sweep", workdir, *options, "--field=sampling.temperature", f"--values={own},9")
  rows = scoring.read_rows(out)
  assert [row["sweep"]["value"] for row in rows] == [own, 9.0]
  assert [row["sampler"]["temperature"] for row in rows] == [own, 9.0]
  distances = [row["frechet_distance"] for row in rows]
  assert distances[0] != distances[1]
  assert distances[0] == pytest.approx(checkpoint_row["frechet_distance"], rel=1e-6)
  run("checkpoint", workdir, *options, "--field=sampling.temperature=9")
  row = scoring.read_rows(out)[-1]
  assert row["sampler"]["temperature"] == 9 and row["frechet_distance"] == distances[1]
  page = (tmp_path / "sweep.jsonl.html").read_text()
  assert f"<b>{[own, 9][int(np.argmin(distances))]:g}</b>" in page and page.count("<svg") >= 2


@pytest.mark.ci
def test_what_has_its_row_is_not_computed_again(workdir, tmp_path, monkeypatch):
  out = tmp_path / "results.jsonl"
  options = ("--protocol=debug", f"--out={out}", "--field=sampling.temperature")
  run("sweep", workdir, *options, "--values=2")
  run("sweep", workdir, *options, "--values=2,3")
  assert [row["sweep"]["value"] for row in scoring.read_rows(out)] == [2, 3]
  run("sweep", workdir, *options, "--values=2,3", "--batch_size=32")  # other draws
  assert [row["sweep"]["value"] for row in scoring.read_rows(out)] == [2, 3, 2, 3]
  run("checkpoint", workdir, *options[:2])
  run("checkpoint", workdir, *options[:2])
  run("checkpoint", workdir, *options[:2], "--checkpoint=best")
  rows = scoring.read_rows(out)[4:]
  steps = commands.checkpoint_steps(workdir / "distill")
  assert [row["step"] for row in rows] in ([steps[-1]], [steps[-1], steps[-2]])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ("checkpoint W --protocol=digits --out=x", "was trained with evaluation.protocol='debug'"),
    ("checkpoint W --protocol=fid --out=x", "protocol='fid' is unknown"),
    ("checkpoint W --protocol=edm-imagenet64 --out=x", "statistics='' must be imagenet-64x64.npz"),
    ("checkpoint W --protocol=edm-imagenet64 --out=x --per_class", "--per_class is not for"),
    ("checkpoint W --protocol=debug --out=x --num_images=5", "has its own number of images"),
    ("checkpoint W --protocol=debug --out=x --steps=a", "steps='a' must be numbers"),
    ("checkpoint W --protocol=debug --out=x --steps=4", "steps=4 is for teachers"),
    ("checkpoint none --protocol=debug --out=x", "'none' does not exist"),
    ("checkpoint W --protocol=debug --out=x --field=sampling.temp=1", "sampling.temp=1: no such"),
    ("sweep W --protocol=debug --out=x --field=sampling.temp --values=1", "no such field"),
    ("sweep W --protocol=debug --out=x --field=sampling.temperature --values=", "values=''"),
    ("sweep W --protocol=debug --out=x --field=sampling.temperature=3 --values=1", "--field: none"),
    ("sweep W --protocol=debug --out=x --values=1", "--field: none without a value"),
    (
      "sweep W --protocol=debug --out=x --field=train.ema_decay --values=0.5,0.9",
      "--field=train.ema_decay changes nothing in how",
    ),
    ("watch W --protocol=debug --out=x --field=sampling.temp=1", "sampling.temp=1: no such field"),
    ("watch none --protocol=debug --out=x --classifier_from=W", "'none' is no folder; watch"),
    (
      "watch W --protocol=debug --out=x --classifier_from=none",
      "'none' has none: name the workdir",
    ),
    ("watch W --protocol=digits --out=x", "was trained with evaluation.protocol='debug'"),
    ("stats --source=web --path=W --protocol=edm-imagenet64 --out=x", "source='web' is unknown"),
    ("stats --source=npz --path=W --protocol=edm-imagenet64 --out=x", "is no npz"),
    ("images W --protocol=edm-imagenet64", "--out"),
    ("images W --protocol=debug --out=x", "protocol='debug' is for checkpoint, sweep and watch"),
    ("images W --protocol=fid --out=x", "protocol='fid' is unknown"),
    (
      "checkpoint W --protocol=debug --classifier_from=nowhere --out=x",
      "'nowhere' has none: name the workdir of a run with that protocol by --classifier_from",
    ),
    ("checkpoint W --protocol=debug --checkpoint=first --out=x", "must be last, best or a step"),
    ("nothing", "invalid choice: 'nothing'"),
  ],
)
def test_bad_commands_are_one_line(workdir, arguments, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  words = [word.replace("W", str(workdir)) for word in arguments.split()]
  with pytest.raises(UserError) as error:
    run(*words)
  assert message in str(error.value) and "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_a_watch_of_a_run_waits_for_its_classifier(workdir, tmp_path, monkeypatch):
  waited = []

  def wait(protocol, folder, fields, *, every_seconds):
    waited.append((protocol, folder, fields, every_seconds))
    raise Preempted

  monkeypatch.setattr(watch, "wait_for_classifier", wait)
  (tmp_path / "empty").mkdir()
  with pytest.raises(Preempted):
    run("watch", tmp_path / "empty", "--protocol=debug", "--out=x", "--every_seconds=2")
  assert waited == [("debug", tmp_path / "empty", {}, 2.0)]


@pytest.mark.parametrize("out", ["file/page.html", "."])
def test_what_cannot_be_written_is_said_first(out, tmp_path):
  (tmp_path / "file").touch()
  command = [sys.executable, "-m", "dimo_jax.evaluate", "compare", "nowhere", f"--out={out}"]
  result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
  assert result.returncode == 2
  assert result.stderr.startswith(f"error: --out={out} ") and result.stderr.count("\n") == 1
