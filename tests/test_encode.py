"""Codes of training images: the same training as on the images, and nothing mistaken for them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import debug
from dimo_jax import prepare
from dimo_jax.build import build
from dimo_jax.checkpoint import params_hash
from dimo_jax.data.pipeline import image_batches
from dimo_jax.encode import encode
from dimo_jax.evaluation.generation import encode_images
from dimo_jax.objectives.denoising import MaskedDenoising
from dimo_jax.preemption import STOP, Preempted
from dimo_jax.state import PretrainState
from dimo_jax.step import pretrain_step
from dimo_jax.types import UserError
from tests import commands
from tests.helpers import VQGAN_SIZES as SIZES


def make(folder, num=21, **data):
  """An experiment on random images of a file."""
  path = folder / "images.npz"
  if not path.exists():
    rng = np.random.default_rng(0)
    arrays = {
      f"images_{split}": rng.integers(256, size=(num, 8, 8, 3), dtype=np.uint8)
      for split in ("train", "test")
    }
    labels = np.arange(num) % 10
    np.savez(path, labels_train=labels, labels_test=labels, **arrays)
  config = debug.get_config()
  config.evaluation.protocol = "none"
  config.data.update(name="arrays", path=str(path), flip=True)
  config.data.update(data)
  config.tokenizer.update(name="vqgan", path="random", **SIZES)
  return build(config)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
  folder = tmp_path_factory.mktemp("encode")
  encode(make(folder), str(folder / "codes"), batch_size=8)
  return folder


def batches(experiment, source, steps=3):
  options = {"batch_size": 16, "seed": 3, "start_step": 0, "num_steps": steps}
  return list(image_batches(source, flip=experiment.config.data.flip, **options))


@pytest.mark.parametrize("flip", [True, False])
def test_codes_are_those_of_the_images_that_a_batch_would_have(encoded, flip):
  experiment = make(encoded, tokens=str(encoded / "codes"), flip=flip)
  params = experiment.tokenizer.fit(None, experiment.config.seed)
  source = prepare.training_source(experiment, params)
  images = batches(experiment, experiment.source("train"))
  tokens = batches(experiment, source)
  for wanted, found in zip(images, tokens, strict=True):
    assert set(found) == {"tokens", "class_id"} and found["tokens"].dtype == np.int32
    np.testing.assert_array_equal(found["class_id"], wanted["class_id"])
    codes = encode_images(experiment.tokenizer, params, wanted["image"], experiment.mesh)
    np.testing.assert_array_equal(found["tokens"], codes)
  plain = experiment.source("train")
  mirrored = any(
    not any(np.array_equal(image, plain[i]["image"]) for i in range(len(plain)))
    for image in images[0]["image"]
  )
  assert mirrored == flip


class Mean(MaskedDenoising):
  """A loss that tells what was encoded."""

  def draw(self, key, batch_size):
    del key, batch_size

  def loss(self, params, network, encoded, batch, draws):
    del params, network, draws
    loss = jnp.mean(encoded * (1.0 + batch["class_id"][:, None]))
    return loss, {"teacher/loss": loss}


def test_an_update_on_codes_is_the_update_on_images(encoded):
  experiment = make(encoded, tokens=str(encoded / "codes"))
  params = experiment.tokenizer.fit(None, experiment.config.seed)
  network = experiment.teacher.trained_state({"w": jnp.ones(3)}, optax.sgd(0.1))
  state = PretrainState(network, network.params)
  objective, losses = Mean(**vars(experiment.pretraining)), []
  for source in (experiment.source("train"), prepare.training_source(experiment, params)):
    batch = batches(experiment, source, 1)[0]
    step = jax.jit(functools.partial(pretrain_step, objective, experiment.tokenizer, 0.9))
    losses.append(float(step(state, params, batch, jax.random.key(0))[1]["teacher/loss"]))
  assert losses[0] == losses[1] > 1


@pytest.mark.ci
def test_a_teacher_is_trained_on_codes_as_on_images(encoded, tmp_path_factory, tmp_path):
  """Through the command."""
  command = (
    "--config=configs/debug.py",
    "--mode=teacher",
    "--config.data.name=arrays",
    f"--config.data.path={encoded / 'images.npz'}",
    "--config.data.flip=True",
    "--config.evaluation.protocol=none",
    "--config.tokenizer.name=vqgan",
    "--config.tokenizer.path=random",
    *(f"--config.tokenizer.{name}={value}" for name, value in SIZES.items()),
    "--config.teacher.pretrain.num_steps=4",
    "--config.teacher.pretrain.optim.num_warmup=1",
    "--config.log.every_steps=1",
    "--config.log.pictures_every_steps=0",
  )
  codes = f"--config.data.tokens={encoded / 'codes'}"
  with commands.shared_folder(tmp_path_factory) as shared:
    commands.run(shared, tmp_path / "images", command=command)
    commands.run(shared, tmp_path / "codes", codes, command=command)
  rows = [commands.rows(tmp_path / name / "teacher") for name in ("images", "codes")]
  assert len(rows[0]) == 4
  for image_row, code_row in zip(*rows, strict=True):
    assert image_row == pytest.approx(code_row, rel=1e-5)


def test_an_interrupted_encoding_goes_on(encoded, tmp_path, monkeypatch, capsys):
  experiment, codes = make(encoded), tmp_path / "codes"
  monkeypatch.setattr(STOP, "signal", 15)
  with pytest.raises(Preempted):
    encode(experiment, str(codes), batch_size=8)
  assert json.loads((codes / "tokens.json").read_text())["num_done"] == 8
  monkeypatch.setattr(STOP, "signal", None)
  unfinished = make(encoded, tokens=str(codes))
  params = experiment.tokenizer.fit(None, experiment.config.seed)
  with pytest.raises(UserError, match="is not finished, 8 of 21: run the"):
    prepare.training_source(unfinished, params)
  encode(experiment, str(codes), batch_size=8)
  assert "8 of 21 images were encoded before" in capsys.readouterr().out
  for name in ("tokens.npy", "tokens.json"):
    assert (codes / name).read_bytes() == (encoded / "codes" / name).read_bytes()
  encode(experiment, str(codes))
  assert "is ready already" in capsys.readouterr().out


def test_other_codes_are_refused(encoded, tmp_path):
  experiment = make(encoded, tokens=str(encoded / "codes"))
  params = experiment.tokenizer.fit(None, experiment.config.seed)
  other = jax.tree.map(lambda x: x + 1, params)
  assert params_hash(other) != params_hash(params)
  with pytest.raises(UserError, match=r"holds codes of another tokenizer than tokenizer\.path"):
    prepare.training_source(experiment, other)
  experiment.config.precision.compute_dtype = "bfloat16"
  with pytest.raises(UserError, match=r"another precision than precision\.compute_dtype"):
    prepare.training_source(experiment, params)
  moved = make(tmp_path, num=30, tokens=str(encoded / "codes"))
  with pytest.raises(UserError, match=r"holds codes of another data set than data\.path"):
    prepare.training_source(moved, params)
  with pytest.raises(UserError, match="codes of other images or another tokenizer; name a new one"):
    encode(make(tmp_path), str(encoded / "codes"))
  inverted = tmp_path / "inverted"  # as many images, of the same classes
  inverted.mkdir()
  arrays = dict(np.load(encoded / "images.npz"))
  np.savez(inverted / "images.npz", **arrays | {"images_train": 255 - arrays["images_train"]})
  with pytest.raises(UserError, match="codes of other images or another tokenizer; name a new one"):
    encode(make(inverted), str(encoded / "codes"))
  with pytest.raises(UserError, match=r"holds codes of another data set than data\.path"):
    prepare.training_source(make(inverted, tokens=str(encoded / "codes")), params)
  missing = make(encoded, tokens=str(tmp_path / "none"))
  with pytest.raises(UserError, match=r"must be a folder that python -m dimo_jax\.encode made"):
    prepare.training_source(missing, params)


def test_what_has_no_codes_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"'vqgan'; tokenizer\.name='patch'"):
    encode(build(debug.get_config()), str(tmp_path / "codes"))
  config = debug.get_config()
  config.teacher.path = "random"
  config.data.tokens = "codes"
  with pytest.raises(UserError, match=r"data\.tokens='codes' is what a teacher is trained on"):
    build(config)
