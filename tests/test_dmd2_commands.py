"""DMD2 from the command line: the same loop, resume, evaluation and refusals as Di[M]O."""

import json
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import debug
from dimo_jax import prepare
from dimo_jax.build import build
from dimo_jax.data.sources import load_pairs
from dimo_jax.samplers.edm import HeunDraws
from dimo_jax.start import distill_batches
from dimo_jax.types import UserError
from tests import commands

pytestmark = pytest.mark.ci  # several runs, one of them killed


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  return commands.reference(tmp_path_factory, commands.TINY_DMD2)


@pytest.fixture(scope="module")
def killed(reference, tmp_path_factory):
  """(steps saved, workdir) of a run that was killed while it distilled, and then ended."""
  workdir = tmp_path_factory.mktemp("killed") / "run"
  rows = workdir / "distill" / "metrics.jsonl"
  with commands.shared_folder(tmp_path_factory) as shared:
    process = commands.start(shared, workdir, command=commands.TINY_DMD2)
    while process.poll() is None and not (rows.exists() and '"step": 13' in rows.read_text()):
      time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    saved = commands.checkpoint_steps(workdir / "distill")
    commands.run(shared, workdir, command=commands.TINY_DMD2)
  return saved, workdir


def test_a_killed_run_ends_like_an_uninterrupted_one(killed, reference):
  saved, workdir = killed
  assert saved and commands.NUM_STEPS not in saved
  commands.assert_same_run(workdir, reference)


def test_everything_that_a_run_leaves(reference):
  models = [(row["model"], row["steps"]) for row in commands.results(reference)]
  assert models == [("real", 0), ("teacher", 1), ("teacher", 4), ("student", 4)]
  assert all(row["token_entropy"] is None for row in commands.results(reference))
  last = commands.rows(reference / "distill")[-1]
  for name in ("generator/matching_loss", "critic/loss", "fake_score/loss", "generator/brightness"):
    assert np.isfinite(last[name])
  assert len(list((reference / "distill" / "pictures").glob("*.png"))) == 2


def config(**changes):
  """The debug config with changes by flat name, `__` for dots."""
  fields = debug.get_config("dmd2")
  with fields.unlocked():
    for name, value in changes.items():
      section, _, field = name.rpartition("__")
      target = fields
      for part in section.split("__") if section else ():
        target = target[part]
      target[field] = value
  return fields


@pytest.mark.parametrize(
  ("changes", "needles"),
  [
    ({"data__name": "labels"}, ["data.name='labels'", "images"]),
    ({"dmd2__student_sigmas": (5.0, 1.0)}, ["dmd2.student_sigmas=(5.0, 1.0)", "noise end"]),
    ({"dmd2__student_sigmas": (80.0, 90.0)}, ["dmd2.student_sigmas", "fall"]),
    ({"dmd2__critic_groups": 7}, ["dmd2.critic_groups=7", "divide", "32"]),
    ({"dmd2__gan_critic_weight": 0.0}, ["dmd2.gan_generator_weight", "needs the critic"]),
    ({"dmd2__fake_rounds": 0}, ["dmd2.fake_rounds=0", "1 or more"]),
    ({"dmd2__divergence": "hellinger"}, ["dmd2.divergence='hellinger'", "'squared_hellinger'"]),
    ({"precision__compute_dtype": "float16"}, ["precision.compute_dtype='float16'", "bfloat16"]),
    ({"objective": "dimo"}, ["objective='dimo'", "masked", "teacher.name='edm'"]),
    ({"teacher__name": "maskgit"}, ["teacher.name='maskgit'", "tokenizer.name='pixels'"]),
    ({"tokenizer__name": "none"}, ["teacher.name='edm'", "'pixels'"]),
    ({"process__name": "ve"}, ["process.name='ve'", "edm"]),
    (
      {"process__name": "variance_preserving", "process__prediction": "v"},
      ["process.prediction='v'", "'epsilon'"],
    ),
    ({"process__sigma_max": 0.001}, ["process.sigma_max=0.001", "sigma_min"]),
    ({"denoiser__name": "unet"}, ["denoiser.name='unet'", "adm"]),
    ({"denoiser__num_blocks": 0}, ["denoiser.num_blocks=0", "1 or more"]),
    ({"denoiser__hidden_dim": 0}, ["denoiser.hidden_dim=0", "1 or more"]),
    ({"denoiser__dropout": 1.0}, ["denoiser.dropout=1.0", "[0, 1)"]),
    ({"denoiser__augment_dim": -1}, ["denoiser.augment_dim=-1", "negative"]),
    ({"teacher__sampling__s_churn": -1.0}, ["teacher.sampling.s_churn=-1.0", "negative"]),
    ({"teacher__pretrain__noise_levels": "x"}, ["teacher.pretrain.noise_levels='x'", "log_normal"]),
  ],
)
def test_a_bad_value_has_one_line_that_says_what_is_right(changes, needles):
  with pytest.raises(UserError) as error:
    build(config(**changes))
  text = str(error.value)
  assert "\n" not in text
  assert not [needle for needle in needles if needle not in text], text


def test_a_teacher_of_another_prediction_type_is_refused(reference, tmp_path):
  arrays = load_file(reference / "teacher" / "teacher.safetensors")
  path = tmp_path / "teacher.safetensors"
  fields = {"teacher.name": "edm", "process.name": "variance_preserving"}
  save_file(arrays, path, {"dimo_jax": json.dumps({"teacher": fields})})
  with pytest.raises(UserError, match=r"process\.name='variance_preserving', and .* 'edm'"):
    prepare.load_teacher(build(config()), path)


def test_batches_are_real_images_and_the_generators_is_the_first_rounds():
  experiment = build(config())
  first, second = distill_batches(experiment, 0, 2)
  (again,) = distill_batches(experiment, 1, 1)
  rounds, micro, b = first["fake_score"]["class_id"].shape
  assert (rounds, micro, b) == (2, 1, 32)
  assert first["fake_score"]["image"].shape == (2, 1, 32, 8, 8, 1)
  np.testing.assert_array_equal(first["generator"]["image"], first["fake_score"]["image"][0])
  np.testing.assert_array_equal(second["fake_score"]["image"], again["fake_score"]["image"])
  assert not np.array_equal(first["fake_score"]["image"], second["fake_score"]["image"])


# Noise-image pairs, and a second stage.


@pytest.fixture(scope="module")
def second(reference, tmp_path_factory):
  """(pairs file, workdir) of a second stage: from another run's weights, with a regression.

  Those weights are gone once it has a checkpoint, and it goes on without them.
  """
  folder = tmp_path_factory.mktemp("second")
  first = shutil.copytree(reference, folder / "first")
  teacher = f"--config.teacher.path={reference}/teacher"
  pairs, workdir = folder / "pairs.npz", folder / "run"
  with commands.shared_folder(tmp_path_factory) as shared:
    arguments = ("--mode=pairs", "--num_pairs=100", f"--out={pairs}", teacher)
    commands.run(shared, workdir, *arguments, command=commands.TINY_DMD2)
    arguments = (
      teacher,
      f"--config.data.pairs={pairs}",
      "--config.dmd2.regression_weight=0.25",
      f"--config.train.start_from={first}",
      "--config.train.num_steps=2",
      "--config.evaluation.protocol=none",
      "--config.log.pictures_every_steps=0",
    )
    commands.run(shared, workdir, *arguments, command=commands.TINY_DMD2)
    shutil.rmtree(first)
    commands.run(shared, workdir, *arguments, command=commands.TINY_DMD2)
  return pairs, workdir


def test_pairs_are_the_teachers_own(second, reference):
  pairs, _ = second
  with np.load(pairs) as file:
    arrays = dict(file)
  assert arrays["noise"].shape == arrays["image"].shape == (100, 8, 8, 1)
  assert abs(arrays["noise"].std() - 1) < 0.05
  experiment = build(config())
  network, _ = prepare.load_teacher(experiment, reference / "teacher")
  teacher = experiment.teacher.frozen_state(network, {})
  draws = HeunDraws(jnp.asarray(arrays["noise"]), jax.random.split(jax.random.key(0), 4))
  condition = {"class_id": jnp.asarray(arrays["class_id"])}
  again = experiment.decoding.integrate(teacher, condition, draws)
  np.testing.assert_allclose(again, arrays["image"], atol=1e-3)


def test_a_second_stage_starts_from_weights_alone(second, reference):
  _, workdir = second
  rows = commands.rows(workdir / "distill")
  assert [row["step"] for row in rows] == [1, 2]
  assert all(row["generator/regression_loss"] > 0 for row in rows)
  first = commands.arrays(reference / "distill", _best(reference))
  state = commands.arrays(workdir / "distill", 2)
  for name, before in first.items():
    if name.startswith("ema/"):
      now = state["generator/params/" + name.removeprefix("ema/")]
      assert np.abs(now - before).max() < 0.05  # two updates away
  assert state["generator/step"] == 2 and state["clock"] == 4


def _best(workdir):
  rows = [r for r in commands.rows(workdir / "distill") if "evaluation/frechet_distance" in r]
  return min(rows, key=lambda row: row["evaluation/frechet_distance"])["step"]


@pytest.mark.parametrize(
  ("changes", "needle"),
  [
    ({"image": np.zeros((3, 2, 2, 1))}, "4 noises go with 3 images"),
    ({"class_id": np.zeros(3, int)}, r"class_id int64 \[3\], must be integer \[4\]"),
    ({"class_id": np.zeros(4)}, "class_id float64"),
    ({"class_id": np.array([0, 1, 2, 3])}, "class_id spans 0 to 3, must lie in 0 to 2"),
    ({"class_id": np.array([0, -1, 2, 2])}, "class_id spans -1 to 2"),
    ({"noise": np.zeros((4, 3, 2, 1))}, r"noise is \[4, 3, 2, 1\]"),
  ],
)
def test_pairs_that_do_not_go_together_are_refused(tmp_path, changes, needle):
  arrays = {name: np.zeros((4, 2, 2, 1)) for name in ("noise", "image")}
  arrays |= {"class_id": np.array([0, 1, 2, 2]), "teacher_sha256": np.array("ab")}
  path = str(tmp_path / "pairs.npz")
  np.savez(path, **arrays)
  assert len(load_pairs(path, (2, 2, 1), 3)) == 4
  np.savez(path, **arrays | changes)
  with pytest.raises(UserError, match=needle):
    load_pairs(path, (2, 2, 1), 3)


def test_unusable_first_stages_and_pairs_are_refused(second, reference, tmp_path):
  pairs, _ = second
  experiment = build(config(train__start_from=str(tmp_path)))
  network, _ = prepare.load_teacher(experiment, reference / "teacher")
  with pytest.raises(UserError, match=r"train\.start_from=.* holds no distillation"):
    prepare.first_stage(experiment, network)
  with pytest.raises(UserError, match=r"train\.start_from=.* holds no distillation"):
    prepare.check_workdir(experiment, tmp_path / "new")  # before a teacher is trained
  experiment = build(config(train__start_from=str(reference)))
  with pytest.raises(UserError, match=r"set teacher\.path to .*/teacher$"):
    prepare.check_workdir(experiment, tmp_path / "new")
  own = str(reference / "teacher")
  experiment = build(config(train__start_from=str(reference), teacher__path=own))
  with pytest.raises(UserError, match="distilled from another teacher"):
    prepare.first_stage(experiment, jax.tree.map(lambda x: x + 1, network))
  masked = commands.copy_run(reference, tmp_path / "masked")
  record = masked / "distill" / "record.json"
  record.write_text(record.read_text().replace('"dmd2"', '"dimo"'))
  experiment = build(config(train__start_from=str(masked), teacher__path=own))
  with pytest.raises(UserError, match=r"with objective='dimo'; this run's is 'dmd2'"):
    prepare.check_workdir(experiment, tmp_path / "new")
  for changes, text in (
    ({"data__pairs": str(pairs)}, "set both or neither"),
    ({"dmd2__regression_weight": 1.0}, "set both or neither"),
    ({"dmd2__regression_weight": 1.0, "data__pairs": "nowhere.npz"}, "cannot be read"),
  ):
    with pytest.raises(UserError, match=text):
      build(config(**changes))
