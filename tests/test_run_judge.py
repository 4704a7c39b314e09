"""Published protocols inside a run, with a small linear network in Inception's place."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug, imagenet64, imagenet256
from dimo_jax import evaluate, run_judge, train
from dimo_jax.build import build
from dimo_jax.checkpoint import Checkpoints
from dimo_jax.evaluation import image_sets, jobs, published, scoring
from dimo_jax.sharding import make_mesh
from dimo_jax.types import UserError
from tests import commands, tiny_inception

SIDE, NUM_TEST = 8, 40
PROTOCOL = published.PublishedProtocol(
  name="tiny",
  source="here",
  statistics="made here",
  image_size=SIDE,
  num_classes=3,
  rounding="nearest",
  resize="none",
  num_images=64,
  num_splits=2,
  num_kept=32,
)
# 8x8 pixels, 4x4 tokens.
TOKENIZER = {"name": "vqgan", "path": "random", "channels": 32, "channel_mult": (1, 1)}
TOKENIZER |= {"num_res_blocks": 1, "attn_resolutions": (), "z_channels": 8, "code_dim": 4}


@pytest.fixture
def config(tmp_path, monkeypatch):
  """A run on random images that is judged by statistics of others."""
  tiny_inception.install(monkeypatch)
  network = tiny_inception.network(SIDE)
  monkeypatch.setattr(run_judge.Inception, "load", lambda path: network)
  monkeypatch.setitem(published.PUBLISHED, "tiny", PROTOCOL)
  random = np.random.default_rng(0)
  sizes = {"train": 60, "test": NUM_TEST, "real": 100}
  images = {k: random.integers(0, 256, (n, SIDE, SIDE, 3), np.uint8) for k, n in sizes.items()}
  labels = {f"labels_{k}": np.arange(sizes[k]) % 3 for k in ("train", "test")}
  data = {f"images_{k}": images[k] for k in ("train", "test")}
  np.savez(tmp_path / "data.npz", **data, **labels)
  np.savez(tmp_path / "real.npz", images["real"])
  statistics = tmp_path / "statistics.npz"
  real = image_sets.open_images(tmp_path / "real.npz")
  jobs.make_statistics(real, PROTOCOL, network, make_mesh(), statistics, batch_size=32)
  (tmp_path / "run").mkdir()
  config = debug.get_config()
  config.data.update(name="arrays", path=str(tmp_path / "data.npz"), num_classes=3)
  config.tokenizer.update(TOKENIZER)
  config.teacher.path = "random"
  config.train.num_steps = 4
  config.optim.generator.num_warmup = config.optim.fake_score.num_warmup = 0
  config.log.update(evaluate_every_steps=2, pictures_every_steps=4)
  config.evaluation.update(protocol="tiny", inception="weights", statistics=str(statistics))
  config.evaluation.update(batch_size=32, teacher_steps=(1, 2))
  return config


def written(workdir):
  path = workdir / "eval" / "results.jsonl"
  return scoring.read_rows(path) if path.exists() else []


@pytest.mark.slow
def test_a_run_is_judged_from_its_teacher_to_its_end(config, tmp_path):
  experiment, workdir = build(config), tmp_path / "run"
  train.train(experiment, workdir)
  assert [(r["model"], r["steps"], r.get("step")) for r in written(workdir)] == [
    ("teacher", 1, None),
    ("teacher", 2, None),
    ("student", 1, 2),
    ("student", 1, 4),
  ]
  evaluate.evaluate_workdir(experiment, workdir)
  rows = written(workdir)
  assert [row["model"] for row in rows[4:]] == ["real", "tokenizer"]  # the others were there
  results = json.loads((workdir / "results.json").read_text())
  assert [row["model"] for row in results] == ["real", "tokenizer", *["teacher"] * 2, "student"]
  assert results[-1] == rows[3] and results[-1]["num_images"] == 64

  recorded = {row["step"]: row for row in commands.rows(workdir / "distill")}
  for row in rows[2:4]:
    assert recorded[row["step"]]["evaluation/frechet_distance"] == row["fid"]
    assert recorded[row["step"]]["evaluation/inception_score"] == row["inception_score"]
  best = min(rows[2:4], key=lambda row: row["fid"])
  checkpoints = Checkpoints(workdir / "distill" / "checkpoints", read_only=True)
  assert checkpoints.best_step() == best["step"]
  checkpoints.close()

  page = (workdir / "report.html").read_text()
  assert "arrays test split, reconstructed" in page and "student of run" in page

  evaluate.evaluate_workdir(experiment, workdir)
  assert len(written(workdir)) == 6
  config.evaluation.num_images = 48  # not the same numbers any more
  evaluate.evaluate_workdir(build(config), workdir)
  assert [row["num_images"] for row in written(workdir)[6:]] == [48] * 3


@pytest.mark.ci
def test_the_tokenizer_is_judged_by_what_it_gives_back(config, tmp_path):
  experiment, workdir = build(config), tmp_path / "run"
  tokenizer = experiment.tokenizer.fit(None, config.seed)
  judge = run_judge.RunJudge.of(experiment, workdir)
  rows = judge.evaluate_data(tokenizer)
  assert [row["model"] for row in rows] == ["real", "tokenizer"]
  assert rows[0]["departures"] == rows[1]["departures"] == {"num_images": NUM_TEST}
  levels = np.load(config.data.path)["images_test"]
  codes = experiment.tokenizer.encode(tokenizer, jnp.asarray(levels / np.float32(127.5) - 1))
  decoded = np.asarray(experiment.tokenizer.decode(tokenizer, codes))
  decoded = np.floor(np.clip(decoded * 127.5 + 128, 0, 255)).astype(np.uint8)
  few = dataclasses.replace(judge.judge, protocol=PROTOCOL.with_images(NUM_TEST))
  for name, images, row in (("test", levels, rows[0]), ("decoded", decoded, rows[1])):
    np.savez(tmp_path / f"{name}.npz", images)
    found = image_sets.open_images(tmp_path / f"{name}.npz")
    expected = jobs.evaluate_images(few, found, tmp_path / "other.jsonl")
    assert row["fid"] == pytest.approx(expected["fid"], rel=1e-3)
  assert abs(rows[0]["fid"] - rows[1]["fid"]) > 0.01 * rows[0]["fid"]
  assert judge.evaluate_data(tokenizer) == rows == written(workdir)  # not computed again


@pytest.mark.parametrize("first", [True, False])
def test_the_teacher_is_judged_first_unless_that_is_skipped(config, tmp_path, monkeypatch, first):
  seen = []
  monkeypatch.setattr(train, "distill", lambda *arguments: seen.extend(written(tmp_path / "run")))
  config.evaluation.teacher_first = first
  train.train(build(config), tmp_path / "run")
  assert [row["model"] for row in seen] == ["teacher"] * (2 * first)


@pytest.mark.parametrize(
  ("fields", "needle"),
  [
    ({"evaluation.inception": ""}, "evaluation.inception='' must be the weights, pt_inception"),
    ({"evaluation.statistics": ""}, "evaluation.statistics='' must be made here"),
    ({"evaluation.protocol": "fid"}, "evaluation.protocol='fid' is unknown"),
    ({"evaluation.protocol": "edm-imagenet64"}, r"for images \(64, 64, 3\); this run's are \(8, 8"),
    ({"evaluation.num_images": 1}, "num_images=1 must be 2 or more"),
    ({"evaluation.batch_size": 12}, "evaluation.batch_size=12"),
    ({"data.name": "labels", "data.num_classes": 10}, "data.num_classes=10 must be 3"),
    (
      {"data.name": "labels", "tokenizer.name": "none", "tokenizer.path": ""},
      "needs pictures; tokenizer.name='none' has none",
    ),
  ],
)
def test_what_the_protocol_cannot_judge_is_one_line(config, fields, needle):
  config.update_from_flattened_dict(fields)
  with pytest.raises(UserError, match=needle) as error:
    build(config)
  assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_found_first(config, tmp_path):
  config.evaluation.statistics = str(tmp_path / "none.npz")
  with pytest.raises(UserError, match=r"none.npz' does not exist"):
    train.train(build(config), tmp_path / "run")
  assert not (tmp_path / "run" / "distill").exists()


def test_the_imagenet_presets_are_judged_where_their_files_are_given(capsys, tmp_path):
  for module, protocol in ((imagenet256, "adm-imagenet256"), (imagenet64, "edm-imagenet64")):
    assert module.get_config().evaluation.protocol == protocol
  config = imagenet256.get_config()
  config.teacher.path = "random"
  config.tokenizer.update(name="vqgan", path="random")
  experiment = build(config)
  assert experiment.published is None
  evaluate.evaluate_workdir(experiment, tmp_path)
  assert "neither evaluation.inception nor .statistics given" in capsys.readouterr().out
  config.evaluation.update(inception="a", statistics="b")
  assert build(config).published is published.PUBLISHED["adm-imagenet256"]
