"""DMD2 from the command line: the same loop, resume, evaluation and refusals as Di[M]O."""

import json
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import debug
from dimo_jax import prepare
from dimo_jax.build import build
from dimo_jax.start import distill_batches
from dimo_jax.types import UserError
from tests import commands


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
    ({"process__sigma_max": 0.001}, ["process.sigma_max=0.001", "sigma_min"]),
    ({"denoiser__name": "unet"}, ["denoiser.name='unet'", "adm"]),
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
