"""Full-size configs take real steps, on a CPU, from random weights; `make test-full` runs this."""

import pathlib
import re

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from configs import imagenet256
from dimo_jax.build import build
from dimo_jax.convert import vqgan
from tests import commands

# The published MaskGIT of Di[M]O, counted in the reference implementation.
NUM_MASKGIT_PARAMETERS = 174_160_874
NUM_VQGAN_PARAMETERS = 72_141_699  # of its VQGAN, without what only its training needs


def two_steps(tmp_path: pathlib.Path, *command: str) -> tuple[int, list[dict], pathlib.Path]:
  """(parameters printed, rows of metrics, workdir) of two iterations at batch 1."""
  workdir = tmp_path / "run"
  arguments = (
    "--config.teacher.path=random",
    "--config.train.batch_size=1",
    "--config.train.num_steps=2",
    "--config.log.every_steps=1",
    "--config.log.pictures_every_steps=0",
  )
  out, _ = commands.run(tmp_path, workdir, *arguments, command=command, timeout_s=1700)
  total = re.search(r"Total: ([\d,]+)", out)
  assert total
  return int(total[1].replace(",", "")), commands.rows(workdir / "distill"), workdir


def check(rows: list[dict], workdir: pathlib.Path) -> None:
  assert [row["step"] for row in rows] == [1, 2]
  assert all(row["generator/grad_norm"] > 0 for row in rows)
  assert rows[0]["generator/loss"] != rows[1]["generator/loss"]
  assert commands.checkpoint_steps(workdir / "distill") == [2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_imagenet256_takes_two_steps(tmp_path):
  num_parameters, rows, workdir = two_steps(tmp_path, "--config=configs/imagenet256.py")
  assert num_parameters == NUM_MASKGIT_PARAMETERS
  check(rows, workdir)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_imagenet64_takes_two_steps(tmp_path):
  arrays = {}
  for split in ("train", "test"):
    images = np.random.default_rng(0).integers(0, 256, (1000, 64, 64, 3), np.uint8)
    arrays |= {f"images_{split}": images, f"labels_{split}": np.arange(1000)}
  np.savez(tmp_path / "images.npz", **arrays)
  data = (
    "--config.data.name=arrays",
    "--config.data.tfds_name=",
    f"--config.data.path={tmp_path}/images.npz",
  )
  num_parameters, rows, workdir = two_steps(tmp_path, "--config=configs/imagenet64.py", *data)
  assert round(num_parameters / 1e6) == 296  # published
  check(rows, workdir)
  assert all(np.isfinite(row["critic/loss"]) for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_vqgan_of_imagenet256_decodes_a_picture(tmp_path):
  """A file of the published size, written, read and decoded; weights are random."""
  config = imagenet256.get_config()
  config.teacher.path = "random"
  config.tokenizer.update(name="vqgan", path="random")
  tokenizer = build(config).tokenizer
  random = tokenizer.fit(None, 0)
  assert sum(leaf.size for leaf in jax.tree.leaves(random)) == NUM_VQGAN_PARAMETERS
  save_file(vqgan.to_published(random), tmp_path / "vqgan.safetensors")
  config.tokenizer.path = str(tmp_path / "vqgan.safetensors")
  tokenizer = build(config).tokenizer
  params = tokenizer.fit(None, 0)
  jax.tree.map(np.testing.assert_array_equal, params, random)
  tokens = np.random.default_rng(0).integers(1024, size=(1, 256), dtype=np.int32)
  image = np.asarray(jax.jit(tokenizer.decode)(params, tokens))
  assert image.shape == (1, 256, 256, 3)
  assert abs(image).max() <= 1 and image.std() > 0.02
  again = np.asarray(jax.jit(tokenizer.encode)(params, image))
  assert again.shape == (1, 256) and again.min() >= 0 and again.max() < 1024


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_imagenet256_writes_pictures(tmp_path):
  """Both networks from random weights, one picture of each network."""
  workdir = tmp_path / "run"
  arguments = (
    "--config.teacher.path=random",
    "--config.tokenizer.name=vqgan",
    "--config.tokenizer.path=random",
    "--config.train.batch_size=1",
    "--config.train.num_steps=1",
    "--config.log.num_pictures=1",
    "--config.teacher.decoding.num_steps=2",
  )
  command = ("--config=configs/imagenet256.py",)
  commands.run(tmp_path, workdir, *arguments, command=command, timeout_s=1700)
  with Image.open(workdir / "distill" / "pictures" / "step_0000001.png") as image:
    assert image.size == (3 * 256 + 2 * 8, 16 + 256)
