"""Loading and sampling: runs, teachers, published weights; images that depend on nothing else."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from safetensors.numpy import load_file, save_file

import dimo_jax
from configs import debug
from dimo_jax import artifacts, prepare
from dimo_jax.build import build
from dimo_jax.convert import edm, maskgit
from dimo_jax.evaluation.pictures import to_uint8
from dimo_jax.models.edm import EDMPrecond
from dimo_jax.models.mask_transformer import MaskTransformer
from dimo_jax.models.unet import ADM
from dimo_jax.recipe import Recipe
from dimo_jax.types import UserError
from tests import runs

GOLDEN = pathlib.Path(__file__).parent / "golden"
LABELS = np.array([3, 1, 4, 1, 5])


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("masked") / "run"
  return workdir, runs.make(workdir)


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("gaussian") / "run"
  return workdir, runs.make(workdir, "dmd2")


def one_by_one(experiment, workdir, sampler, params, seed):
  """(images, what they were decoded from) of LABELS, each in a call of its own."""
  tokenizer = prepare.run_tokenizer(experiment.tokenizer, experiment.config, workdir)
  network = experiment.teacher.frozen_state(params, tokenizer)
  sample = jax.jit(sampler.sample)
  images, encoded = [], []
  for i, label in enumerate(LABELS):
    key = jax.random.fold_in(jax.random.key(seed), i)
    encoded.append(np.asarray(sample(network, {"class_id": jnp.array([label])}, key))[0])
    decoded = experiment.tokenizer.decode(tokenizer, jnp.asarray(encoded[-1])[None])
    images.append(np.asarray(to_uint8(decoded))[0])
  return np.stack(images), np.stack(encoded)


def assert_same_images(got, wanted):
  """Equal but for a rounding of one level."""
  assert got.dtype == wanted.dtype == np.uint8 and got.shape == wanted.shape
  assert np.abs(got.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("kind", ["masked", "gaussian"])
def test_a_run_is_sampled_as_its_sampler_would_one_by_one(kind, request):
  workdir, experiment = request.getfixturevalue(kind)
  artifact = dimo_jax.load(workdir)
  assert (artifact.kind, artifact.role, artifact.num_classes) == (kind, "generator", 10)
  assert artifact.num_steps == experiment.student_sampler.num_steps
  run = artifacts.read_run(workdir)
  assert (run.step, run.clock) == (20, 20 * experiment.objective.fake_rounds)
  sampler = experiment.student_sampler.at(run.clock)
  images, encoded = one_by_one(experiment, workdir, sampler, run.weights["network"], 7)
  got = artifact.sample(LABELS, 7)
  assert_same_images(got, images)
  assert len(np.unique(got.reshape(len(got), -1), axis=0)) == len(LABELS)
  if kind == "masked":
    np.testing.assert_array_equal(artifact.sample_tokens(LABELS, 7), encoded)
  else:
    with pytest.raises(UserError, match="has no tokens"):
      artifact.sample_tokens(LABELS, 7)


def test_a_warm_up_stands_where_the_training_left_it(masked):
  warming = {"dimo.sigma_schedule": "linear", "dimo.sigma_num_warmup": 1000}
  artifact = dimo_jax.load(masked[0], fields=warming)
  clock, student = artifact.parts.clock, artifact.models.student_sampler
  assert clock == artifacts.read_run(masked[0]).clock > 0
  assert artifact.sampler == student.at(clock) != student.at(0)


def test_weights_of_another_shape_are_refused(masked):
  parts = artifacts.read_run(masked[0]).parts()
  cut = jax.tree.map(lambda x: x[:-1] if x.ndim else x, parts.weights["network"])
  wrong = dataclasses.replace(parts, weights={"network": cut, "tokenizer": {}})
  with pytest.raises(UserError, match=r"does not hold the network that it describes: .* differ\)"):
    artifacts.NetworkArtifact(wrong)


def test_an_image_depends_on_its_class_seed_and_index_alone(gaussian):
  artifact = dimo_jax.load(gaussian[0])
  labels = np.arange(20) % 10
  whole = artifact.sample(labels, 0)
  assert_same_images(artifact.sample(labels, 0, batch_size=8), whole)
  assert_same_images(artifact.sample(labels[:3], 0), whole[:3])
  assert np.abs(artifact.sample(labels, 1).astype(int) - whole).max() > 8
  changed = labels.copy()
  changed[1] = 5
  different = (artifact.sample(changed, 0) != whole).any(axis=(1, 2, 3))
  assert different[1] and not different[2:].any()


def test_the_average_and_the_best_checkpoint(masked):
  workdir, experiment = masked
  runs_read = {
    (best, average): artifacts.read_run(
      workdir, checkpoint="best" if best else "last", average=average
    )
    for best in (False, True)
    for average in (False, True)
  }
  assert {key: run.step for key, run in runs_read.items()} == {
    (best, average): 10 if best else 20 for best, average in runs_read
  }
  tables = [run.weights["network"]["last_dense"]["kernel"] for run in runs_read.values()]
  assert len({table.tobytes() for table in tables}) == 4
  given = artifacts.read_run(workdir, experiment)
  assert given.teacher_sha256 == runs_read[False, True].teacher_sha256
  np.testing.assert_array_equal(given.weights["network"]["last_dense"]["kernel"], tables[1])
  tenth = artifacts.read_run(workdir, checkpoint="10")
  assert tenth.step == 10
  np.testing.assert_array_equal(tenth.weights["network"]["last_dense"]["kernel"], tables[3])
  with pytest.raises(UserError, match=r"checkpoint 7 is not in .*there are \["):
    artifacts.read_run(workdir, checkpoint="7")


def test_a_damaged_checkpoint_is_passed_over(masked, tmp_path, capsys):
  from tests import commands

  workdir = commands.copy_run(masked[0], tmp_path / "run")
  for path in (workdir / "distill" / "checkpoints" / "20").rglob("*"):
    if path.is_file() and "ocdbt" in str(path):
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  assert artifacts.read_run(workdir).step == 10
  assert "checkpoints/20 is damaged and skipped" in capsys.readouterr().out


def test_the_tokenizer_that_a_given_teacher_brought_decodes(masked, tmp_path):
  from tests import commands

  workdir = commands.copy_run(masked[0], tmp_path / "run")
  fitted = prepare.run_tokenizer(masked[1].tokenizer, masked[1].config, workdir)
  prepare.keep_tokenizer(workdir, {"codebook": -np.asarray(fitted["codebook"])})
  inverted = dimo_jax.load(workdir).sample(LABELS, 0)
  assert_same_images(255 - inverted, dimo_jax.load(masked[0]).sample(LABELS, 0))


def test_loading_puts_no_network_on_the_devices(masked):
  def num_bytes():
    return sum(x.nbytes for x in jax.live_arrays())

  before = num_bytes()
  artifact = dimo_jax.load(masked[0])
  network = sum(x.nbytes for x in jax.tree.leaves(artifact.parts.weights["network"]))
  assert num_bytes() - before < network / 10
  artifact.sample(LABELS, 0)
  assert num_bytes() - before > network


def of_absl(caplog):
  """What absl logged; asyncio may report an earlier test's failed reads, once it collects them."""
  return [record.getMessage() for record in caplog.records if record.name == "absl"]


def test_loading_says_nothing(masked, caplog):
  with caplog.at_level("WARNING", logger="absl"):
    dimo_jax.load(masked[0])
  assert not of_absl(caplog)


def test_loading_leaves_a_programs_own_log_alone(masked, caplog):
  def log_too(name, *arguments):
    absl_logging.warning("of the program")
    return original(name, *arguments)

  original = artifacts.local_path
  with caplog.at_level("WARNING", logger="absl"), pytest.MonkeyPatch.context() as patched:
    patched.setattr(artifacts, "local_path", log_too)
    dimo_jax.load(masked[0])
  assert of_absl(caplog) == ["of the program"]


def test_an_older_workdir_needs_its_config(masked, tmp_path):
  from tests import commands

  workdir = commands.copy_run(masked[0], tmp_path / "run", "config.json")
  with pytest.raises(UserError, match=r"holds no config.json; a workdir of an older version"):
    dimo_jax.load(workdir)
  given = artifacts.NetworkArtifact(artifacts.read_run(workdir, masked[1]).parts())
  wanted = dimo_jax.load(masked[0]).sample(LABELS, 0)
  np.testing.assert_array_equal(given.sample(LABELS, 0), wanted)


@pytest.mark.parametrize("kind", ["masked", "gaussian"])
def test_a_teacher_takes_steps(kind, request):
  workdir, experiment = request.getfixturevalue(kind)
  artifact = dimo_jax.load(workdir / "teacher")
  assert (artifact.role, artifact.num_steps) == ("teacher", experiment.decoding.num_steps)
  own = artifact.sample(LABELS, 0)
  np.testing.assert_array_equal(artifact.sample(LABELS, 0, steps=4), own)
  assert (artifact.sample(LABELS, 0, steps=2) != own).any()


def test_fields_can_be_changed(masked):
  workdir, _ = masked
  plain = dimo_jax.load(workdir).sample_tokens(LABELS, 0)
  cold = dimo_jax.load(workdir, fields={"sampling.temperature": 0.01})
  assert (cold.sample_tokens(LABELS, 0) != plain).any()
  with pytest.raises(UserError, match=r"sampling.temprature=1: no such field; did you mean 's"):
    dimo_jax.load(workdir, fields={"sampling.temprature": 1})
  with pytest.raises(UserError, match=r"model.num_heads='many': "):
    dimo_jax.load(workdir, fields={"model.num_heads": "many"})
  with pytest.raises(UserError, match=r"sampling.temperature=-1.0 must be positive"):
    dimo_jax.load(workdir, fields={"sampling.temperature": -1.0})


@pytest.mark.parametrize(
  ("arguments", "needle"),
  [
    (([10], 0), r"labels hold 10; class ids lie in 0 .. 9"),
    (([-1], 0), r"labels hold -1"),
    (([], 0), r"labels=\[\] must be a list of class ids"),
    (([0.5], 0), r"labels=\[0.5\] must be a list"),
    (([1], -1), r"seed=-1 must lie in 0 .. 4294967295"),
    (([1], 2**32), r"seed=4294967296 must lie"),
    (([1], 0, 5), r"steps=5 is for teachers; .* takes 1"),
    (([1], 0, 0), r"steps=0 must be 1 or more"),
  ],
)
def test_bad_arguments_have_one_line(masked, arguments, needle):
  with pytest.raises(UserError, match=needle):
    dimo_jax.load(masked[0]).sample(*arguments)


def test_what_cannot_be_loaded_says_so(masked, tmp_path):
  with pytest.raises(UserError, match=r"nowhere' does not exist"):
    dimo_jax.load(tmp_path / "nowhere")
  with pytest.raises(UserError, match=r"holds no weights, such as teacher\.safetensors"):
    dimo_jax.load(tmp_path)
  save_file({"codebook": np.zeros((4, 4), np.float32)}, tmp_path / "foreign.safetensors")
  with pytest.raises(UserError, match="is of no known family"):
    dimo_jax.load(tmp_path / "foreign.safetensors")
  with pytest.raises(UserError, match="is a VQGAN: it decodes"):
    dimo_jax.load(GOLDEN / "02_vqgan_last.ckpt")
  arrays = load_file(masked[0] / "teacher" / "teacher.safetensors")
  save_file(arrays, tmp_path / "old.safetensors", {"dimo_jax": json.dumps({"teacher": {}})})
  with pytest.raises(UserError, match="records no config: an older version wrote it"):
    dimo_jax.load(tmp_path / "old.safetensors")
  (tmp_path / "begun" / "distill").mkdir(parents=True)
  (tmp_path / "begun" / "config.json").write_text("{")
  with pytest.raises(UserError, match="holds no distillation yet"):
    dimo_jax.load(tmp_path / "begun")


def test_a_recipe_survives_json(tmp_path):
  experiment = build(debug.get_config("dmd2"))
  recipe = prepare.recipe(experiment)
  recipe.save(tmp_path)
  read = Recipe.load(tmp_path)
  assert read == recipe and read.config.is_locked
  assert read.models("x").student_sampler == experiment.student_sampler
  (tmp_path / "config.json").write_text("[1]")
  with pytest.raises(UserError, match="holds no recorded config"):
    Recipe.load(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match="cannot be read"):
    Recipe.load(tmp_path)
  (tmp_path / "config.json").unlink()
  with pytest.raises(UserError, match=r"holds no config.json; a workdir of an older version"):
    Recipe.load(tmp_path)
  record = recipe.to_dict()
  older = json.loads(json.dumps(record))
  del older["config"]["train"]["ema_memory"], older["config"]["tested"]
  filled = Recipe.from_dict(older, "it").config
  assert filled.train.ema_memory == "device" and filled.tested.batch_size == ()
  record["version"] = "0.0.1"
  with pytest.raises(UserError, match=r"recorded by dimo_jax 0.0.1, and this version differs"):
    Recipe.from_dict({**record, "config": {**record["config"], "dmd2": {}}}, "it").models("it")


# What no shape of the recorded masked network says: its heads, and how its table divides.
FIELDS = {"model.num_heads": 4, "tokenizer.codebook_size": 32, "data.num_classes": 10}


@pytest.fixture
def vqgan(tmp_path):
  """The recorded VQGAN as it is published: its settings beside it say how large its images are."""
  folder = tmp_path / "vqgan"
  folder.mkdir()
  for name in ("last.ckpt", "model.yaml"):
    shutil.copy(GOLDEN / f"02_vqgan_{name}", folder / name)
  return str(folder / "last.ckpt")


@pytest.mark.parametrize(
  ("name", "family", "role"),
  [
    ("01_masktransformer.pth", "", "teacher"),
    ("01_ema_model", "", "generator"),
    ("01_masktransformer.safetensors", "dimo", "generator"),
  ],
)
def test_published_masked_networks_make_tokens(name, family, role, vqgan):
  artifact = dimo_jax.load(GOLDEN / name, family=family, fields=FIELDS)
  assert (artifact.role, artifact.kind, artifact.num_classes) == (role, "masked", 10)
  steps = 2 if role == "teacher" else None
  tokens = artifact.sample_tokens(LABELS, 0, steps)
  assert tokens.shape == (5, 16) and tokens.min() >= 0 and tokens.max() < 32
  assert len(np.unique(tokens)) > 4
  with pytest.raises(
    UserError, match=r"makes tokens and holds no decoder; name its VQGAN with --t"
  ):
    artifact.sample(LABELS, 0)
  with pytest.raises(UserError, match=r"tokenizer.grid_size=8; wanted is 4"):
    dimo_jax.load(GOLDEN / name, family=family, fields=FIELDS, tokenizer=vqgan)


def test_the_number_of_heads_must_be_told_where_nothing_says_it(tmp_path):
  from dimo_jax.convert.__main__ import convert

  fields = {name: value for name, value in FIELDS.items() if name != "model.num_heads"}
  convert(str(GOLDEN / "01_ema_model"), "", tmp_path)
  for path in (GOLDEN / "01_ema_model", tmp_path / "generator.safetensors"):
    with pytest.raises(UserError, match=r"is 64 wide, and nothing .* --field=model.num_heads=N"):
      dimo_jax.load(path, fields=fields)
    four, two = (
      dimo_jax.load(path, fields=fields | {"model.num_heads": n}).sample_tokens(LABELS, 0)
      for n in (4, 2)
    )
    assert (four != two).any()
  with pytest.raises(UserError, match=r"model.num_heads=5 must divide model.hidden_dim=64"):
    dimo_jax.load(path, fields=fields | {"model.num_heads": 5})


@pytest.mark.ci
def test_a_vqgan_decodes_the_tokens_of_a_published_network(tmp_path, vqgan):
  network = MaskTransformer(
    num_tokens=64, codebook_size=32, num_classes=10, hidden_dim=32, num_layers=1, num_heads=4,
    mlp_dim=32,
  )  # fmt: skip
  tokens, labels = jnp.zeros((1, 64), jnp.int32), jnp.zeros(1, jnp.int32)
  params = network.init(jax.random.key(0), tokens, labels)["params"]
  save_file(maskgit.to_published(params), tmp_path / "model.safetensors")
  options = {"family": "dimo", "fields": FIELDS}
  plain = dimo_jax.load(tmp_path, **options)
  artifact = dimo_jax.load(tmp_path, tokenizer=vqgan, **options)
  images = artifact.sample(LABELS, 3)
  assert images.shape == (5, 16, 16, 3) and images.std() > 1
  np.testing.assert_array_equal(artifact.sample_tokens(LABELS, 3), plain.sample_tokens(LABELS, 3))
  with pytest.raises(UserError, match="is no VQGAN"):
    dimo_jax.load(tmp_path, tokenizer=str(tmp_path), **options)


@pytest.mark.parametrize(
  ("name", "role", "num_steps"),
  [
    ("07_dmd2_release/pytorch_model.bin", "generator", 1),
    pytest.param("07_dmd2_release/pytorch_model_1.bin", "teacher", 2, marks=pytest.mark.ci),
    pytest.param("07_edm_song_ddpmpp.safetensors", "teacher", 2, marks=pytest.mark.ci),
  ],
)
def test_published_denoisers_make_images(name, role, num_steps):
  artifact = dimo_jax.load(GOLDEN / name)
  assert (artifact.role, artifact.kind) == (role, "gaussian")
  labels = np.arange(2) % max(artifact.num_classes, 1)
  images = artifact.sample(labels, 0, steps=num_steps)
  assert images.shape == (2, *artifact.image_shape) and images.std() > 1
  with pytest.raises(UserError, match="makes images, not tokens"):
    dimo_jax.load(GOLDEN / name, tokenizer=str(GOLDEN / "02_vqgan_last.ckpt"))


def test_converted_weights_can_be_loaded(tmp_path):
  from dimo_jax.convert.__main__ import convert

  source = GOLDEN / "07_dmd2_release" / "pytorch_model.bin"
  convert(str(source), "", tmp_path)
  wanted = dimo_jax.load(source).sample([0, 1], 0)
  artifact = dimo_jax.load(tmp_path / "generator.safetensors")
  assert artifact.role == "generator"
  np.testing.assert_array_equal(artifact.sample([0, 1], 0), wanted)


def test_grey_denoisers_are_known_converted_or_not(tmp_path):
  from dimo_jax.convert.__main__ import convert

  model = ADM(img_resolution=8, img_channels=1, label_dim=3, model_channels=64, channel_mult=(1,))
  network = EDMPrecond(model.clone(num_blocks=1, attn_resolutions=()))
  arguments = jnp.zeros((1, 8, 8, 1)), jnp.ones(1), jnp.zeros(1, jnp.int32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  save_file(edm.to_published(params, network), tmp_path / "model.safetensors")
  convert(str(tmp_path / "model.safetensors"), "", tmp_path / "converted")
  for path in (tmp_path / "model.safetensors", tmp_path / "converted" / "teacher.safetensors"):
    assert dimo_jax.load(path).image_shape == (8, 8, 1)


@pytest.mark.ci
def test_loading_defines_no_flags():
  """A library in a program with flags of its own."""
  code = (
    "import dimo_jax; dimo_jax.load; from absl import flags; assert 'config' not in flags.FLAGS"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=GOLDEN.parent.parent)
