"""Noise levels, preconditioning, prediction types, noising, and guidance on noisy images."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dimo_jax.processes import gaussian
from dimo_jax.processes.gaussian import Edm, Noised, VariancePreserving, X0AndNoise
from dimo_jax.processes.guidance import guided
from dimo_jax.types import UserError

RNG = np.random.default_rng(0)


def images(*shape):
  return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


# Levels.


def test_karras_tables(golden):
  """The reference lists large sigmas first; its training table is the reverse."""
  recorded = golden("08_dmd2_edm_math")
  for i, (num, low, high, rho) in enumerate(recorded["config"]["karras_args"]):
    ours = gaussian.karras_sigmas(num, low, high, rho)
    assert ours.dtype == np.float32 and (np.diff(ours) > 0).all()
    np.testing.assert_allclose(ours[::-1], recorded[f"karras/{i}"], rtol=2e-6)
  np.testing.assert_allclose(Edm().sigmas(), recorded["karras_sigmas_buffer"], rtol=2e-6)
  assert Edm().sigmas()[[0, -1]].tolist() == [np.float32(0.002), np.float32(80.0)]


def test_karras_table_is_its_definition():
  step = 37
  wanted = (0.01 ** (1 / 5) + step / 99 * (50 ** (1 / 5) - 0.01 ** (1 / 5))) ** 5
  np.testing.assert_allclose(gaussian.karras_sigmas(100, 0.01, 50.0, 5.0)[step], wanted, rtol=1e-6)
  assert gaussian.karras_sigmas(1, 0.01, 50.0, 5.0).tolist() == [50.0]


def test_scaled_linear_table(golden):
  recorded = golden("09_sd15_math")
  scheduler = recorded["config"]["scheduler"]
  table = gaussian.alphas_cumprod(
    scheduler["num_train_timesteps"],
    scheduler["beta_schedule"],
    scheduler["beta_start"],
    scheduler["beta_end"],
  )
  np.testing.assert_allclose(table, recorded["alphas_cumprod"], rtol=2e-6)
  sigmas = VariancePreserving().sigmas()
  np.testing.assert_allclose(1 / (1 + sigmas.astype(np.float64) ** 2), table, rtol=2e-7)


@pytest.mark.parametrize("schedule", gaussian.VP_SCHEDULES)
def test_variance_preserving_tables_by_a_plain_loop(schedule):
  num, start, end = 50, 1e-3, 0.1
  table = gaussian.alphas_cumprod(num, schedule, start, end)
  power = 1.0
  for t in range(num):
    if schedule == "linear":
      beta = start + (end - start) * t / (num - 1)
    elif schedule == "scaled_linear":
      beta = (start**0.5 + (end**0.5 - start**0.5) * t / (num - 1)) ** 2
    else:
      angle = [((t + k) / num + 0.008) / 1.008 * np.pi / 2 for k in (0, 1)]
      beta = min(1 - np.cos(angle[1]) ** 2 / np.cos(angle[0]) ** 2, 0.999)
    power *= 1 - beta
    np.testing.assert_allclose(table[t], power, rtol=1e-12)


def test_preconditioning_is_edms_table():
  sigma = jnp.asarray([0.002, 0.5, 80.0])
  scales = gaussian.preconditioning(sigma, 0.5)
  for i, s in enumerate([0.002, 0.5, 80.0]):
    root = np.sqrt(s**2 + 0.25)
    wanted = (0.25 / root**2, s * 0.5 / root, 1 / root, np.log(s) / 4)
    np.testing.assert_allclose([c[i] for c in scales], wanted, rtol=1e-6)


def test_loss_weights():
  sigma = jnp.asarray([0.002, 0.5, 80.0])
  wanted = 1 / np.asarray(sigma, np.float64) ** 2 + 4
  np.testing.assert_allclose(Edm().loss_weight(sigma), wanted, rtol=1e-6)
  c_out = gaussian.preconditioning(sigma).c_out
  np.testing.assert_allclose(Edm().loss_weight(sigma), 1 / jnp.square(c_out), rtol=1e-6)


@pytest.mark.parametrize("prediction", gaussian.PREDICTIONS)
def test_a_weighted_error_of_x0_is_the_error_of_the_prediction(prediction):
  """For every level: what an error of x0 becomes in the quantity that the network predicts."""
  process = VariancePreserving(prediction=prediction)
  sigma = jnp.asarray([0.03, 1.0, 14.0])
  x0, noise, error = images(3, 2, 2, 1), images(3, 2, 2, 1), images(3, 2, 2, 1)
  inputs = gaussian.add_noise(x0, noise, sigma)
  off = gaussian.x0_and_noise(x0 + error, inputs, "x0")
  outputs = [
    gaussian.as_prediction(ends, sigma, prediction) for ends in (off, X0AndNoise(x0, noise))
  ]
  wanted = jnp.mean(jnp.square(outputs[0] - outputs[1]), axis=(1, 2, 3))
  ours = process.loss_weight(sigma) * jnp.mean(jnp.square(error), axis=(1, 2, 3))
  np.testing.assert_allclose(ours, wanted, rtol=1e-3)


def test_log_normal_noise_has_its_moments():
  draws = RNG.standard_normal(20_000).astype(np.float32)
  log = np.log(gaussian.log_normal_sigma(jnp.asarray(draws), -1.2, 1.2))
  np.testing.assert_allclose([log.mean(), log.std()], [-1.2, 1.2], atol=0.03)


# Noise and predictions.


def test_noising_and_starting():
  x0, noise, sigma = images(2, 3, 3, 1), images(2, 3, 3, 1), jnp.asarray([0.5, 20.0])
  noised = gaussian.add_noise(x0, noise, sigma)
  np.testing.assert_array_equal(noised.xt[1], x0[1] + 20 * noise[1])
  np.testing.assert_array_equal(noised.sigma, sigma)
  np.testing.assert_allclose(Edm().start(noise, sigma).xt[0], 0.5 * noise[0], rtol=1e-6)
  # A variance-preserving network scales its input by 1 / sqrt(1 + sigma^2): it sees unit noise.
  started = VariancePreserving().start(noise, sigma)
  np.testing.assert_allclose(started.xt[1] / np.sqrt(401), noise[1], rtol=1e-5)


ENDS = {"edm": Edm(), "vp": VariancePreserving(), "cosine": VariancePreserving(schedule="cosine")}


@pytest.mark.parametrize("source", gaussian.PREDICTIONS)
@pytest.mark.parametrize("target", gaussian.PREDICTIONS)
@pytest.mark.parametrize("end", [0, -1])
def test_round_trips_keep_their_digits_at_both_ends(source, target, end):
  """Against float64. A prediction of one kind becomes another and comes back."""
  for name, process in ENDS.items():
    level = np.float64(process.sigmas()[end])
    x0, noise = RNG.standard_normal((2, 4, 3, 3, 2))
    ends = X0AndNoise(x0, noise)
    given = np.asarray(_float64(ends, level, source), np.float32)
    xt = (x0 + level * noise).astype(np.float32)
    inputs = Noised(jnp.asarray(xt), jnp.full(4, level, jnp.float32))

    there = gaussian.x0_and_noise(jnp.asarray(given), inputs, source)
    exact = _ends64(xt.astype(np.float64), given.astype(np.float64), level, source)
    for ours, wanted in zip(there, exact, strict=True):
      # What an input's own last digit may do to the result is the error allowed.
      allowed = 4e-7 * (abs(wanted).max() + _amplification(level, source))
      assert abs(np.asarray(ours) - wanted).max() <= allowed, (name, source)

    middle = gaussian.as_prediction(there, inputs.sigma, target)
    back = gaussian.x0_and_noise(middle, inputs, target)
    again = np.asarray(gaussian.as_prediction(back, inputs.sigma, source))
    loss = 4e-7 * (_amplification(level, source) + _amplification(level, target) + 1)
    assert abs(again - given).max() <= loss * max(1, abs(given).max()), (name, source, target)


def _amplification(level, prediction):
  """Sizes of the terms that x0 and noise are differences of."""
  return {
    "x0": 4 * (1 + level) / level,
    "epsilon": 4 * (1 + level),
    "v": 8.0,
    "flow": 8.0,
  }[prediction]


def _float64(ends, level, prediction):
  alpha = 1 / np.sqrt(1 + level**2)
  return {
    "x0": ends.x0,
    "epsilon": ends.noise,
    "v": alpha * ends.noise - level * alpha * ends.x0,
    "flow": ends.noise - ends.x0,
  }[prediction]


def _ends64(xt, output, level, prediction):
  """By solving `x0 + level n = xt` together with the definition of the output."""
  alpha = 1 / np.sqrt(1 + level**2)
  row = {
    "x0": (1.0, 0.0),
    "epsilon": (0.0, 1.0),
    "v": (-level * alpha, alpha),
    "flow": (-1.0, 1.0),
  }[prediction]
  solved = np.linalg.solve(np.array([(1.0, level), row]), np.stack([xt.ravel(), output.ravel()]))
  return solved.reshape(2, *xt.shape)


def test_naive_float32_conversions_would_fail():
  """The test above can see the loss that it is about: `1 - abar` in float32 at the clean end."""
  table = gaussian.alphas_cumprod(1000, "scaled_linear", 0.00085, 0.012)
  naive = np.sqrt((1 - np.float32(table[0])) / np.float32(table[0]))
  assert abs(naive / VariancePreserving().sigmas()[0] - 1) > 4e-6


# The recorded epsilon-prediction of SD 1.5 and SDXL.


@pytest.fixture(params=["09_sd15_math", "09_sdxl_math"])
def recorded(request, golden):
  return golden(request.param)


def nhwc(array):
  return jnp.asarray(np.moveaxis(array, 1, -1))


def vp_noised(xt, sigma):
  """A variance-preserving network's own input, in our coordinates."""
  return Noised(gaussian.per_sample(jnp.sqrt(1 + sigma**2), xt) * xt, sigma)


def test_recorded_noising(recorded):
  sigma = jnp.asarray(VariancePreserving().sigmas()[recorded["unet/timesteps"]])
  ours = gaussian.add_noise(nhwc(recorded["latents"]), nhwc(recorded["add_noise/noise"]), sigma)
  xt = ours.xt / gaussian.per_sample(jnp.sqrt(1 + sigma**2), ours.xt)
  np.testing.assert_allclose(xt, nhwc(recorded["add_noise/out"]), rtol=0, atol=2e-6)


def test_recorded_x0(recorded):
  """`unet/x0_real_f64` at timesteps 999, 20, 499 was computed in float64."""
  sigma = jnp.asarray(VariancePreserving().sigmas()[recorded["unet/timesteps"]])
  inputs = vp_noised(nhwc(recorded["latents"]), sigma)
  x0, _ = gaussian.x0_and_noise(nhwc(recorded["unet/eps_real"]), inputs, "epsilon")
  wanted = np.moveaxis(recorded["unet/x0_real_f64"], 1, -1)
  assert abs(wanted).max() > 20
  np.testing.assert_allclose(x0, wanted, rtol=0, atol=1e-6 * abs(wanted).max())


def test_recorded_guidance(recorded):
  """Guided noise is conditional and unconditional noise mixed, and so is the guided x0."""
  scale = recorded["config"]["real_guidance_scale"]
  conditional, mixed = recorded["unet/eps_real"], recorded["unet/eps_real_cfg"]
  unconditional = (scale * conditional - mixed) / (scale - 1)
  table = nhwc(np.concatenate([conditional, unconditional]))
  sigma = jnp.asarray(VariancePreserving().sigmas()[recorded["unet/timesteps"]])
  inputs = vp_noised(nhwc(recorded["latents"]), sigma)

  def predict_x0(inputs, condition):
    assert inputs.xt.shape[0] == inputs.sigma.shape[0] == 6
    return gaussian.x0_and_noise(table[condition["row"]], inputs, "epsilon").x0

  rows = {"row": jnp.arange(3)}
  x0 = guided(predict_x0, inputs, rows, {"row": 3 + jnp.arange(3)}, scale)
  wanted = gaussian.x0_and_noise(nhwc(mixed), inputs, "epsilon").x0
  np.testing.assert_allclose(x0, wanted, rtol=0, atol=2e-6 * float(abs(wanted).max()))
  epsilon = gaussian.x0_and_noise(x0, inputs, "x0").noise
  np.testing.assert_allclose(epsilon, nhwc(mixed), rtol=0, atol=1e-5)


# Options and bad values.


@pytest.mark.parametrize(
  ("process", "name", "value"),
  [
    (Edm(), "num_levels", 500),
    (Edm(), "sigma_min", 0.01),
    (Edm(), "sigma_max", 10.0),
    (Edm(), "rho", 5.0),
    (Edm(), "sigma_data", 1.0),
    (VariancePreserving(), "num_levels", 500),
    (VariancePreserving(), "schedule", "linear"),
    (VariancePreserving(), "beta_start", 0.001),
    (VariancePreserving(), "beta_end", 0.02),
    (VariancePreserving(), "prediction", "v"),
  ],
)
def test_an_option_changes_a_level_or_a_weight(process, name, value):
  other = dataclasses.replace(process, **{name: value})
  sigma = jnp.asarray([0.3, 3.0])
  same = np.array_equal(process.sigmas(), other.sigmas())
  assert not (same and (process.loss_weight(sigma) == other.loss_weight(sigma)).all())


def test_positions_run_from_0_to_1():
  for process in ENDS.values():
    sigmas = jnp.asarray(process.sigmas())
    position = process.position(sigmas)
    np.testing.assert_allclose(position[jnp.asarray([0, -1])], [0, 1], atol=1e-6)
    assert (jnp.diff(position) >= 0).all()
  np.testing.assert_allclose(Edm().position(jnp.asarray([40.001])), 0.5, atol=1e-6)  # of sigma
  middle = jnp.asarray(VariancePreserving().sigmas()[500:501])
  np.testing.assert_allclose(VariancePreserving().position(middle), 500 / 999, atol=1e-6)


@pytest.mark.parametrize(
  ("make", "name", "value"),
  [
    (Edm, "num_levels", 1),
    (Edm, "sigma_min", 0.0),
    (Edm, "sigma_max", 0.001),
    (Edm, "rho", 0.0),
    (Edm, "sigma_data", -1.0),
    (VariancePreserving, "num_levels", 0),
    (VariancePreserving, "schedule", "scaled"),
    (VariancePreserving, "beta_start", 0.0),
    (VariancePreserving, "beta_end", 1.0),
    (VariancePreserving, "prediction", "eps"),
  ],
)
def test_impossible_values_are_refused_in_one_line(make, name, value):
  with pytest.raises(UserError, match=f"process.{name}={value!r}") as error:
    make(**{name: value})
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("convert", [gaussian.x0_and_noise, gaussian.as_prediction])
def test_unknown_predictions_are_named(convert):
  x, sigma = images(1, 1, 1, 1), jnp.ones(1)
  arguments = (x, Noised(x, sigma)) if convert is gaussian.x0_and_noise else ((x, x), sigma)
  with pytest.raises(UserError, match=r"prediction='score' is unknown.*known: epsilon, flow"):
    convert(*arguments, "score") if len(arguments[0]) == 1 else convert(
      X0AndNoise(*arguments[0]), sigma, "score"
    )
