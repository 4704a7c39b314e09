"""Every field of the configs is read by code, documented, and every preset can be built."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import tokenize

import jax
import numpy as np
import pytest
from flax import traverse_util

from configs import base, digits_dmd2, imagenet64
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
from dimo_jax.teachers.tokenizers import NoTokenizer, PatchTokenizer

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


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in ("base", "imagenet64")])
def test_a_preset_can_be_built(preset):
  config = importlib.import_module(f"configs.{preset}").get_config()
  config.train.batch_size = max(config.train.batch_size, jax.device_count())
  if preset in ("benchmark", "imagenet256"):
    config.teacher.path = "random"
  experiment = build(config)
  assert experiment.num_updates == config.train.num_steps * config[config.objective].fake_rounds


@pytest.mark.parametrize("variant", imagenet64.VARIANTS)
def test_imagenet64_is_the_published_network(variant, tmp_path):
  """296 M parameters (published); the images here are a stand-in for the data set."""
  config = imagenet64.get_config(variant)
  arrays = {}
  for split in ("train", "test"):
    arrays[f"images_{split}"] = np.zeros((1000, 64, 64, 3), np.uint8)
    arrays[f"labels_{split}"] = np.arange(1000)
  np.savez(tmp_path / "arrays.npz", **arrays)
  config.data.update(name="arrays", path=str(tmp_path / "arrays.npz"), tfds_name="")
  config.teacher.path = "random"
  experiment = build(config)
  shapes = jax.eval_shape(experiment.teacher.init, jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(296e6, rel=0.002)
  assert experiment.objective.has_critic is (variant != "no_gan")
  assert experiment.student_sampler.sigmas == (80.0,)


def test_variants_are_named():
  assert len(digits_dmd2.get_config("four_step").dmd2.student_sigmas) == 4
  for module in (digits_dmd2, imagenet64):
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
