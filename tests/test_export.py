"""Exports: what goes out comes back the same; cards, refusals, nothing half-written, a fake hub."""

import base64
import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from absl import flags
from absl.testing import flagsaver
from etils import epath
from jax import export as jax_export
from safetensors.numpy import load_file

import dimo_jax
from dimo_jax import artifacts, card, cli, export, main, prepare, remote, train
from dimo_jax.build import build
from dimo_jax.checkpoint import params_hash
from dimo_jax.convert import __main__ as convert
from dimo_jax.convert import families, files
from dimo_jax.hooks import sampling_network
from dimo_jax.preemption import STOP
from dimo_jax.recipe import of_sizes
from dimo_jax.types import UserError
from tests import commands, runs
from tests.helpers import GOLDEN

LABELS = np.array([3, 1, 4, 1, 5])
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys
import numpy as np
import dimo_jax
np.save(sys.argv[1], dimo_jax.load("hf://a/b").sample([3, 1, 4, 1, 5], 0))
"""
SCRIPT_GUARD = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
roots = {name.split(".")[0] for name in sys.modules}
assert not roots & {"dimo_jax", "flax", "orbax", "configs"}, roots
"""


@pytest.fixture(scope="module", params=["dimo", "dmd2"])
def exported(request, tmp_path_factory):
  """(workdir, its run, an export in every format)."""
  workdir = tmp_path_factory.mktemp(request.param) / "run"
  runs.make(workdir, request.param)
  run = artifacts.read_run(workdir)
  out = tmp_path_factory.mktemp("out") / "deep" / "export"
  export.export(run, files.FORMATS, out, license_name="cc-by-4.0")
  return workdir, run, out


@pytest.mark.parametrize("name", files.FORMATS)
def test_exports_sample_what_the_run_samples(exported, name):
  workdir, _, out = exported
  whole, part = dimo_jax.load(workdir), dimo_jax.load(out / name)
  for attribute in ("kind", "role", "num_classes", "num_steps", "image_shape"):
    assert getattr(part, attribute) == getattr(whole, attribute)
  np.testing.assert_array_equal(part.sample(LABELS, 7), whole.sample(LABELS, 7))
  if name != "stablehlo" and whole.kind == "masked":
    np.testing.assert_array_equal(part.sample_tokens(LABELS, 7), whole.sample_tokens(LABELS, 7))
  elif name == "stablehlo":
    np.testing.assert_array_equal(part.sample(LABELS, 7, batch_size=2), part.sample(LABELS, 7))
    with pytest.raises(UserError, match="makes images, not tokens"):
      part.sample_tokens(LABELS, 7)
    with pytest.raises(UserError, match="is a fixed program"):
      dimo_jax.load(out / name, fields={"sampling.temperature": 2.0})


@pytest.mark.parametrize("name", ["export", "export/linen", "export/torch", "run"])
def test_exports_and_runs_are_loaded_from_buckets(exported, tmp_path, monkeypatch, name):
  workdir, _, out = exported
  here = {"export": out, "run": workdir}
  real = epath.Path

  def path(text):
    root, _, rest = text.removeprefix("gs://bucket/").partition("/")
    return real(here[root] / rest)

  def fetch(location):
    with monkeypatch.context() as patch:  # not while orbax reads
      patch.setattr(epath, "Path", path)
      return remote.local_path(location)

  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(artifacts, "local_path", fetch)
  artifact = dimo_jax.load(f"gs://bucket/{name}")
  assert str(tmp_path) in artifact.name and artifact.role == "generator"
  wanted = dimo_jax.load(workdir).parts.weights
  jax.tree.map(np.testing.assert_array_equal, artifact.parts.weights, wanted)


def test_a_folder_of_several_formats_is_loaded_by_the_first(exported):
  artifact = dimo_jax.load(exported[2])
  assert artifact.name.endswith("linen")


def test_the_torch_format_is_the_published_layout(exported):
  _, run, out = exported
  teacher = run.recipe.models("run").teacher
  arrays = load_file(out / "torch" / artifacts.TORCH_FILES[teacher.kind])
  network = prepare.from_published(teacher, arrays)
  jax.tree.map(np.testing.assert_array_equal, network, run.weights["network"])
  settings = json.loads((out / "torch" / "sampling.json").read_text())
  if teacher.kind == "masked":
    assert arrays["transformer.layers.0.0.fn.mha.in_proj_weight"].shape == (48, 16)
    assert settings["sampler"]["temperature"] == 1.2 and settings["sampler"]["r_init"] == 0.6
    assert settings["conditioning"]["null_class_token_id"] == 32 + 1 + 10
    assert settings["network"]["num_heads"] == 2
  else:
    assert settings["sampler"]["sigmas"] == [80.0, 1.0, 0.4, 0.15]
    assert settings["preconditioning"]["sigma_data"] == 0.5
    assert settings["network"]["class"] == "DenoisingMLP"


@pytest.mark.parametrize("name", ["", "linen", "torch"])
def test_exports_are_converted_to_a_generator_in_one_file(exported, tmp_path, capsys, name):
  workdir, run, out = exported
  whole, family = dimo_jax.load(workdir), run.recipe.config.objective
  for given in ((), (f"--family={family}",)):
    assert convert.main([f"--source={out / name}", f"--out={tmp_path}", *given]) == 0
  assert "is a generator of " in capsys.readouterr().out
  record = json.loads((tmp_path / "conversion.json").read_text())
  assert (record["family"], record["files"]) == (family, ["generator.safetensors"])
  assert record["source_sha256"] == params_hash(run.weights["network"])
  made = dimo_jax.load(tmp_path / "generator.safetensors")
  jax.tree.map(np.testing.assert_array_equal, made.parts.weights, whole.parts.weights)
  assert made.sampler == whole.sampler and made.role == "generator"
  assert made.parts.clock == whole.parts.clock > 0
  assert convert.main([f"--source={out / name}", "--family=maskgit", f"--out={tmp_path}"]) == 2
  assert "is an export of dimo_jax, a generator of" in capsys.readouterr().err
  with pytest.raises(UserError, match=r"is a generator of dimo_jax already"):
    convert.convert(str(tmp_path / "generator.safetensors"), "", tmp_path / "again")


def test_a_program_is_not_converted(exported, tmp_path):
  with pytest.raises(UserError, match="stablehlo is a program; the formats linen and torch can"):
    convert.convert(str(exported[2] / "stablehlo"), "", tmp_path)


def test_a_torch_export_says_that_it_is_a_generator(exported):
  _, run, out = exported
  folder = out / "torch"
  kind = run.recipe.models("run").teacher.kind
  for path in (folder, folder / artifacts.TORCH_FILES[kind]):
    assert families.guess(files.read(path)) == run.recipe.config.objective


def test_students_are_no_teachers(exported, tmp_path):
  _, run, out = exported
  convert.convert(str(out), "", tmp_path)
  experiment = build(run.recipe.config)
  file = artifacts.TORCH_FILES[experiment.teacher.kind]
  for path in (
    *(out / name for name in ("", *files.FORMATS)),
    out / "torch" / file,
    tmp_path / "generator.safetensors",
  ):
    with pytest.raises(UserError, match=r"a student, and a teacher is wanted") as error:
      prepare.load_teacher(experiment, path)
    assert str(error.value).startswith(f"teacher.path={str(path)!r}")
    assert "\n" not in str(error.value)


@pytest.fixture
def release(tmp_path):
  """(tensors of DMD2's published generator, an export of a run that ended with its weights)."""
  archive = files.read(GOLDEN / "07_dmd2_release" / "pytorch_model.bin")
  converted = families.convert(archive)
  recipe = of_sizes(converted.sizes, converted.family)
  weights = {"network": converted.parts["generator"], "tokenizer": {}}
  run = artifacts.Run(tmp_path, recipe, weights, 20, 100, average=False, teacher_sha256="0" * 64)
  export.export(run, ["torch"], tmp_path / "out")
  return archive.tensors, tmp_path / "out"


def test_a_denoiser_leaves_as_the_published_one_came(release, tmp_path):
  tensors, out = release
  path = out / "torch" / artifacts.TORCH_FILES["gaussian"]
  arrays = load_file(path)
  assert set(arrays) == set(tensors) and any("resample_filter" in name for name in arrays)
  for name, value in tensors.items():
    assert arrays[name].dtype == value.dtype, name
    np.testing.assert_array_equal(arrays[name], value, err_msg=name)
  loaded = dimo_jax.load(out)
  for source in (path, out, out / "torch"):
    record = convert.convert(str(source), "", tmp_path / "back")
    assert (record["family"], record["files"]) == ("dmd2", ["generator.safetensors"])
    assert record["sizes"]["denoiser.model_channels"] == 32
    again = dimo_jax.load(tmp_path / "back" / "generator.safetensors")
    jax.tree.map(
      np.testing.assert_array_equal, again.parts.weights["network"], loaded.parts.weights["network"]
    )
    assert again.sampler == loaded.sampler and again.role == "generator"
  settings = json.loads((out / "torch" / "sampling.json").read_text())
  assert settings["network"]["class"] == "ADM" and settings["network"]["model_channels"] == 32
  assert settings["sampler"]["sigmas"] == [80.0]


def test_the_cards_lines_make_the_file_that_dmd2_reads(release, tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  _, out = release
  card = (out / "README.md").read_text()
  block = card[card.index("`pytorch_model.bin`") :].split("\n\n")[1]
  monkeypatch.chdir(out / "torch")
  exec(textwrap.dedent(block), {})
  made, published = (
    torch.load(folder / "pytorch_model.bin", weights_only=True)
    for folder in (out / "torch", GOLDEN / "07_dmd2_release")
  )
  assert set(made) == set(published)
  for name, value in published.items():
    assert made[name].dtype == value.dtype and torch.equal(made[name], value), name


def test_a_program_is_portable(exported):
  program = jax_export.deserialize(
    bytearray((exported[2] / "stablehlo" / "program.bin").read_bytes())
  )
  assert program.platforms == ("cpu", "cuda", "tpu")
  assert program.nr_devices == 1
  calls = set(re.findall(r'custom_call @?"?([\w.$]+)', program.mlir_module()))
  assert calls <= {"shape_assertion"}, calls
  weights = load_file(exported[2] / "stablehlo" / "weights.safetensors")
  shapes = dict(program.in_tree.unflatten(program.in_avals)[0][0])
  assert {k: v.shape for k, v in shapes.items()} == {k: v.shape for k, v in weights.items()}


@pytest.mark.parametrize("num", [pytest.param(1, marks=pytest.mark.ci), 5])
def test_the_script_needs_jax_and_safetensors_alone(exported, tmp_path, num):
  workdir, _, out = exported
  text = (out / "stablehlo" / "sample.py").read_text()
  imported = set(re.findall(r"^(?:import|from) (\w+)", text, flags=re.M))
  assert imported == {"argparse", "pathlib", "jax", "numpy", "safetensors"}
  code = text.split('"""')[2].strip().splitlines()
  assert len(code) <= 20
  script = [sys.executable, "-c", SCRIPT_GUARD, str(out / "stablehlo" / "sample.py")]
  command = [*script, *map(str, LABELS[:num]), "--seed=7", f"--out={tmp_path / 'images'}"]
  environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
  subprocess.run(command, check=True, cwd=tmp_path, env=environment)
  wrong = subprocess.run(
    [*script, "10"],
    check=False,
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert wrong.returncode == 2 and "0..9: invalid choice: 10" in wrong.stderr
  images = np.load(tmp_path / "images.npy")
  np.testing.assert_array_equal(images, dimo_jax.load(workdir).sample(LABELS[:num], 7))


def front_matter(text):
  return yaml.safe_load(text.split("---\n")[1])


def test_the_card(exported):
  workdir, run, out = exported
  text = (out / "README.md").read_text()
  head = front_matter(text)
  method = {"dimo": "Di[M]O", "dmd2": "DMD2"}[run.recipe.config.objective]
  assert head["license"] == "cc-by-4.0"
  assert head["library_name"] == "dimo_jax"
  assert {run.recipe.config.objective, *files.FORMATS} <= set(head["tags"])
  for needle in (
    f"# {method} generator",
    run.teacher_sha256,
    "20 generator updates",
    "trained in the same run",
    "moving average",
    "cc-by-4.0: the teacher's",
    "| student | one step | 1 | 3.25 | 0.75 |",
    "| real | test split | 0 | 2.5 | - |",
    "Protocol `debug`, 96 images",
    "nothing but the lowering was",
    '"learning_rate"',
  ):
    assert needle in text, needle
  assert "{{" not in text and "{%" not in text
  assert ("MLP for tiny images" in text) is (method == "DMD2")
  assert str(workdir) not in text
  table = text[text.index("| model |") :].splitlines()
  assert [line.count("|") for line in table[:5]] == [6] * 5


def test_the_card_names_a_published_protocol_and_its_files(exported, tmp_path):
  workdir, run = commands.copy_run(exported[0], tmp_path / "run"), exported[1]
  row = {"protocol": "edm-imagenet64", "unverified": ["statistics"], "fid": 2.5, "steps": 1}
  row |= {"model": "student", "sampler": {"name": "one step", "temperature": 7.0}}
  row |= {"inception_score": 40.25, "departures": {"num_images": 5000}, "num_images": 5000}
  row |= {"inception_sha256": "ab" * 32, "statistics_sha256": "cd" * 32}
  row |= {"step": 20, "weights_sha256": params_hash(run.weights["network"])}
  (workdir / "results.json").write_text(json.dumps([row]))
  export.export(artifacts.read_run(workdir), ["linen"], tmp_path / "out")
  text = (tmp_path / "out" / "README.md").read_text()
  for needle in (
    "Protocol `edm-imagenet64`, 5000 images in the last row. Not the protocol's: num_images=5000.",
    "Inception-v3's features (weights SHA-256 `abababababab`) against statistics with SHA-256"
    " `cdcdcdcdcdcd`; unverified: statistics.",
    "| model | sampler | steps | FID | Inception Score |",
    "| student | one step | 1 | 2.5 | 40.25 |",
  ):
    assert needle in text, text[text.index("## Evaluation") :]
  assert "small classifier" not in text


def test_a_card_says_what_is_not_known(exported, tmp_path):
  workdir = commands.copy_run(exported[0], tmp_path / "run")  # without its results
  export.export(artifacts.read_run(workdir, average=False), ["linen"], tmp_path / "out")
  text = (tmp_path / "out" / "README.md").read_text()
  assert front_matter(text)["license"] == "other"
  assert front_matter(text)["license_name"] == "unknown"
  for needle in (
    "Unknown: a distilled generator inherits",
    "None of these weights.",
    "no a",
  ):
    assert needle in text, needle
  assert "stablehlo" not in text and "torch/" not in text
  assert "sample(labels=[3, 1, 4], seed=0)" in text
  run = artifacts.read_run(workdir, average=False)
  run.recipe.config.data.num_classes = 2
  text = card.card(run, ["linen", "stablehlo"], license_name="", results=(), notes=())
  assert "sample(labels=[1], seed=0)" in text and "sample.py 1 --seed" in text


@pytest.mark.parametrize("other", ["raw", "best", "older", "unmarked", "none"])
def test_a_card_has_no_numbers_of_other_weights(exported, tmp_path, other):
  workdir = exported[0]
  if other in ("older", "unmarked"):
    workdir = commands.copy_run(exported[0], tmp_path / "run")
    rows = json.loads((exported[0] / "results.json").read_text())
    if other == "older":
      rows[-1]["step"] -= 1
    else:
      del rows[-1]["weights_sha256"]
    (workdir / "results.json").write_text(json.dumps(rows))
  run = artifacts.read_run(
    workdir, checkpoint="best" if other == "best" else "last", average=other != "raw"
  )
  export.export(run, ["torch"], tmp_path / "out")
  text = (tmp_path / "out" / "README.md").read_text()
  evaluated = other == "none"
  assert ("| student |" in text) is ("3.25" in text) is evaluated
  assert ("None of these weights: what follows was taken in the same run." in text) is not evaluated
  assert "| real | test split | 0 | 2.5 |" in text and "| teacher | Heun | 4 | 2.75 |" in text


def test_the_hash_of_exported_weights_is_that_of_an_evaluation(exported):
  workdir, run, _ = exported
  experiment = build(run.recipe.config)
  _, state = train.restore(experiment, workdir)
  network = sampling_network(experiment, state.ema_params, {})
  (row,) = [row for row in export._results(run) if row["model"] == "student"]
  assert row["weights_sha256"] == params_hash(network.all_params)


def test_raw_weights_are_the_generators(exported, tmp_path):
  workdir, run, _ = exported
  raw = artifacts.read_run(workdir, average=False)
  export.export(raw, ["linen"], tmp_path / "out")
  got = dimo_jax.load(tmp_path / "out").sample(LABELS, 0)
  assert (got != dimo_jax.load(workdir).sample(LABELS, 0)).any()
  manifest = json.loads((tmp_path / "out" / "linen" / "dimo_jax.json").read_text())
  assert manifest["weights"] == "raw" and manifest["teacher_sha256"] == run.teacher_sha256


def contents(folder):
  return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_export_is_whole_or_not_there(exported, tmp_path, monkeypatch):
  run, out = exported[1], tmp_path / "out"

  def full(*arguments):
    raise OSError(28, "No space left on device")

  monkeypatch.setitem(export._WRITERS, "torch", full)
  with pytest.raises(UserError, match=r"out' cannot be written: No space left on device"):
    export.export(run, ["linen", "torch"], out)
  assert list(tmp_path.iterdir()) == []
  export.export(run, ["linen"], out)
  before = contents(out)
  with pytest.raises(UserError, match=r"exists; give --overwrite"):
    export.export(run, ["linen"], out)
  with pytest.raises(UserError, match="cannot be written"):
    export.export(run, ["torch"], out, overwrite=True)
  replace = os.replace
  monkeypatch.setattr(
    os, "replace", lambda a, b: full() if pathlib.Path(a).name == "export" else replace(a, b)
  )
  with pytest.raises(UserError, match="cannot be written"):
    export.export(run, ["linen"], out, overwrite=True)
  assert contents(out) == before and list(tmp_path.iterdir()) == [out]
  monkeypatch.undo()
  export.export(run, ["torch"], out, overwrite=True)
  assert {path.name for path in out.iterdir()} == {"README.md", "torch"}
  assert list(tmp_path.iterdir()) == [out]


def test_nothing_but_an_export_is_replaced(exported, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").write_text("years")
  for overwrite in (False, True):
    with pytest.raises(UserError, match="exists and is no export"):
      export.export(exported[1], ["linen"], tmp_path / "mine", overwrite=overwrite)
  assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"
  (tmp_path / "empty").mkdir()
  export.export(exported[1], ["linen"], tmp_path / "empty")


def test_damaged_exports_have_one_line(exported, tmp_path):
  import shutil

  for name, file in (
    ("linen", "dimo_jax.json"),
    ("torch", "sampling.json"),
    ("stablehlo", "weights.safetensors"),
    ("stablehlo", "program.bin"),
  ):
    folder = tmp_path / f"{name}-{file}"
    shutil.copytree(exported[2] / name, folder)
    (folder / file).unlink()
    if file == "sampling.json":  # for people only
      dimo_jax.load(folder)
      continue
    with pytest.raises(UserError):
      dimo_jax.load(folder)
  folder = tmp_path / "cut"
  shutil.copytree(exported[2] / "linen", folder)
  for path in (folder / "params").rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:10])
  with pytest.raises(UserError, match="is not a readable checkpoint"):
    dimo_jax.load(folder)


def test_tokens_alone_are_no_program(tmp_path):
  tokens = {"data": {"name": "labels"}, "tokenizer": {"name": "none"}}
  more = {"evaluation": {"protocol": "none"}, "teacher": {"path": "random"}}
  runs.make(tmp_path / "run", **tokens, **more)
  run = artifacts.read_run(tmp_path / "run")
  with pytest.raises(UserError, match="--format=stablehlo makes images, and this run has no deco"):
    export.export(run, ["stablehlo"], tmp_path / "out")
  export.export(run, ["linen"], tmp_path / "out")
  artifact = dimo_jax.load(tmp_path / "out")
  assert artifact.sample_tokens(LABELS, 0).shape == (5, 16)
  with pytest.raises(UserError, match="holds no decoder"):
    artifact.sample(LABELS, 0)


def test_a_signal_takes_away_what_is_unfinished_but_never_what_is_replaced(
  exported, tmp_path, monkeypatch
):
  taken, written = [], export._write_json

  def look(*arguments):
    taken.append(len(STOP._unfinished))
    return written(*arguments)

  monkeypatch.setattr(export, "_write_json", look)
  monkeypatch.setattr(export, "_put", lambda *arguments: taken.append(len(STOP._unfinished)))
  export.export(exported[1], ["linen"], tmp_path / "out")
  assert taken[0] == 1 and taken[-1] == 0


@pytest.fixture
def command(monkeypatch, capsys):
  """command(module, *arguments) -> (exit code, stdout, stderr), in this process."""
  import signal

  from absl import logging

  def run(module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    verbosity = logging.get_verbosity()
    try:
      with flagsaver.flagsaver(), pytest.raises(SystemExit) as raised:
        module.main()
    finally:
      logging.set_verbosity(verbosity)
      own = getattr(module, "_FLAGS", {})
      if own:
        own.unparse_flags()
      for name in own:
        own[name].unparse()
      for number, handler in handlers.items():
        signal.signal(number, handler)
    out, err = capsys.readouterr()
    return raised.value.code or 0, out, err

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return run


@pytest.mark.parametrize(
  ("arguments", "needles"),
  [
    (["--workdir=", "--format=linen", "--out=x"], ["--workdir is missing"]),
    (["--workdir=w", "--out=x"], ["--format is missing", "linen, torch, stablehlo"]),
    (["--workdir=w", "--format=linen"], ["--out is missing"]),
    (["--workdir=w", "--format=onnx", "--out=x"], ["--format='onnx'", "stablehlo"]),
    (["--workdir=w", "--format=linen", "--out=x"], ["--workdir='w' does not exist"]),
    (["--workdir=w", "--format=linen", "--out=/"], ["--out='/'", "is no export"]),
    (["--workdir=w", "--format=linen", "--out=x", "--push=name"], ["--push='name'", "owner/repo"]),
    (["--workdir=w", "--format=linen", "--out=x", "--push=a/b/c"], ["--push='a/b/c'"]),
    (["--workdir=w", "--format=linen", "--out=x", "--license=a: b"], ["--license='a: b'", "cc-by"]),
    (["--workdir=w", "--formt=linen", "--out=x"], ["formt"]),
    (["--workdir=w", "--checkpoint=first"], ["--checkpoint='first' must be last, best or a step"]),
  ],
)
def test_bad_exports_have_one_line(command, arguments, needles):
  code, _, err = command(export, *arguments)
  assert (code, err.count("\n")) == (cli.BAD_INPUT, 1), err
  assert all(needle in err for needle in needles), err


def test_the_commands(exported, command, tmp_path):
  from dimo_jax import sample

  workdir = exported[0]
  code, out, err = command(
    export, f"--workdir={workdir}", "--format=torch,linen", f"--out={tmp_path}/out", "--raw"
  )
  assert code == 0, err
  assert out.splitlines() == [
    f"torch, linen of {workdir}, step 20, in {tmp_path}/out",
    "the teacher's licence is not known; --license records it in the card",
  ]
  made = {}
  for name, arguments in {
    "linen": [f"--artifact={tmp_path}/out"],
    "torch": [f"--artifact={tmp_path}/out/torch"],
    "other": [f"--artifact={tmp_path}/out", "--seed=1"],
    "teacher": [f"--artifact={workdir}/teacher", "--steps=2"],
  }.items():
    png = tmp_path / f"{name}.png"
    code, out, err = command(sample, *arguments, "--labels=3,1,4", "--num=12", f"--out={png}")
    assert code == 0, err
    role = "teacher, 2 steps" if name == "teacher" else "generator, "
    assert re.match(rf"12 pictures in {png}; {role}.* images/s, after .* s of compilation", out)
    made[name] = png.read_bytes()
  assert made["linen"] == made["torch"] != made["other"]
  for arguments, needle in (
    ([], "--artifact is missing"),
    (["--artifact=nowhere"], "'nowhere' does not exist"),
    ([f"--artifact={workdir}", "--out=x.jpg"], "must end in .png"),
    ([f"--artifact={workdir}", "--num=0"], "--num=0 must be 1 or more"),
    ([f"--artifact={workdir}", "--num=2", "--labels=3,1,4"], "--num=2 is fewer than the classes"),
    ([f"--artifact={workdir}", "--labels=10"], "--labels='10': 10 must lie in 0 .. 9"),
    ([f"--artifact={workdir}", "--seed=-1"], "--seed=-1 must lie"),
    ([f"--artifact={workdir}", "--steps=9"], "steps=9 is for teachers"),
    ([f"--artifact={workdir}", "--field=a.b=1"], "a.b=1: no such field"),
  ):
    code, _, err = command(sample, *arguments)
    assert (code, err.count("\n")) == (cli.BAD_INPUT, 1), err
    assert needle in err


@pytest.mark.parametrize("name", ["", "linen", "stablehlo"])
def test_an_export_is_sampled_as_a_workdir_is(exported, command, tmp_path, name):
  workdir, _, out = exported
  made = []
  for folder in (workdir, out / name):
    png = tmp_path / f"{len(made)}.png"
    arguments = ("--mode=sample", "--labels=3,1,4", "--seed=7", f"--out={png}")
    code, text, err = command(main, f"--workdir={folder}", *arguments)
    assert code == 0, err
    of_run = r" after \d+ of \d+ updates" if folder == workdir else ""
    assert re.match(rf"3 pictures in {png}; generator{of_run}, ", text.splitlines()[-1])
    made.append(png.read_bytes())
  assert made[0] == made[1]


@pytest.mark.parametrize(
  "arguments",
  [
    ["--mode=train"],
    ["--mode=evaluate"],
    ["--mode=sample", "--checkpoint=best"],
    ["--mode=sample", f"--config={commands.ROOT}/configs/debug.py"],
  ],
)
def test_an_export_is_no_workdir_to_train_in(exported, command, arguments):
  before = contents(exported[2])
  code, _, err = command(main, f"--workdir={exported[2]}", *arguments)
  assert (code, err.count("\n")) == (cli.BAD_INPUT, 1), err
  assert "is an export: --mode=sample takes it, without --config and --checkpoint" in err
  assert contents(exported[2]) == before


class Hub(http.server.BaseHTTPRequestHandler):
  """What an upload asks of a hub; it keeps the files it is given."""

  def do_POST(self):
    text = self.rfile.read(int(self.headers["Content-Length"])).decode()
    hub = self.server
    hub.seen.append((self.path, self.headers.get("Authorization", "")))
    if hub.refusing:
      return self.answer(403, {"error": "not yours"})
    if self.path.endswith("/preupload/main"):
      names = [file["path"] for file in json.loads(text)["files"]]
      files = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
      return self.answer(200, {"files": files})
    if self.path.endswith("/commit/main"):
      for line in text.splitlines():
        row = json.loads(line)
        if row["key"] == "file":
          hub.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
      return self.answer(200, {"commitUrl": f"{hub.address}/a/b/commit/0", "commitOid": "0" * 40})
    return self.answer(200, {"url": f"{hub.address}/a/b", "id": "a/b", "name": "a/b"})

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    hub, path = self.server, self.path.partition("?")[0]
    name = path.partition(f"/a/b/resolve/{COMMIT}/")[2]
    if name in hub.files:
      tag = hashlib.sha256(hub.files[name]).hexdigest()
      return self.answer(200, hub.files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'})
    if path.startswith("/api/models/a/b/tree/"):
      return self.answer(
        200,
        [
          {"type": "file", "path": n, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
          for n, data in hub.files.items()
        ],
      )
    if path.startswith("/api/models/a/b"):
      rows = [{"rfilename": n} for n in hub.files]
      return self.answer(200, {"id": "a/b", "sha": COMMIT, "siblings": rows})
    return self.answer(404, {"error": "nothing"})

  def answer(self, code, content, headers=None):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(code)
    for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(data)

  def log_message(self, *arguments):
    pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  server.address = f"http://127.0.0.1:{server.server_port}"
  server.seen, server.files, server.refusing = [], {}, False
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  monkeypatch.setenv("HF_ENDPOINT", server.address)
  monkeypatch.setenv("HF_TOKEN", "hf_secret")
  monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
  yield server
  server.shutdown()
  thread.join()
  server.server_close()


@pytest.mark.ci
def test_an_export_is_pushed(exported, command, hub, tmp_path):
  arguments = [f"--workdir={exported[0]}", "--format=torch", "--push=a/b", "--license=mit"]
  code, out, err = command(export, *arguments, f"--out={tmp_path}/out")
  assert code == 0, err
  assert out.splitlines()[-1].startswith("pushed to ")
  assert hub.files == {str(k): v for k, v in contents(tmp_path / "out").items()}
  assert all(token == "Bearer hf_secret" for path, token in hub.seen if "yaml" not in path)
  command_line = [sys.executable, "-c", LOAD, str(tmp_path / "images.npy")]
  environment = commands.environment(tmp_path) | {"HF_HUB_DISABLE_XET": "1"}
  subprocess.run(command_line, check=True, env=environment)
  wanted = dimo_jax.load(tmp_path / "out").sample(LABELS, 0)
  assert np.abs(np.load(tmp_path / "images.npy").astype(int) - wanted).max() <= 1
  hub.refusing = True
  code, _, err = command(export, *arguments, f"--out={tmp_path}/again")
  assert (code, err.count("\n")) == (cli.BAD_INPUT, 1), err
  assert err.startswith("error: --push='a/b': ") and (tmp_path / "again" / "README.md").exists()


def test_torch_reads_the_weights_and_gives_the_same_logits(tmp_path):
  torch = pytest.importorskip("torch")
  from safetensors.torch import load_file as load_torch

  from tests.torch_maskgit import MaskTransformer

  runs.make(tmp_path / "run")
  run = artifacts.read_run(tmp_path / "run")
  export.export(run, ["torch"], tmp_path / "out")
  settings = json.loads((tmp_path / "out" / "torch" / "sampling.json").read_text())
  network = MaskTransformer(**settings["network"])
  state = load_torch(tmp_path / "out" / "torch" / "ema_model" / "model.safetensors")
  network.load_state_dict(state, strict=True)
  rng = np.random.default_rng(0)
  tokens, labels = rng.integers(0, 33, (5, 16)), LABELS
  with torch.no_grad():
    got = network.eval()(torch.from_numpy(tokens), torch.from_numpy(labels)).numpy()
  teacher = run.recipe.models("run").teacher
  condition = {"class_id": jnp.asarray(LABELS)}
  wanted = teacher.apply(run.weights["network"], jnp.asarray(tokens), condition)
  np.testing.assert_allclose(got, wanted, atol=1e-5)
