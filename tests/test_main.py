"""The command line: bad input has one line and an exit code; sampling, evaluation, a full disk."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags, logging
from absl.testing import flagsaver
from PIL import Image
from safetensors.numpy import load_file, save_file

from configs import debug
from dimo_jax import build, checkpoint, cli, evaluate, main, prepare, records, train
from dimo_jax.convert import files
from dimo_jax.health import RunStopped
from dimo_jax.preemption import Preempted
from dimo_jax.types import UserError
from tests import commands

CONFIG = f"--config={commands.ROOT}/configs/debug.py"
FAST_S = 15  # far below the time of any training; most of it is the first import
STAGES = ("tokenizer", "classifier", "teacher", "distill")


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
  """command(*arguments) -> (exit code, stdout, stderr), in this process."""

  def run(*arguments: str) -> tuple[int, str, str]:
    monkeypatch.chdir(commands.ROOT)
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    verbosity = logging.get_verbosity()
    try:
      with flagsaver.flagsaver(), pytest.raises(SystemExit) as raised:
        main.main()
    finally:
      logging.set_verbosity(verbosity)
      for number, handler in handlers.items():
        signal.signal(number, handler)
    out, err = capsys.readouterr()
    return raised.value.code or 0, out, err

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return run


def test_help_lists_the_config_too(command):
  code, out, _ = command("--help")
  assert code == 0 and "--config: Config file" in out


def test_what_is_imported_must_be_a_file(refused):
  refused(["--import=none.py"], ["--import=none.py does not exist"])
  refused(["--import", "configs/own.yaml"], ["--import=configs/own.yaml must be a Python file"])
  refused(["--import"], ["--import: expected one argument"])


@pytest.mark.parametrize("name", ["token", "time", "dimo_jax"])
def test_what_is_imported_is_that_file(refused, tmp_path, name):
  file = tmp_path / f"{name}.py"
  file.write_text("raise AssertionError('it was imported')")
  refused([f"--import={file}"], [f"there is another module '{name}'; rename the file"])


def test_what_is_imported_does_not_hide_what_is_ours(command, tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "path", list(sys.path))
  for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
    monkeypatch.delitem(sys.modules, name)
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "__init__.py").touch()
  (tmp_path / "configs" / "base.py").write_text("raise AssertionError('it was imported')")
  (tmp_path / "helper_of_own_rows.py").write_text("")
  file = tmp_path / "own_rows_of_a_test.py"
  file.write_text("import helper_of_own_rows\nfrom configs import base\n")
  monkeypatch.setattr(cli, "IMPORTED", [])
  code, out, _ = command("--import", str(file), "--help")
  assert [str(file)] == cli.IMPORTED
  assert code == 0 and "--import: Python file" in out
  assert sys.modules["own_rows_of_a_test"].base.__file__ != str(tmp_path / "configs" / "base.py")


@pytest.fixture
def refused(command, tmp_path):
  """refused(*arguments, needles): exit code 2 and one line with all needles, before any compute."""

  def check(arguments, needles, workdir=None, code=cli.BAD_INPUT):
    workdir = tmp_path / "run" if workdir is None else workdir
    began = time.monotonic()
    found, _, err = command(*arguments, f"--workdir={workdir}")
    assert found == code, err
    assert time.monotonic() - began < FAST_S
    assert err.startswith("error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    missing = [needle for needle in needles if needle not in err]
    assert not missing, err
    assert not [stage for stage in STAGES if (workdir / stage).exists()]

  return check


@pytest.mark.parametrize(
  ("argument", "needles"),
  [
    ("--config.dimo.r_int=0.5", ["--config.dimo.r_int=0.5", "'r_init'"]),
    ("--config.dimoo.r_init=0.5", ["--config.dimoo.r_init=0.5", "'dimo'"]),
    ("--config.train.num_steps=abc", ["--config.train.num_steps=abc must be a whole number"]),
    ("--config.dimo.dropout=maybe", ["--config.dimo.dropout=maybe must be True or False"]),
    ("--config.sampling.temperature=hot", ["--config.sampling.temperature=hot must be a number"]),
    ("--config.train=3", ["--config.train", "3"]),
    ("--nope=1", ["nope"]),
    ("stray", ["'stray'", "--"]),
    ("--mode=fly", ["--mode=fly", "train|teacher|evaluate|sample"]),
    ("--config.dimo.r_init=1.7", ["r_init=1.7", "[0, 1]"]),
    ("--config.dimo.r_init_high=0.2", ["dimo.r_init_high=0.2", "r_init=0.6"]),
    ("--config.sampling.top_k=-1", ["sampling.top_k=-1", "0 .. 33"]),
    ("--config.dimo.generator_temperature=0.0", ["dimo.generator_temperature=0.0", "positive"]),
    ("--config.optim.frozen=('nope',)", ["optim.frozen='nope'", "matches no parameter"]),
    ("--config.optim.frozen=('(',)", ["optim.frozen='('", "regular expression"]),
    ("--config.mesh.rules=(('(',0),)", ["mesh.rules='('", "regular expression"]),
    ("--config.mesh.rules=(('^token_embedding$',None),)", ["'^token_embedding$' matches nothing"]),
    (
      "--config.mesh.rules=(('params/last_dense/kernel',-1),)",
      ["splits dimension -1 of generator/", "has 2 dimensions, counted from 0"],
    ),
    ("--config.teacher.decoding.schedule=arcos", ["'arccos'?", "uniform"]),
    ("--config.optim.generator.b1=1.0", ["optim.generator.b1=1.0", "[0, 1)"]),
    ("--config.optim.generator.eps=0.0", ["optim.generator.eps=0.0", "positive"]),
    ("--config.optim.generator.num_warmup=-1", ["optim.generator.num_warmup=-1", "negative"]),
    ("--config.dimo.divergence=jefreys", ["dimo.divergence='jefreys'", "'jeffreys'", "reverse_kl"]),
    ("--config.dimo.mask_schedule=arcos", ["dimo.mask_schedule='arcos'", "'arccos'"]),
    ("--config.dimo.fake_mask_schedule=x", ["dimo.fake_mask_schedule='x'", "arccos, cosine"]),
    ("--config.dimo.sigma_schedule=liner", ["dimo.sigma_schedule='liner'", "'linear'"]),
    ("--config.dimo.weighting=gap", ["dimo.weighting='gap'", "teacher_gap"]),
    ("--config.dimo.fake_rounds=0", ["dimo.fake_rounds=0", "1"]),
    ("--config.teacher.decoding.order=hilbert", ["teacher.decoding.order='hilbert'", "halton"]),
    ("--config.teacher.decoding.schedule=log", ["teacher.decoding.schedule='log'", "root"]),
    ("--config.teacher.decoding.temperature=0", ["teacher.decoding.temperature=0", "positive"]),
    ("--config.teacher.pretrain.mask_schedule=x", ["teacher.pretrain.mask_schedule='x'", "arccos"]),
    ("--config.teacher.pretrain.mask_kind=x", ["teacher.pretrain.mask_kind='x'", "bernoulli"]),
    ("--config.teacher.pretrain.num_steps=0", ["teacher.pretrain.num_steps=0", "positive"]),
    ("--config.teacher.pretrain.batch_size=9", ["teacher.pretrain.batch_size=9", "multiple"]),
    ("--config.objective=dmd2x", ["objective='dmd2x'", "dimo"]),
    ("--config.data.name=mnist", ["data.name='mnist'", "digits"]),
    ("--config.data.path=/tmp", ["data.path='/tmp'", "empty"]),
    ("--config.data.num_classes=9", ["data.num_classes=9", "10"]),
    ("--config.tokenizer.name=vqgam", ["tokenizer.name='vqgam'", "patch"]),
    ("--config.tokenizer.grid_size=5", ["tokenizer.grid_size=5", "8x8"]),
    ("--config.teacher.name=maskgot", ["teacher.name='maskgot'", "'maskgit'"]),
    ("--config.model.num_heads=3", ["model.num_heads=3", "model.hidden_dim=16"]),
    ("--config.model.dropout=1.0", ["model.dropout=1.0", "[0, 1)"]),
    ("--config.precision.compute_dtype=float16", ["precision.compute_dtype='float16'", "bfloat16"]),
    ("--config.precision.teacher_dtype=int8", ["precision.teacher_dtype='int8'", "bfloat16"]),
    ("--config.mesh.fsdp=3", ["mesh.fsdp=3", "8"]),
    ("--config.train.batch_size=12", ["train.batch_size=12", "multiple", "8"]),
    ("--config.train.batch_size=0", ["train.batch_size=0", "positive"]),
    ("--config.train.num_steps=0", ["train.num_steps=0", "1 or more"]),
    ("--config.train.ema_decay=1.0", ["train.ema_decay=1.0", "[0, 1)"]),
    ("--config.evaluation.batch_size=20", ["evaluation.batch_size=20", "multiple"]),
    ("--config.evaluation.protocol=fid", ["evaluation.protocol='fid'", "digits"]),
    ("--config.evaluation.teacher_steps=(0,)", ["evaluation.teacher_steps=(0,)", "positive"]),
    ("--config.evaluation.seed=-1", ["evaluation.seed=-1", "0 .. 4294967295"]),
    ("--config.optim.generator.num_warmup=20", ["optim.generator.num_warmup=20", "20 updates"]),
    ("--config.optim.fake_score.learning_rate=-0.1", ["optim.fake_score.learning_rate=-0.1"]),
    ("--config.optim.fake_score.name=sgd", ["optim.fake_score.name='sgd'", "adamw"]),
    ("--config.optim.fake_score.schedule=step", ["optim.fake_score.schedule='step'", "cosine"]),
    ("--config.optim.generator.clip_norm=nan", ["optim.generator.clip_norm=nan", "finite"]),
    ("--config.log.every_steps=0", ["log.every_steps=0", "1 or more"]),
    ("--config.log.evaluate_every_steps=-5", ["log.evaluate_every_steps=-5", "0 is off"]),
    ("--config.seed=-1", ["seed=-1", "0 .. 4294967295"]),
    ("--config.seed=4294967296", ["seed=4294967296", "0 .. 4294967295"]),
    (
      "--config.teacher.path=nowhere.safetensors",
      ["teacher.path='nowhere.safetensors' does not exist"],
    ),
  ],
)
def test_a_bad_value_has_one_line_that_says_what_is_right(refused, argument, needles):
  refused([CONFIG, argument], needles)


@pytest.mark.parametrize(
  ("arguments", "needles"),
  [
    (["--config=configs/debug.py:dmd"], ["error: configs/debug.py:dmd is unknown; known: dimo,"]),
    (["--config=configs/digit.py"], ["--config: configs/digit.py does not exist", "'digits.py'"]),
    (["--config=nowhere/digit.py"], ["--config: nowhere/digit.py does not exist\n"]),
    (["--config=configs/digits.py:four"], ["--config: this file has no variants; leave out"]),
    (["--mode=sample"], ["/run' does not exist; run --mode=train there first"]),
    (["--mode=evaluate"], ["/run' does not exist; run --mode=train there first"]),
    ([], ["--config is missing", "configs/digits.py"]),
    (
      [
        CONFIG,
        "--config.data.name=labels",
        "--config.tokenizer.name=none",
        "--config.evaluation.protocol=none",
      ],
      ["teacher.path=''", "data.name"],
    ),
    ([CONFIG, "--config.data.name=labels"], ["tokenizer.name='patch'", "images"]),
    ([CONFIG, "--mode=evaluate"], ["does not exist", "run --mode=train there first"]),
    (
      [CONFIG, "--mode=teacher", "--config.teacher.path=random"],
      ["--mode=teacher trains one", "teacher.path='random' must be empty"],
    ),
    ([CONFIG, "--mode=sample"], ["does not exist", "run --mode=train there first"]),
    ([CONFIG, "--mode=sample", "--labels=3,10"], ["--labels='3,10': 10 must lie in 0 .. 9"]),
    ([CONFIG, "--mode=sample", "--labels=-1"], ["--labels='-1'", "0 .. 9"]),
    (
      [CONFIG, "--mode=sample", "--labels=three"],
      ["--labels='three' must be class ids from 0 to 9"],
    ),
    ([CONFIG, "--mode=sample", "--labels=99999999999"], ["--labels='99999999999'"]),
    ([CONFIG, "--mode=sample", "--seed=-1"], ["--seed=-1", "0 .. 4294967295"]),
    ([CONFIG, "--mode=sample", "--out=grid.jpg"], ["--out='grid.jpg'", ".png"]),
  ],
)
def test_bad_use_has_one_line(refused, tmp_path, arguments, needles):
  refused(arguments, needles)
  assert not (tmp_path / "run").exists()


def test_the_workdir_must_be_named(command):
  code, _, err = command(CONFIG)
  assert (code, err.count("\n")) == (cli.BAD_INPUT, 1)
  assert err.startswith("error: --workdir is missing")


def test_an_unwritable_workdir_is_refused(refused, tmp_path):
  (tmp_path / "file").write_text("")
  workdir = tmp_path / "file" / "run"
  refused([CONFIG], [f"--workdir='{workdir}'", "cannot be written", "Not a directory"], workdir)


def test_unusable_teacher_files_are_refused(refused, tmp_path):
  published = commands.ROOT / "tests" / "golden" / "01_masktransformer.safetensors"
  truncated, foreign, text = (tmp_path / f"{n}.safetensors" for n in ("truncated", "foreign", "t"))
  truncated.write_bytes(published.read_bytes()[:10_000])
  save_file({"codebook": np.zeros((4, 4), np.float32)}, foreign)
  text.write_text("not a network")
  (tmp_path / "empty").mkdir()
  for path, needles in (
    (published, ["another architecture: the file has", "model.hidden_dim=64, the config 16"]),
    (truncated, ["not a readable safetensors file"]),
    (text, ["no PyTorch file, EDM pickle or safetensors file"]),
    (foreign, ["of no known family", "codebook"]),
    (tmp_path / "empty", ["holds no weights, such as teacher.safetensors or model.safetensors"]),
  ):
    refused([CONFIG, f"--config.teacher.path={path}"], [str(path), *needles])


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  return commands.reference(tmp_path_factory)


@pytest.mark.parametrize(
  "changes",
  [
    {"model.hidden_dim": (16, 32)},
    {"tokenizer.codebook_size": (32, 16)},
    {"dimo.divergence": ("jeffreys", "reverse_kl")},
    {"dimo.fake_rounds": (1, 2)},
    {"optim.generator.b1": (0.0, 0.5)},
    {"train.batch_size": (32, 16)},
    {"teacher.pretrain.label_smoothing": (0.0, 0.1)},
    {"precision.teacher_dtype": ("float32", "bfloat16")},
    {"evaluation.protocol": ("debug", "digits")},
    {"seed": (0, 1), "tokenizer.codebook_size": (32, 16), "dimo.sigma": (0.1, 0.2)},
  ],
  ids="+".join,
)
def test_a_run_begun_with_another_config_is_not_continued(command, reference, changes):
  """Read only: the reference is the one that other tests use."""
  before = {p: p.stat().st_mtime_ns for p in reference.rglob("*")}
  arguments = [f"--config.{name}={new}" for name, (_, new) in changes.items()]
  code, _, err = command(*commands.TINY, f"--workdir={reference}", *arguments)
  assert (code, err.count("\n")) == (cli.BAD_INPUT, 1), err
  listed = "; ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in sorted(changes.items()))
  assert err.startswith(f"error: {reference} was begun with another config: {listed}. ")
  for mode in ("evaluate", "sample"):
    assert (
      command(*commands.TINY, f"--workdir={reference}", f"--mode={mode}", *arguments)[0] == code
    )
  assert {p: p.stat().st_mtime_ns for p in reference.rglob("*")} == before


def test_another_teacher_is_not_put_under_a_distillation(command, reference, tmp_path):
  teacher = tmp_path / "teacher.safetensors"
  arrays = load_file(reference / "teacher" / "teacher.safetensors")
  arrays["network/output_bias"] = arrays["network/output_bias"] + 1
  save_file(arrays, teacher, {"dimo_jax": json.dumps({"teacher": {}})})
  workdir = commands.copy_run(reference, tmp_path / "run")
  code, _, err = command(*commands.TINY, f"--workdir={workdir}", f"--config.teacher.path={teacher}")
  assert (code, err.count("\n")) == (cli.BAD_INPUT, 1), err
  assert "teacher.sha256" in err and " -> " in err
  assert not (workdir / "tokenizer" / "given.safetensors").exists()  # would decode the student


def test_a_cosine_cannot_be_stretched(command, reference, tmp_path):
  """Its length is the run's: another one would make the learning rate jump."""
  workdir = commands.copy_run(reference, tmp_path / "run")
  record = workdir / "distill" / "record.json"
  fields = json.loads(record.read_text())
  fields |= {"optim.generator.schedule": "cosine", "train.num_steps": commands.NUM_STEPS}
  record.write_text(json.dumps(fields))
  arguments = [*commands.TINY, f"--workdir={workdir}", "--config.optim.generator.schedule=cosine"]
  code, _, err = command(*arguments, "--config.train.num_steps=40")
  assert (code, err.count("\n")) == (cli.BAD_INPUT, 1)
  assert "train.num_steps 20 -> 40" in err


def test_fewer_steps_than_were_done_are_refused(command, reference, tmp_path):
  workdir = commands.copy_run(reference, tmp_path / "run")
  code, _, err = command(*commands.TINY, f"--workdir={workdir}", "--config.train.num_steps=10")
  assert (code, err.count("\n")) == (cli.BAD_INPUT, 1)
  assert "has done 20 steps, more than the 10" in err


def test_two_trainings_in_one_workdir_are_refused(command, reference, tmp_path):
  workdir = commands.copy_run(reference, tmp_path / "run")
  with main._lock(workdir):
    code, _, err = command(*commands.TINY, f"--workdir={workdir}")
  assert (code, err.count("\n")) == (cli.BAD_INPUT, 1)
  assert "another process is training there" in err


def test_only_training_touches_checkpoints(command, reference, tmp_path):
  """Sampling passes over a damaged checkpoint, and leaves it and unfinished ones alone."""
  workdir = commands.copy_run(reference, tmp_path / "run")
  folder = workdir / "distill" / "checkpoints"
  newest = commands.checkpoint_steps(workdir / "distill")[-1]
  for path in (folder / str(newest)).rglob("*"):
    if path.is_file() and "ocdbt" in str(path):
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  unfinished = folder / "99.orbax-checkpoint-tmp"
  unfinished.mkdir()
  arguments = [*commands.TINY, f"--workdir={workdir}", "--mode=sample", f"--out={tmp_path}/a.png"]
  code, out, err = command(*arguments)
  assert code == 0, err
  assert f"{folder / str(newest)} is damaged and skipped" in out
  assert unfinished.exists() and (folder / str(newest)).exists()
  assert not (folder / "damaged").exists()


def test_nothing_begins_anew_where_every_checkpoint_is_damaged(command, reference, tmp_path):
  workdir = commands.copy_run(reference, tmp_path / "run")
  folder = workdir / "distill" / "checkpoints"
  for path in folder.rglob("*"):
    if path.is_file() and "ocdbt" in str(path):
      path.write_bytes(b"")
  before = (workdir / "distill" / "metrics.jsonl").read_bytes()
  code, _, err = command(*commands.TINY, f"--workdir={workdir}")
  assert (code, err.count("\n")) == (cli.BAD_INPUT, 1), err
  assert "none of the checkpoints" in err and "to begin anew move" in err
  code, _, err = command(*commands.TINY, f"--workdir={workdir}")  # they lie in another folder now
  assert (code, err.count("\n")) == (cli.BAD_INPUT, 1), err
  assert "none of the checkpoints" in err and "to begin anew move" in err
  assert (workdir / "distill" / "metrics.jsonl").read_bytes() == before


def test_the_best_checkpoint_can_be_asked_for(command, reference, tmp_path):
  evaluated = {
    row["step"]: row["evaluation/frechet_distance"]
    for row in commands.rows(reference / "distill")
    if "evaluation/frechet_distance" in row
  }
  assert len(evaluated) == 2  # steps 10 and 20; the best is kept whichever it is
  assert min(evaluated, key=evaluated.get) in commands.checkpoint_steps(reference / "distill")
  workdir = commands.copy_run(reference, tmp_path / "run")
  pixels = {}
  for name in ("best", "last"):
    out = tmp_path / f"{name}.png"
    arguments = ["--mode=sample", f"--checkpoint={name}", f"--out={out}"]
    assert command(*commands.TINY, f"--workdir={workdir}", *arguments)[0] == 0
    pixels[name] = out.read_bytes()
  is_last = min(evaluated, key=evaluated.get) == max(evaluated)
  assert (pixels["best"] == pixels["last"]) is is_last
  code, _, err = command(CONFIG, f"--workdir={workdir}", "--checkpoint=best")
  assert code == cli.BAD_INPUT and "--checkpoint=best is for" in err


def test_half_precision_teachers_become_float32(reference, tmp_path):
  arrays = load_file(reference / "teacher" / "teacher.safetensors")
  half = {name: array.astype(np.float16) for name, array in arrays.items()}
  path = tmp_path / "teacher.safetensors"
  save_file(half, path, {"dimo_jax": json.dumps({"teacher": {}})})
  network, _ = prepare.load_teacher(build.build(debug.get_config()), path)
  assert {leaf.dtype for leaf in jax.tree.leaves(network)} == {np.dtype(np.float32)}


def test_samples_follow_labels_and_seed(command, reference, tmp_path):
  workdir = commands.copy_run(reference, tmp_path / "run")

  def pixels(name: str, seed: int) -> np.ndarray:
    out = tmp_path / "made" / name
    code, text, err = command(
      *commands.TINY,
      f"--workdir={workdir}",
      "--mode=sample",
      "--labels=3,1,4",
      f"--seed={seed}",
      f"--out={out}",
    )
    assert code == 0, (err, text)
    said = (
      f"3 pictures in {out}; generator after {commands.NUM_STEPS} of {commands.NUM_STEPS} updates"
    )
    assert text.splitlines()[-1].startswith(said)
    with Image.open(out) as image:
      return np.asarray(image)

  first, again, other = pixels("a.png", 7), pixels("b.png", 7), pixels("c.png", 8)
  assert first.shape[1] > 2 * first.shape[0]  # three side by side
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)


def test_a_workdir_supplies_its_own_config(command, reference, tmp_path):
  workdir = commands.copy_run(reference, tmp_path / "run")
  made = {}
  for name, arguments in (("given", commands.TINY), ("recorded", ())):
    out = tmp_path / f"{name}.png"
    code, _, err = command(*arguments, f"--workdir={workdir}", "--mode=sample", f"--out={out}")
    assert code == 0, err
    made[name] = out.read_bytes()
  assert made["given"] == made["recorded"]
  recorded = json.loads((workdir / "config.json").read_text())
  assert recorded["config"]["log"]["checkpoint_every_steps"] == 6
  assert recorded["image_shape"] == [8, 8, 1]
  (workdir / "config.json").unlink()
  for mode in ("train", "evaluate", "sample"):
    code, _, err = command(f"--workdir={workdir}", f"--mode={mode}")
    assert (code, err.count("\n")) == (cli.BAD_INPUT, 1), err
    assert "--config is missing" in err and "has recorded none" in err


def test_a_stopped_run_has_its_own_exit_code(command, tmp_path, monkeypatch):
  def stop(experiment, workdir):
    raise RunStopped("step 3: generator/loss not finite. Look at the gradient norms")

  monkeypatch.setattr(train, "train", stop)
  code, _, err = command(CONFIG, f"--workdir={tmp_path}/run")
  assert code == cli.STOPPED
  assert err == "error: step 3: generator/loss not finite. Look at the gradient norms\n"


def test_other_errors_keep_their_traceback(command, tmp_path, monkeypatch):
  def fail(experiment, workdir):
    raise ZeroDivisionError("a mistake of ours")

  monkeypatch.setattr(train, "train", fail)
  with pytest.raises(ZeroDivisionError, match="a mistake of ours"):
    command(CONFIG, f"--workdir={tmp_path}/run")


@pytest.fixture(scope="module")
def evaluated(reference, tmp_path_factory):
  """(workdir, stdout) of an evaluation alone."""
  workdir = commands.copy_run(reference, tmp_path_factory.mktemp("evaluated") / "run")
  with commands.shared_folder(tmp_path_factory) as shared:
    return workdir, commands.run(shared, workdir, "--mode=evaluate")[0]


def test_evaluation_alone_repeats_the_results(evaluated, reference):
  workdir, out = evaluated
  assert commands.results(workdir) == commands.results(reference)
  models = [(row["model"], row["steps"]) for row in commands.results(workdir)]
  assert models[:2] == [("real", 0), ("tokenizer", 0)]
  assert models[2:] == [("teacher", 1), ("teacher", 4), ("teacher", 16), ("student", 1)]
  assert str(workdir / "report.html") in out
  commands.assert_same_rows(
    commands.rows(workdir / "distill"), commands.rows(reference / "distill")
  )


def test_the_tokenizer_is_judged_by_what_it_gives_back(evaluated):
  workdir, _ = evaluated
  experiment = build.build(debug.get_config())
  images, labels = prepare.load_arrays(experiment.source("test"))
  codebook = load_file(workdir / "tokenizer" / "tokenizer.safetensors")
  codebook = {name: jnp.asarray(value) for name, value in codebook.items()}
  codes = experiment.tokenizer.encode(codebook, jnp.asarray(images))
  decoded = np.asarray(experiment.tokenizer.decode(codebook, codes))
  expected = prepare.fit_classifier(experiment, workdir).evaluate(decoded, labels)
  real, row = commands.results(workdir)[:2]
  for name in ("frechet_distance", "precision", "class_agreement"):
    assert row[name] == pytest.approx(expected[name], rel=1e-3) and row[name] != real[name], name
  assert row["token_entropy"] == real["token_entropy"]


@pytest.fixture(scope="module")
def teacher_alone(reference, tmp_path_factory):
  """(workdir, stdout) of a teacher's training alone."""
  workdir = tmp_path_factory.mktemp("teacher") / "run"
  commands.copy_run(reference, workdir, "teacher", "distill")
  with commands.shared_folder(tmp_path_factory) as shared:
    return workdir, commands.run(shared, workdir, "--mode=teacher")[0]


@pytest.mark.ci
def test_a_teacher_alone_is_that_of_a_whole_run(teacher_alone, reference):
  workdir, out = teacher_alone
  assert f"teacher {commands.NUM_STEPS}/{commands.NUM_STEPS}" in out
  file = pathlib.Path("teacher", "teacher.safetensors")
  assert (workdir / file).read_bytes() == (reference / file).read_bytes()
  assert not (workdir / "distill").exists() and not (workdir / "results.json").exists()


def begun(workdir, *stages):
  """Records of stages that ended as they began."""
  for stage in stages:
    (workdir / stage / "checkpoints").mkdir(parents=True)
    (workdir / stage / "record.json").write_text('{"seed": 99}')
    (workdir / stage / "trackers.json").write_text("{}")
    (workdir / stage / "metrics.jsonl").touch()


def test_what_was_not_tried_is_said_before_anything_is_trained(tmp_path, monkeypatch, capsys):
  config = debug.get_config()
  config.tested.learning_rate = (1e-4, 2e-4)
  config.optim.generator.learning_rate = config.optim.fake_score.learning_rate = 0.5

  def make_teacher(*_):
    raise Preempted

  monkeypatch.setattr(train, "make_teacher", make_teacher)
  with pytest.raises(Preempted):
    train.train(build.build(config), tmp_path)
  said = capsys.readouterr().out
  assert said.count("learning_rate=0.5 lies outside of 0.0001 .. 0.0002") == 2
  assert said.endswith("mesh: data 8, fsdp 1; 8 devices, processes: 1\n")


def test_a_config_that_changed_is_said(tmp_path, capsys):
  config = debug.get_config()
  prepare.record_config(build.build(config), tmp_path)
  prepare.record_config(build.build(config), tmp_path)
  assert "config:" not in capsys.readouterr().out
  config.log.every_steps, config.train.ema_decay = 7, 0.25
  prepare.record_config(build.build(config), tmp_path)
  said = capsys.readouterr().out
  assert said.startswith("config: changed since the last start: ") and said.count("\n") == 1
  assert re.search(r" log\.every_steps \d+ -> 7; train\.ema_decay 0\.\d+ -> 0\.25\n", said), said
  with config.unlocked():
    config.own = [1, 2]  # a tuple once it is recorded
  for _ in range(2):
    prepare.record_config(build.build(config), tmp_path)
  assert capsys.readouterr().out == ""
  other = debug.get_config("dmd2")
  prepare.record_config(build.build(other), tmp_path)
  said = capsys.readouterr().out
  assert "objective 'dimo' -> 'dmd2'; " in said and " more\n" in said and said.count("->") == 8
  (tmp_path / "config.json").write_text("{")
  prepare.record_config(build.build(config), tmp_path)
  assert json.loads((tmp_path / "config.json").read_text())["config"]["log"]["every_steps"] == 7


def test_a_run_is_planned_by_the_config_that_it_has_recorded(command, tmp_path):
  config = debug.get_config()
  config.train.batch_size = 24
  prepare.record_config(build.build(config), tmp_path)
  code, out, err = command("--mode=plan", f"--workdir={tmp_path}", "--devices=3")
  assert code == 0, err
  result = json.loads(out.splitlines()[-1])
  assert (result["devices"], result["layout"]["batch_size"]) == (3, 24)
  code, out, err = command("--mode=plan", "--devices=3")
  assert (code, out) == (cli.BAD_INPUT, "") and "or a --workdir that has recorded one" in err
  code, out, err = command("--mode=plan", f"--workdir={tmp_path / 'nowhere'}")
  assert (code, out) == (cli.BAD_INPUT, "") and "nowhere' does not exist; run --mode=train" in err
  recorded = json.loads((tmp_path / "config.json").read_text())
  del recorded["config"]["model"]["num_layers"]
  (tmp_path / "old").mkdir()
  (tmp_path / "old" / "config.json").write_text(json.dumps(recorded))
  code, out, err = command("--mode=plan", f"--workdir={tmp_path / 'old'}")
  assert (code, out) == (cli.BAD_INPUT, "") and "and this version differs" in err
  code, out, err = command("--mode=plan", f"--workdir={tmp_path}", "--devices=5")
  assert (code, out) == (cli.BAD_INPUT, "") and "train.batch_size=24 must be a" in err


def test_what_draws_more_imports_what_the_run_imported(tmp_path, monkeypatch, capsys):
  config = debug.get_config()
  config.evaluation.protocol = "none"
  (tmp_path / "distill" / "pictures").mkdir(parents=True)
  monkeypatch.setattr(cli, "IMPORTED", ["own.py", "more.py"])
  evaluate.evaluate_workdir(build.build(config), tmp_path)
  said = capsys.readouterr().out
  assert f"--workdir={tmp_path} --mode=sample --import=own.py --import=more.py\n" in said


def test_what_was_never_distilled_is_told_apart(tmp_path):
  with pytest.raises(UserError, match="nowhere' does not exist; run --mode=train there first"):
    records.check_trained(tmp_path / "nowhere")
  with pytest.raises(UserError, match="holds no distillation yet; run --mode=train"):
    records.check_trained(tmp_path)
  (tmp_path / files.MANIFEST).write_text("{}")
  with pytest.raises(UserError, match="is an export; what is asked for needs the training's own"):
    records.check_trained(tmp_path)
  (tmp_path / "distill" / "checkpoints").mkdir(parents=True)
  records.check_trained(tmp_path)


def test_a_run_that_kept_nothing_is_forgotten(tmp_path):
  begun(tmp_path, "teacher", "distill")
  (tmp_path / "distill" / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
  records.forget_if_fruitless(tmp_path)
  assert not [*tmp_path.rglob("record.json"), *tmp_path.rglob("trackers.json")]
  with pytest.raises(UserError, match="seed 1 -> 2"):  # now as ever
    for seed in (1, 2):
      checkpoint.check_record(tmp_path / "teacher", {"seed": seed})


@pytest.mark.parametrize(
  "kept",
  [
    "results.json",
    "classifier/classifier.safetensors",
    "teacher/checkpoints/6/default",
    "distill/checkpoints/damaged/6",
    "distill/metrics.jsonl",
    "distill/pictures/step_000000.png",
  ],
)
def test_a_run_that_kept_something_is_not_forgotten(kept, tmp_path):
  begun(tmp_path, "teacher", "distill")
  (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / kept).write_text("{}")
  records.forget_if_fruitless(tmp_path)
  assert len([*tmp_path.rglob("record.json"), *tmp_path.rglob("trackers.json")]) == 4


@pytest.fixture(scope="module")
def without_teacher(tmp_path_factory):
  """(workdir, stdout) of two steps from random weights, where a run by another config has begun
  and kept nothing.
  """
  workdir = tmp_path_factory.mktemp("random") / "run"
  begun(workdir, "distill", "tokenizer")
  arguments = (
    "--config.teacher.path=random",
    "--config.evaluation.protocol=none",
    "--config.train.num_steps=2",
    "--config.log.pictures_every_steps=0",
  )
  with commands.shared_folder(tmp_path_factory) as shared:
    return workdir, commands.run(shared, workdir, *arguments)[0]


@pytest.mark.ci
def test_a_random_teacher_needs_no_file(without_teacher):
  workdir, out = without_teacher
  assert "evaluation: off" in out
  assert not (workdir / "teacher").exists()
  assert [row["step"] for row in commands.rows(workdir / "distill")] == [1, 2]


@pytest.fixture(scope="module")
def full_disk(reference, tmp_path_factory):
  """(workdir, stderr, steps saved, stdout of the same command with space) on a small disk."""
  disk = tmp_path_factory.mktemp("disk")
  mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
  if subprocess.run(mount, check=False, capture_output=True).returncode:
    pytest.skip("a small file system cannot be mounted here")
  try:
    workdir = commands.copy_run(reference, disk / "run", "distill")
    usage = os.statvfs(disk)
    fill = disk / "fill"
    fill.write_bytes(bytes(usage.f_bavail * usage.f_frsize - 1_400_000))
    arguments = (
      "--config.evaluation.protocol=none",
      "--config.log.pictures_every_steps=0",
      "--config.log.checkpoint_every_steps=2",
      "--config.log.keep_checkpoints=20",
    )
    with commands.shared_folder(tmp_path_factory) as shared:
      _, err = commands.run(shared, workdir, *arguments, code=1)
      saved = commands.checkpoint_steps(workdir / "distill")
      fill.unlink()
      out, _ = commands.run(shared, workdir, *arguments)
    yield workdir, err, saved, out
  finally:
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.ci
def test_a_full_disk_stops_with_one_line_and_the_run_goes_on_later(full_disk, reference):
  workdir, err, saved, out = full_disk
  assert err == "error: the disk is full; free some space and run the same command again\n"
  assert saved and saved[-1] < commands.NUM_STEPS
  assert f"distill: goes on from step {saved[-1]}\n" in out
  commands.assert_same_arrays(workdir / "distill", reference / "distill", commands.NUM_STEPS)
