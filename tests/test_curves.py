"""The pictures of a run's metrics."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from dimo_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def curves():
  spec = importlib.util.spec_from_file_location("curves", ROOT / "tools" / "curves.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def write(workdir, stage, rows):
  (workdir / stage).mkdir()
  text = "".join(json.dumps({"step": i + 1, **row}) + "\n" for i, row in enumerate(rows))
  (workdir / stage / "metrics.jsonl").write_text(text)


def test_a_run_gets_the_panels_that_it_has(curves, tmp_path):
  write(tmp_path, "teacher", [{"teacher/loss": 1 / (i + 1)} for i in range(20)])
  curves.draw(tmp_path, tmp_path / "one.png")
  evaluated = {f"evaluation/frechet_distance{end}": 2.0 for end in ("", "_low", "_high")}
  rows = [{"critic/real_probability": 0.6, "critic/fake_probability": 0.4}, evaluated]
  write(tmp_path, "distill", [*rows, {"generator/loss": 1.0}])
  curves.draw(tmp_path, tmp_path / "four.png")
  heights = []
  for name in ("one", "four"):
    with Image.open(tmp_path / f"{name}.png") as image:
      heights.append(image.height)
      assert np.asarray(image.convert("L")).std() > 5
  assert heights[1] == 2 * heights[0]


def test_a_folder_without_metrics_is_refused(curves, tmp_path):
  with pytest.raises(UserError, match="holds no metrics; name the workdir of a run"):
    curves.draw(tmp_path, tmp_path / "none.png")


def test_the_running_mean_reaches_the_ends(curves):
  values = np.random.default_rng(0).uniform(size=30)
  wanted = [values[max(0, i - 4) : i + 5].mean() for i in range(30)]
  np.testing.assert_allclose(curves._running_mean(values), wanted)
  np.testing.assert_allclose(curves._running_mean(values[:1]), values[:1])
