"""Full-size configs take real steps, on a CPU, from random weights; `make test-full` runs this."""

import json
import multiprocessing
import pathlib
import re
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from configs import imagenet256
from dimo_jax.build import build
from dimo_jax.convert import __main__ as convert
from dimo_jax.convert import critic, edm, maskgit, vqgan
from dimo_jax.models.critic import Critic
from dimo_jax.models.edm import EDMPrecond
from dimo_jax.models.unet import ADM
from tests import commands, published

# The published MaskGIT of Di[M]O, counted in the reference implementation.
NUM_MASKGIT_PARAMETERS = 174_160_874
NUM_VQGAN_PARAMETERS = 72_141_699  # of its VQGAN, without what only its training needs


def two_steps(
  tmp_path: pathlib.Path, *command: str, teacher: str | pathlib.Path = "random"
) -> tuple[int, list[dict], pathlib.Path]:
  """(parameters printed, rows of metrics, workdir) of two iterations at batch 1."""
  workdir = tmp_path / "run"
  arguments = (
    f"--config.teacher.path={teacher}",
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


# Random images in place of ImageNet-64.
IMAGES_64 = (
  "--config.data.name=noise",
  "--config.data.tfds_name=",
  "--config.data.image_size=64",
  "--config.precision.compute_dtype=float32",  # a CPU only converts back and forth
  "--config.dmd2.fake_rounds=1",  # further rounds are a loop, as much again to compile
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_imagenet64_takes_two_steps(tmp_path):
  command = ("--config=configs/imagenet64.py", *IMAGES_64)
  num_parameters, rows, workdir = two_steps(tmp_path, *command)
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


def published_file(tmp_path: pathlib.Path, family: str) -> pathlib.Path:
  """A file of a family with random weights of the published size."""
  if family in ("maskgit", "dimo"):
    config = imagenet256.get_config()
    config.teacher.path = "random"
    shapes = jax.eval_shape(build(config).teacher.init, jax.random.key(0))
    tensors = maskgit.to_published(published.random_tree(shapes))
    if family == "dimo":
      return published.legacy_file(tmp_path / "pytorch_model.bin", tensors)
    content = {"iter": 1, "global_epoch": 1, "model_state_dict": tensors}
    return published.zip_file(tmp_path / "MaskGIT_ImageNet_256.pth", content)
  network = EDMPrecond(ADM(img_resolution=64, label_dim=1000))
  inputs = jnp.zeros((1, 64, 64, 3)), jnp.ones(1)
  shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
  tensors = edm.to_published(published.random_tree(shapes), network)
  if family == "edm":
    path, made = tmp_path / "edm-imagenet-64x64-cond-adm.pkl", {"img_resolution": 64}
    return published.edm_pickle(path, tensors, label_dim=1000, **made)
  if family == "dmd2_guidance":
    bottleneck = jnp.zeros((1, 8, 8, 768))
    shapes = jax.eval_shape(Critic().init, jax.random.key(0), bottleneck)["params"]
    head = critic.to_published(published.random_tree(shapes))
    tensors = {f"{net}_unet.{k}": v for net in ("real", "fake") for k, v in tensors.items()}
    tensors |= {f"cls_pred_branch.{k}": v for k, v in head.items()}
    tensors["karras_sigmas"] = np.ones(1000, np.float32)
  return published.zip_file(tmp_path / f"{family}.bin", tensors)


def in_a_process(function, *arguments):
  """The function's result; what memory it took is free again, which the run beside it needs."""
  with futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
    return pool.submit(function, *arguments).result()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", ["maskgit", "dimo", "edm", "dmd2", "dmd2_guidance"])
def test_published_files_of_full_size_are_converted(tmp_path, capsys, family):
  path = published_file(tmp_path, family)
  assert convert.main([f"--source={path}", f"--out={tmp_path / 'out'}"]) == 0
  record = json.loads((tmp_path / "out" / "conversion.json").read_text())
  assert record["family"] == family
  size = {"maskgit": 174, "dimo": 174, "dmd2_guidance": 2 * 296 + 19}.get(family, 296)
  num_bytes = sum((tmp_path / "out" / name).stat().st_size for name in record["files"])
  assert round(num_bytes / 4e6) == size
  capsys.readouterr()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_imagenet256_starts_from_a_published_teacher(tmp_path):
  path = in_a_process(published_file, tmp_path, "maskgit")
  command = ("--config=configs/imagenet256.py",)
  _, rows, workdir = two_steps(tmp_path, *command, teacher=path)
  check(rows, workdir)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_imagenet64_starts_from_a_published_teacher(tmp_path):
  path = in_a_process(published_file, tmp_path, "edm")
  lean = (  # or 24 GB are too few
    "--config.precision.teacher_dtype=bfloat16",
    "--config.optim.generator.mean_dtype=bfloat16",
    "--config.optim.fake_score.mean_dtype=bfloat16",
  )
  command = ("--config=configs/imagenet64.py", *IMAGES_64, *lean)
  _, rows, workdir = two_steps(tmp_path, *command, teacher=path)
  check(rows, workdir)
