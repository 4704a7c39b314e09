"""Signs of a run gone wrong stop it with a message that says what to look at."""

import errno
import math

import pytest

from configs import base
from dimo_jax.health import Health, RunStopped, disk_is_full

LIMITS = base.get_config().health.to_dict()
GOOD = {
  "generator/entropy": 2.0,
  "distill/disagreement": 0.3,
  "generator/contrast": 0.5,
  "generator/brightness": -0.4,
  "generator/std": 0.5,
  "generator/mean": -0.4,
}


def health(**options):
  return Health(**LIMITS | options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stops_at_once(value):
  with pytest.raises(RunStopped, match=r"step 7: fake_score/loss not finite.*here.*gradient norm"):
    health().check(7, GOOD | {"fake_score/loss": value}, "here")


@pytest.mark.parametrize(
  ("name", "value", "limit"),
  [
    ("generator/entropy", 1e-4, "health.min_entropy"),
    ("distill/disagreement", 0.999, "health.max_disagreement"),
    ("generator/std", 0.001, "health.min_contrast"),
    ("generator/std", 40.0, "health.max_contrast"),
    ("generator/mean", 0.99, "health.max_brightness"),
    ("generator/mean", -0.99, "health.max_brightness"),
  ],
)
def test_a_sign_must_persist(name, value, limit):
  watch = health(patience=3)
  for step in range(1, 20):  # never three in a row
    watch.check(step, GOOD | ({} if step % 3 == 0 else {name: value}), "here")
  watch.check(20, GOOD | {name: value}, "here")
  with pytest.raises(RunStopped, match=f"{name}={value:.4g} .*{limit}=.*Look at") as error:
    watch.check(21, GOOD | {name: value}, "here")
    watch.check(22, GOOD | {name: value}, "here")
  assert "\n" not in str(error.value)


def test_a_skipped_update_is_said_and_a_persistent_one_stops():
  watch = health(max_skipped=10)
  assert watch.check(1, GOOD | {"generator/skipped": 0, "fake_score/skipped": 0}, "here") is None
  counts = {"generator/skipped": 1, "generator/skipped_in_a_row": 1, "fake_score/skipped": 0}
  note = watch.check(2, GOOD | counts | {"generator/loss": math.nan}, "here")
  assert note == (
    "step 2: an update was NaN or infinite and left out; so far generator/skipped 1,"
    " fake_score/skipped 0"
  )
  assert watch.check(3, GOOD | counts | {"generator/skipped_in_a_row": 0}, "here") is None
  with pytest.raises(RunStopped, match="step 4: generator/loss not finite"):  # nothing was skipped
    watch.check(4, GOOD | counts | {"generator/loss": math.nan}, "here")
  assert watch.check(5, GOOD | {"generator/skipped": 10, "generator/skipped_in_a_row": 9}, "here")
  with pytest.raises(RunStopped, match=r"_in_a_row=10 .*health\.max_skipped=10.*in here is intact"):
    watch.check(6, GOOD | {"generator/skipped": 11, "generator/skipped_in_a_row": 10}, "here")


def test_readings_without_the_metric_neither_strike_nor_forgive():
  watch = health(patience=2)
  watch.check(1, {"generator/entropy": 0.0}, "here")
  watch.check(2, {"generator/contrast": 0.5}, "here")
  with pytest.raises(RunStopped, match="generator/entropy"):
    watch.check(3, {"generator/entropy": 0.0}, "here")


@pytest.mark.parametrize(
  ("name", "value", "limit"),
  [
    ("generator/contrast", 0.001, "health.min_contrast"),
    ("generator/brightness", -0.99, "health.max_brightness"),
    ("generator/brightness", 0.99, "health.max_brightness"),
  ],
)
def test_one_bad_picture_is_enough(name, value, limit):
  with pytest.raises(RunStopped, match=f"{name}={value:.4g} .*{limit}=.*Look at"):
    health().check(1, GOOD | {name: value}, "here")


@pytest.mark.parametrize(
  ("option", "value"),
  [
    ("min_entropy", 3.0),
    ("max_disagreement", 0.1),
    ("min_contrast", 0.9),
    ("max_contrast", 0.1),
    ("max_brightness", 0.3),
  ],
)
def test_every_limit_is_read(option, value):
  health(patience=1).check(1, GOOD, "here")
  with pytest.raises(RunStopped, match=option):
    health(**{option: value}, patience=1).check(1, GOOD, "here")


def test_a_full_disk_is_recognised_however_it_is_wrapped():
  full = OSError(errno.ENOSPC, "No space left on device")
  wrapped = RuntimeError("cannot write")
  wrapped.__cause__ = full
  text = ValueError("RESOURCE_EXHAUSTED: ... No space left on device")
  assert disk_is_full(full) and disk_is_full(wrapped) and disk_is_full(text)
  assert not disk_is_full(OSError(errno.EACCES, "Permission denied"))
  assert not disk_is_full(None)


def test_counts_of_before_a_resume_excuse_nothing():
  watch = health()
  watch.resume()
  counts = {"generator/skipped": 3, "generator/skipped_in_a_row": 0}
  with pytest.raises(RunStopped, match="generator/loss not finite"):
    watch.check(1, GOOD | counts | {"generator/loss": math.nan}, "here")


def test_a_skipped_update_excuses_only_its_own_metrics():
  watch = health()
  counts = {"generator/skipped": 1, "generator/skipped_in_a_row": 1}
  bad = {"generator/loss": math.nan, "evaluation/frechet_distance": math.nan}
  with pytest.raises(RunStopped, match="step 1: evaluation/frechet_distance not finite"):
    watch.check(1, GOOD | counts | bad, "here", of_update=["generator/loss", *counts])
