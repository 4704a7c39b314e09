"""Full-size configs take real steps, on a CPU, from random weights; `make test-full` runs this."""

import re

import pytest

from tests import commands

# The published MaskGIT of Di[M]O, counted in the reference implementation.
NUM_MASKGIT_PARAMETERS = 174_160_874


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_imagenet256_takes_two_steps(tmp_path):
  workdir = tmp_path / "run"
  out, _ = commands.run(
    tmp_path,
    workdir,
    "--config.teacher.path=random",
    "--config.train.batch_size=1",
    "--config.train.num_steps=2",
    "--config.log.every_steps=1",
    command=("--config=configs/imagenet256.py",),
    timeout_s=1700,
  )
  total = re.search(r"Total: ([\d,]+)", out)
  assert total and int(total[1].replace(",", "")) == NUM_MASKGIT_PARAMETERS
  rows = commands.rows(workdir / "distill")
  assert [row["step"] for row in rows] == [1, 2]
  assert all(row["generator/grad_norm"] > 0 for row in rows)
  assert rows[0]["generator/loss"] != rows[1]["generator/loss"]
  assert commands.checkpoint_steps(workdir / "distill") == [2]
