"""Every field of the configs is read by code, documented, and every preset can be built."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re
import tokenize

import jax
import numpy as np
import pytest
from flax import traverse_util

from configs import (
  base,
  benchmark,
  debug,
  digits_dmd2,
  imagenet64,
  imagenet64_teacher,
  imagenet256_teacher,
)
from dimo_jax.build import build
from dimo_jax.health import Health
from dimo_jax.models.mask_transformer import MaskTransformer
from dimo_jax.models.mlp import DenoisingMLP
from dimo_jax.models.unet import ADM, SongUNet
from dimo_jax.models.vqgan import VQGAN
from dimo_jax.objectives.denoising import GaussianDenoising, MaskedDenoising
from dimo_jax.objectives.dimo import Dimo
from dimo_jax.objectives.dmd2 import Dmd2
from dimo_jax.optim import OptimizerSpec
from dimo_jax.processes.gaussian import Edm, VariancePreserving
from dimo_jax.samplers.edm import FewStep, Heun
from dimo_jax.samplers.maskgit import MaskGit
from dimo_jax.samplers.one_step import OneStep
from dimo_jax.start import initial_state
from dimo_jax.state import PretrainState
from dimo_jax.teachers.tokenizers import NoTokenizer, PatchTokenizer
from dimo_jax.types import UserError

ROOT = pathlib.Path(__file__).parent.parent
PRESETS = sorted(p.stem for p in (ROOT / "configs").glob("[a-z]*.py"))
FIELDS = sorted(traverse_util.flatten_dict(base.get_config().to_dict(), sep="."))

# Sections whose fields are those of an object, or of one of several: their tests flip each field.
OBJECTS = {
  "model.": (MaskTransformer,),
  "tokenizer.": (VQGAN, PatchTokenizer, NoTokenizer),
  "denoiser.": (ADM, SongUNet, DenoisingMLP),
  "process.": (Edm, VariancePreserving),
  "teacher.pretrain.optim.": (OptimizerSpec,),
  "teacher.pretrain.": (MaskedDenoising, GaussianDenoising),
  "teacher.decoding.": (MaskGit,),
  "teacher.sampling.": (Heun,),
  "dimo.": (Dimo,),
  "dmd2.": (Dmd2,),
  "optim.generator.": (OptimizerSpec,),
  "optim.fake_score.": (OptimizerSpec,),
  "sampling.": (OneStep, FewStep),
  "health.": (Health,),
}


def read_attributes() -> set[str]:
  """`section.name` of every `....section.name` and `....section["name"]` in the package."""
  found = set()
  for path in (ROOT / "dimo_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute):
        owner = node.value
        name = getattr(owner, "attr", getattr(owner, "id", "")).lstrip("_")
        found.add(f"{name}.{node.attr}")
      elif isinstance(node, ast.Tuple):  # (section, name) pairs that a loop reads
        parts = [e.value for e in node.elts if isinstance(e, ast.Constant)]
        if len(parts) == len(node.elts) == 2:
          found.add(f"{parts[0]}.{parts[1]}")
  return found


def object_of(field: str) -> type | None:
  """The class that takes a field as an argument."""
  for prefix, kinds in OBJECTS.items():
    name = field.removeprefix(prefix)
    for kind in kinds:
      if field.startswith(prefix) and name in {f.name for f in dataclasses.fields(kind)}:
        return kind
  return None


def test_every_field_is_read():
  read = read_attributes()
  plain = [field for field in FIELDS if object_of(field) is None]
  unread = [
    field
    for field in plain
    if ".".join(field.split(".")[-2:]) not in read and f"config.{field}" not in read
  ]
  assert not unread
  assert "train.nonsense" not in read


def test_every_field_has_its_line():
  """Once, in base.py; the optimisers' fields once in their helper."""
  source = inspect.getsource(base)
  for field in FIELDS:
    name = field.split(".")[-1]
    lines = [line for line in source.splitlines() if f".{name} = " in line or f"{name}=" in line]
    assert lines, field


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_only_overrides_and_says_how_it_is_run(preset):
  module = importlib.import_module(f"configs.{preset}")
  config = module.get_config()
  assert config.is_locked
  assert set(traverse_util.flatten_dict(config.to_dict(), sep=".")) == set(FIELDS)
  assert preset == "base" or f"--config=configs/{preset}.py" in module.__doc__


NEED_IMAGENET = ("imagenet64", "imagenet64_teacher", "imagenet256_teacher")


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in ("base", *NEED_IMAGENET)])
def test_a_preset_can_be_built(preset):
  config = importlib.import_module(f"configs.{preset}").get_config()
  config.train.batch_size = max(config.train.batch_size, jax.device_count())
  if preset in ("benchmark", "imagenet256"):
    config.teacher.path = "random"
  experiment = build(config)
  assert experiment.num_updates == config.train.num_steps * config[config.objective].fake_rounds
  assert not experiment.untested


def test_other_batches_and_rates_than_were_tried_are_warned_of():
  config = digits_dmd2.get_config()
  config.train.update(batch_size=8, accumulation=4)
  config.optim.fake_score.learning_rate = 0.01
  batch, rate = build(config).untested
  assert "train.batch_size * train.accumulation=32 lies outside of 128 .. 128" in batch
  assert "optim.fake_score.learning_rate=0.01 lies outside of 0.0003 .. 0.001" in rate
  config.tested.update(batch_size=(), learning_rate=())
  assert not build(config).untested
  config.tested.batch_size = (64,)
  with pytest.raises(UserError, match=r"tested\.batch_size=\(64,\) must be \(\) or"):
    build(config)


@pytest.mark.parametrize("variant", imagenet64.VARIANTS)
def test_imagenet64_is_the_published_network(variant):
  """296 M parameters (published); the images here are a stand-in for the data set."""
  config = imagenet64.get_config(variant)
  config.data.update(name="noise", image_size=64, tfds_name="")
  config.teacher.path = "random"
  experiment = build(config)
  shapes = jax.eval_shape(experiment.teacher.init, jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(296e6, rel=0.002)
  assert experiment.objective.has_critic is (variant != "no_gan")
  assert experiment.student_sampler.sigmas == (80.0,)


@pytest.mark.parametrize(
  ("module", "millions"),
  [(imagenet256_teacher, 174.161), (imagenet64_teacher, 295.90)],
  ids=["maskgit", "edm"],
)
def test_the_teachers_train_the_published_networks(module, millions):
  """Published: 174.161 M parameters of MaskGIT; EDM's are counted in the PyTorch network."""
  config = module.get_config()
  size = 256 if module is imagenet256_teacher else 64
  config.data.update(name="noise", image_size=size)
  if config.tokenizer.name == "vqgan":
    config.tokenizer.path = "random"
  experiment = build(config)
  assert experiment.tokenizer.image_shape == (size, size, 3)
  shapes = jax.eval_shape(experiment.teacher.init, jax.random.key(0))
  total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert total / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_published_settings_of_the_teachers():
  """arXiv:2310.14400 with its release v1.0, and EDM's table of training configurations."""
  config = imagenet256_teacher.get_config()
  pretrain = config.teacher.pretrain
  assert (pretrain.num_steps, pretrain.batch_size, pretrain.ema_decay) == (755_200, 512, 0.0)
  assert (pretrain.mask_schedule, pretrain.mask_kind) == ("arccos", "bernoulli")
  assert (pretrain.loss_positions, pretrain.label_smoothing) == ("all", 0.1)
  assert (pretrain.condition_drop_rate, pretrain.dropout, config.model.dropout) == (0.1, True, 0.1)
  optim = pretrain.optim
  assert (optim.name, optim.learning_rate, optim.b1, optim.b2) == ("adamw", 1e-4, 0.9, 0.96)
  assert (optim.weight_decay, optim.clip_norm, optim.num_warmup) == (1e-5, 1.0, 0)
  assert optim.schedule == "constant" and config.data.flip

  config = imagenet64_teacher.get_config()
  pretrain = config.teacher.pretrain
  assert (pretrain.num_steps, pretrain.batch_size) == (610_352, 4096)
  assert pretrain.ema_decay ** (50e6 / 4096) == pytest.approx(0.5)
  assert (pretrain.noise_levels, pretrain.noise_mean, pretrain.noise_std) == (
    "log_normal", -1.2, 1.2
  )  # fmt: skip
  assert (pretrain.condition_drop_rate, pretrain.dropout) == (0.0, True)
  assert config.denoiser.dropout == 0.1 and not config.data.flip
  optim = pretrain.optim
  assert (optim.name, optim.learning_rate, optim.b1, optim.b2) == ("adam", 1e-4, 0.9, 0.999)
  assert (optim.weight_decay, optim.clip_norm, optim.eps) == (0.0, 0.0, 1e-8)
  assert optim.schedule == "constant" and optim.num_warmup * 4096 == pytest.approx(10e6, rel=1e-3)


@pytest.mark.parametrize(
  ("variant", "millions"), [("dimo", 7.62), ("dmd2", 12.25)], ids=["dimo", "dmd2"]
)
def test_the_benchmarks_networks_are_the_references(variant, millions):
  """Counted in the PyTorch networks that they are timed against."""
  config = benchmark.get_config(variant)
  config.teacher.path = "random"
  config.train.batch_size = 8  # a multiple of the fake devices
  experiment = build(config)
  shapes = jax.eval_shape(experiment.teacher.init, jax.random.key(0))
  total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert total / 1e6 == pytest.approx(millions, abs=0.005)
  if variant == "dmd2":
    state = experiment.teacher.frozen_state(shapes, {})
    critic = jax.eval_shape(
      lambda s: experiment.objective.fake_score_params(jax.random.key(0), s), state
    )["critic"]
    assert sum(leaf.size for leaf in jax.tree.leaves(critic)) == 1_180_993


def test_variants_are_named():
  assert len(digits_dmd2.get_config("four_step").dmd2.student_sigmas) == 4
  for module in (digits_dmd2, imagenet64, benchmark):
    with pytest.raises(ValueError, match="nope is unknown; known: "):
      module.get_config("nope")


def test_the_published_settings_are_the_defaults():
  """Di[M]O, arXiv:2503.15457, and its release: what a reader would look up first."""
  config = base.get_config()
  assert (config.model.hidden_dim, config.model.num_layers, config.model.num_heads) == (768, 24, 16)
  assert (config.tokenizer.grid_size, config.tokenizer.codebook_size) == (16, 1024)
  assert (config.dimo.r_init, config.dimo.sigma, config.dimo.teacher_guidance) == (0.6, 0.1, 2.0)
  assert (config.dimo.mask_schedule, config.dimo.label_smoothing) == ("arccos", 0.1)
  assert (config.train.batch_size, config.train.ema_decay) == (128, 0.9999)


def test_the_published_settings_of_dmd2():
  """DMD2, arXiv:2405.14867, and its release, ImageNet-64; updates are the fake score's."""
  updates = {"gan": 200_000, "no_gan": 410_000, "second_stage": 140_000}
  for variant, num_updates in updates.items():
    config = imagenet64.get_config(variant)
    dmd2, denoiser = config.dmd2, config.denoiser
    assert config.train.num_steps * dmd2.fake_rounds == num_updates and dmd2.fake_rounds == 5
    for optimizer in (config.optim.generator, config.optim.fake_score):
      assert optimizer.name == "adamw" and optimizer.weight_decay == 0.01
      assert optimizer.learning_rate == (5e-7 if variant == "second_stage" else 2e-6)
      assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-8)
      assert (optimizer.clip_norm, optimizer.num_warmup) == (10.0, 500)
      assert optimizer.schedule == "constant"
    weights = dmd2.gan_generator_weight, dmd2.gan_critic_weight
    assert weights == ((0.0, 0.0) if variant == "no_gan" else (3e-3, 1e-2))
    assert (config.train.batch_size, config.train.ema_decay) == (280, 0.0)
    assert dmd2.student_sigmas == (80.0,) and (dmd2.min_level, dmd2.max_level) == (0.02, 0.98)
    assert (dmd2.teacher_guidance, dmd2.divergence, dmd2.r1_weight) == (1.0, "reverse_kl", 0.0)
    process = config.process
    assert (process.num_levels, process.sigma_min, process.sigma_max) == (1000, 0.002, 80.0)
    assert (process.rho, process.sigma_data) == (7.0, 0.5)
    assert (denoiser.name, denoiser.model_channels, denoiser.num_blocks) == ("adm", 192, 3)
    assert config.precision.compute_dtype == "bfloat16"


def test_no_line_of_base_is_without_a_purpose():
  """No commented-out settings."""
  with open(ROOT / "configs" / "base.py", "rb") as stream:
    comments = [t.string for t in tokenize.tokenize(stream.readline) if t.type == tokenize.COMMENT]
  assert not [c for c in comments if c.lstrip("# ").startswith(("config.", "dimo.", "train."))]


def test_equal_configs_build_equal_objectives():
  """What jit takes as static is equal by value, so nothing is compiled twice."""
  one, other = (build(importlib.import_module("configs.debug").get_config()) for _ in range(2))
  assert one.objective == other.objective and hash(one.objective) == hash(other.objective)
  assert one.decoding == other.decoding and one.student_sampler == other.student_sampler
  np.testing.assert_array_equal(one.decoding.counts(), other.decoding.counts())


@pytest.mark.parametrize("variant", ["dimo", "dmd2"])
def test_rules_may_name_whatever_a_run_puts_on_the_mesh(variant):
  config = debug.get_config(variant)
  experiment = build(config)

  def on_the_mesh(tokenizer_params):
    teacher, params = experiment.teacher, experiment.teacher.init(jax.random.key(0))
    network = teacher.trained_state(params, experiment.pretrain_optimizer.build(20))
    return [
      initial_state(experiment, params)(),
      teacher.frozen_state(params, tokenizer_params),
      PretrainState(network, params),
    ]

  states = jax.eval_shape(on_the_mesh, experiment.tokenizer.shapes())
  names = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for state in states
    for path, _ in jax.tree_util.tree_leaves_with_path(state)
  }
  assert len({name.partition("/")[0] for name in names}) > 5
  config.mesh.rules = tuple((f"^{re.escape(name)}$", None) for name in sorted(names))
  build(config)
  config.teacher.path = "random"
  with pytest.raises(UserError, match=r"matches nothing; .* such as generator/params/"):
    build(config)
