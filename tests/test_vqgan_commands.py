"""Di[M]O on labels alone with a VQGAN: pictures without images, from the command line."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import debug, imagenet256
from dimo_jax import prepare, train
from dimo_jax.build import build
from dimo_jax.types import UserError
from tests import commands
from tests.helpers import GOLDEN
from tests.helpers import VQGAN_SIZES as SIZES

COMMAND = (
  "--config=configs/debug.py",
  "--config.data.name=labels",
  "--config.evaluation.protocol=none",
  "--config.teacher.path=random",
  "--config.tokenizer.name=vqgan",
  "--config.tokenizer.path=random",
  *(f"--config.tokenizer.{name}={value}" for name, value in SIZES.items()),
  "--config.optim.generator.num_warmup=0",
  "--config.optim.fake_score.num_warmup=0",
  "--config.train.num_steps=2",
  "--config.log.every_steps=1",
)


def config(**fields):
  """The same in this process, with changes to `tokenizer`."""
  config = debug.get_config()
  config.data.name = "labels"
  config.evaluation.protocol = "none"
  config.teacher.path = "random"
  config.tokenizer.update(name="vqgan", path="random", **SIZES)
  config.tokenizer.update(fields)
  return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  with commands.shared_folder(tmp_path_factory) as folder:
    workdir = folder / "vqgan"
    if not (workdir / "distill" / "pictures" / "step_0000002.png").exists():
      commands.run(folder, workdir, command=COMMAND)
  return workdir


@pytest.mark.ci
def test_training_on_labels_draws_pictures(workdir):
  with Image.open(workdir / "distill" / "pictures" / "step_0000002.png") as image:
    pixels = np.asarray(image)
  # Two rows of ten for each network, 8x8 pixels enlarged to 32x32.
  assert pixels.shape == (16 + 2 * 34 - 2, 3 * (10 * 34 - 2) + 2 * 8, 3)
  row = commands.rows(workdir / "distill")[-1]
  assert row["generator/contrast"] > 0.02
  record = json.loads((workdir / "tokenizer" / "record.json").read_text())
  assert len(record["tokenizer.sha256"]) == 64 and "tokenizer.path" not in record
  assert not list(workdir.glob("tokenizer/*.safetensors"))


@pytest.mark.ci
def test_sampling_decodes_the_students_tokens(workdir, tmp_path_factory, tmp_path):
  with commands.shared_folder(tmp_path_factory) as folder:
    out = tmp_path / "grid.png"
    commands.run(
      folder, workdir, "--mode=sample", "--labels=3,1,4", f"--out={out}", command=COMMAND
    )
  with Image.open(out) as image:
    pixels = np.asarray(image)
  assert pixels.shape == (32, 3 * 34 - 2, 3)
  assert pixels[:, :32].std() > 2


def test_another_tokenizer_file_is_another_run(tmp_path):
  experiment = build(config())
  params = prepare.fit_tokenizer(experiment, tmp_path)
  assert prepare.fit_tokenizer(experiment, tmp_path).keys() == params.keys()
  path = tmp_path / "tokenizer" / "record.json"
  record = json.loads(path.read_text())
  path.write_text(json.dumps(record | {"tokenizer.sha256": "0" * 64}))
  with pytest.raises(UserError, match=r"tokenizer\.sha256 '000"):
    prepare.fit_tokenizer(experiment, tmp_path)


def test_the_tokenizers_file_is_checked_before_any_compute(tmp_path):
  golden = {"channel_mult": (1, 2), "z_channels": 16, "code_dim": 16}
  golden |= {"grid_size": 8, "attn_resolutions": (8,)}
  path = str(GOLDEN / "02_vqgan_last.ckpt")
  prepare.check_workdir(build(config(path=path, **golden)), tmp_path)
  for fields, needle in (
    ({"path": path}, f"tokenizer.path='{path}': does not fit .*z_channels 16 for 8"),
    ({"path": str(tmp_path / "none.ckpt")}, "tokenizer.path=.*none.ckpt does not exist"),
    (
      {"path": str(GOLDEN / "01_masktransformer.safetensors")},
      "tokenizer.path=.*it is a MaskGIT, not",
    ),
  ):
    with pytest.raises(UserError, match=needle) as error:
      prepare.check_workdir(build(config(**fields)), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("fields", "needle"),
  [
    ({"path": ""}, "tokenizer.path='' must name the weights"),
    ({"name": "none"}, "tokenizer.path='random' is for tokenizer.name='vqgan'"),
    ({"patch_size": 4}, r"tokenizer.patch_size=4 must be 2, as tokenizer.channel_mult=\(1, 1\)"),
    ({"channels": 8}, "tokenizer.channels=8"),
  ],
)
def test_a_tokenizer_that_cannot_be_is_refused(fields, needle):
  with pytest.raises(UserError, match=needle):
    build(config(**fields))


def test_images_must_have_the_tokenizers_size():
  fields = config(grid_size=8)
  fields.data.name = "digits"
  with pytest.raises(UserError, match=r"images of shape \(16, 16, 3\).*'digits' have \(8, 8, 1\)"):
    build(fields)


def test_a_teachers_own_tokenizer_must_be_of_the_same_kind(tmp_path):
  experiment = build(config())
  teacher = prepare.random_teacher(experiment)
  recipe, tokenizer = prepare.recipe(experiment), {"codebook": np.ones((2, 2))}
  prepare.save_teacher(tmp_path / "teacher.safetensors", teacher, tokenizer, {}, recipe)
  given = config()
  given.teacher.path = str(tmp_path)
  experiment = build(given)
  with pytest.raises(UserError, match=r"trained with another tokenizer than tokenizer.name='vqg"):
    train.train_teacher(experiment, tmp_path, prepare.fit_tokenizer(experiment, tmp_path))


def test_imagenet256_writes_pictures_of_its_size():
  fields = imagenet256.get_config()
  fields.teacher.path = "random"
  assert not build(fields).has_pictures
  fields.tokenizer.update(name="vqgan", path="random")
  experiment = build(fields)
  assert experiment.tokenizer.image_shape == (256, 256, 3)
  assert experiment.tokenizer.grid == (16, 16) and experiment.tokenizer.codebook_size == 1024
