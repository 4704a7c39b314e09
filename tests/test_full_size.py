"""Full-size configs take real steps, on a CPU, from random weights; `make test-full` runs this."""

import pathlib
import re

import numpy as np
import pytest

from tests import commands

# The published MaskGIT of Di[M]O, counted in the reference implementation.
NUM_MASKGIT_PARAMETERS = 174_160_874


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
  data = (
    "--config.data.name=noise",
    "--config.data.tfds_name=",
    "--config.data.image_size=64",
    "--config.dmd2.fake_rounds=1",  # each further round is as much again to compile
  )
  num_parameters, rows, workdir = two_steps(tmp_path, "--config=configs/imagenet64.py", *data)
  assert round(num_parameters / 1e6) == 296  # published
  check(rows, workdir)
  assert all(np.isfinite(row["critic/loss"]) for row in rows)
