"""A watch beside a tiny training: each checkpoint once, whatever happens to its folder."""

import dataclasses
import json
import shutil
import time

import pytest

from dimo_jax import watch
from dimo_jax.convert.files import MANIFEST
from dimo_jax.evaluation import scoring
from dimo_jax.generators import load_generator
from dimo_jax.judges import OwnJudge, own_judge
from dimo_jax.prepare import CLASSIFIER_FILE
from dimo_jax.recipe import CONFIG_FILE, LOCK_FILE
from dimo_jax.types import UserError
from tests import commands


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return commands.reference(tmp_path_factory)


def counted(judge, fails_at=None):
  """(the judge, the steps that it is asked to evaluate)."""
  seen = []

  class Counted(OwnJudge):
    def evaluate(self, generator, out, source):
      seen.append(source["step"])
      if source["step"] == fails_at:
        raise UserError("images hold NaN")
      return super().evaluate(generator, out, source)

  fields = dataclasses.fields(OwnJudge)
  return Counted(**{field.name: getattr(judge, field.name) for field in fields}), seen


def test_a_watch_goes_on_after_a_checkpoint_that_cannot_be_evaluated(workdir, tmp_path, capsys):
  training, out = tmp_path / "training", tmp_path / "results.jsonl"
  shutil.copytree(workdir, training)
  steps = commands.checkpoint_steps(training / "distill")
  judge, seen = counted(own_judge("debug", training), fails_at=steps[0])
  watch.watch(judge, training, out, every_seconds=0.0)  # to the training's last step
  assert seen == steps and [row["step"] for row in scoring.read_rows(out)] == steps[1:]
  said = capsys.readouterr().out
  assert f"checkpoint {steps[0]} is skipped: images hold NaN" in said
  best = min(scoring.read_rows(out), key=lambda row: row["frechet_distance"])["step"]
  ended = f"ends after step {steps[-1]}; the best of {len(steps) - 1} is step {best}, kept in "
  kept = tmp_path / "results.jsonl.checkpoints" / str(best)
  assert said.splitlines()[-1].partition(ended)[2] == str(kept) and kept.is_dir()
  for step in steps[1:]:
    shutil.rmtree(training / "distill" / "checkpoints" / str(step))
  watch.watch(judge, training, tmp_path / "none.jsonl", every_seconds=0.0, until=1)
  said = capsys.readouterr().out.splitlines()[-1]
  assert said == f"watch: ends after step {steps[0]}; no checkpoint could be evaluated"


def test_a_watch_tells_a_training_that_begins_anew(workdir, tmp_path):
  training, out = tmp_path / "training", tmp_path / "results.jsonl"
  shutil.copytree(workdir, training)
  steps = commands.checkpoint_steps(training / "distill")
  record, seen = training / "distill" / "record.json", []

  class Restarted(OwnJudge):
    def evaluate(self, generator, out, source):
      seen.append(source["step"])
      if len(seen) == 1:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"seed": 1}))
        raise UserError("images hold NaN")
      return super().evaluate(generator, out, source)

  own = own_judge("debug", training)
  judge = Restarted(**{field.name: getattr(own, field.name) for field in dataclasses.fields(own)})
  watch.watch(judge, training, out, every_seconds=0.0)
  assert seen == [steps[0], *steps]
  assert {row["record_sha256"] for row in scoring.read_rows(out)} == {watch._record_hash(training)}


@pytest.mark.ci
def test_a_watch_looks_again_where_files_vanish_as_they_are_copied(workdir, tmp_path, monkeypatch):
  training, out = tmp_path / "training", tmp_path / "results.jsonl"
  shutil.copytree(workdir, training)
  steps = commands.checkpoint_steps(training / "distill")
  judge, seen = counted(own_judge("debug", training))
  copytree, checkpoint = shutil.copytree, training / "distill" / "checkpoints" / str(steps[0])
  taken = []

  def vanishing(source, target, *options):
    copytree(source, target, *options)
    if source == checkpoint and not taken:  # a file that was deleted before it was copied
      taken.append(next(path for path in target.rglob("*") if path.is_file()))
      taken[0].unlink()

  monkeypatch.setattr(shutil, "copytree", vanishing)
  watch.watch(judge, training, out, every_seconds=0.0, until=steps[-1])
  assert seen == steps[1:]
  watch.watch(judge, training, out, every_seconds=0.0, until=steps[-1])
  assert seen == [*steps[1:], steps[0]]


def test_a_watch_refuses_what_is_no_training(workdir, tmp_path):
  training, out = tmp_path / "training", tmp_path / "results.jsonl"
  shutil.copytree(workdir, training)
  judge, _ = counted(own_judge("debug", training))
  (training / "distill" / "record.json").unlink()
  with pytest.raises(UserError, match=r"is no training's workdir: it has no record\.json"):
    watch.watch(judge, training, out, every_seconds=0.0, until=1)


def test_a_watch_waits_for_the_classifier(workdir, tmp_path, monkeypatch, capsys):
  parts, missing = [LOCK_FILE, CONFIG_FILE, CLASSIFIER_FILE], tmp_path / "training"
  missing.mkdir()
  asleep = []

  def sleep(seconds):
    asleep.append(seconds)
    (missing / parts[0]).parent.mkdir(exist_ok=True)
    shutil.copy2(workdir / parts[0], missing / parts.pop(0))

  monkeypatch.setattr(time, "sleep", sleep)
  watch.wait_for_classifier("debug", missing, {}, every_seconds=0.5)
  assert asleep == [0.5, 0.5, 0.5] and (missing / CLASSIFIER_FILE).exists()
  assert capsys.readouterr().out.count("which the training makes at its start") == 1


@pytest.mark.parametrize(
  ("files", "fields", "message"),
  [
    (None, {}, "' is no folder; watch follows a training's workdir"),
    ([MANIFEST], {}, "' is an export; watch follows a training's workdir"),
    (["digits"], {}, "' holds other files and no config.json: it is no workdir"),
    ([CONFIG_FILE], {}, "was trained with evaluation.protocol='debug', which can"),
    ([CONFIG_FILE], {"sampling.temp": 1}, "sampling.temp=1: no such field"),
  ],
  ids=["missing", "export", "other", "protocol", "field"],
)
def test_a_watch_does_not_wait_for_what_never_comes(files, fields, message, workdir, tmp_path):
  folder = tmp_path / "run"
  for name in files or []:
    folder.mkdir()
    (folder / name).write_bytes((workdir / CONFIG_FILE).read_bytes())
  with pytest.raises(UserError) as error:
    watch.wait_for_classifier("digits", folder, fields, every_seconds=0.0)
  assert message in str(error.value)
  if "protocol" not in message:
    with pytest.raises(UserError) as error:
      watch.watch(
        own_judge("debug", workdir), folder, tmp_path / "x", every_seconds=0.0, fields=fields
      )
    assert message in str(error.value)


def test_a_copy_of_an_earlier_training_is_made_again(tmp_path):
  training, copy = tmp_path / "training", tmp_path / "copies" / "5"
  (training / "distill" / "checkpoints" / "5").mkdir(parents=True)
  (training / "config.json").write_text("{}")
  for text in ("one", "another"):
    (training / "distill" / "record.json").write_text(text)
    (training / "distill" / "checkpoints" / "5" / "weights").write_text(text)
    assert watch._copy_checkpoint(training, 5, copy)
    assert (copy / "distill" / "checkpoints" / "5" / "weights").read_text() == text
  (training / "distill" / "checkpoints" / "5" / "weights").write_text("not looked at again")
  assert watch._copy_checkpoint(training, 5, copy)
  assert (copy / "distill" / "checkpoints" / "5" / "weights").read_text() == "another"


@pytest.mark.ci
def test_a_watch_evaluates_each_checkpoint_once(workdir, tmp_path):
  training, out = tmp_path / "training", tmp_path / "watch" / "results.jsonl"
  shutil.copytree(workdir, training)
  folder = training / "distill" / "checkpoints"
  steps = commands.checkpoint_steps(training / "distill")
  assert len(steps) > 1
  (folder / f"{steps[-1] + 6}.orbax-checkpoint-tmp").mkdir()  # one that is being written
  damaged = folder / str(steps[-1] - 1)
  shutil.copytree(folder / str(steps[-1]), damaged)
  largest = max(damaged.rglob("*"), key=lambda path: path.stat().st_size)
  largest.write_bytes(b"x" * largest.stat().st_size)
  before = {p: p.stat().st_mtime_ns for p in training.rglob("*") if p.is_file()}
  judge, seen = counted(own_judge("debug", training))

  def look(until, **options):
    watch.watch(judge, training, out, every_seconds=0.0, until=until, **options)

  shutil.move(folder / str(steps[-1]), tmp_path / "later")
  look(steps[-2])
  assert seen == steps[:-1]
  shutil.move(tmp_path / "later", folder / str(steps[-1]))
  look(steps[-1])
  assert seen == steps
  look(steps[-1])  # after a restart
  assert seen == steps

  rows = scoring.read_rows(out)
  assert [row["step"] for row in rows] == steps
  assert {row["checkpoint"] for row in rows} == {str(training)}
  best = min(rows, key=lambda row: row["frechet_distance"])
  record = json.loads((training / watch.BEST_FILE).read_text())
  assert record["step"] == best["step"] and record["distance"] == best["frechet_distance"]
  after = {p: p.stat().st_mtime_ns for p in training.rglob("*") if p.is_file()}
  del after[training / watch.BEST_FILE]
  assert after == before  # nothing else was written in the training's folder
  left = {path.name for path in (out.parent / "results.jsonl.checkpoints").iterdir()}
  assert left - {damaged.name} == {str(best["step"])}
  again = load_generator(record["copy"])
  assert again.source["step"] == best["step"]

  look(steps[-1], fields={"sampling.temperature": 0.5})  # other rows of the same checkpoints
  assert seen == steps * 2
  rows = scoring.read_rows(out)[len(steps) :]
  assert {row["sampler"]["temperature"] for row in rows} == {0.5}

  other, also_seen = counted(dataclasses.replace(judge, seed=judge.seed + 1))
  later = {"every_seconds": 0.0, "until": steps[0]}
  watch.watch(other, training, out, **later)  # other draws, other rows
  assert also_seen == steps

  record = training / "distill" / "record.json"
  record.write_text(json.dumps(json.loads(record.read_text()) | {"seed": 1}))
  look(steps[-1])  # another training in the same folder
  assert seen == steps * 3
