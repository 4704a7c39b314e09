"""Heun's method and the few-step student against plain Python loops and closed forms."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimo_jax.processes.gaussian import Edm, Noised, VariancePreserving, X0AndNoise, as_prediction
from dimo_jax.samplers.edm import FewStep, Heun, HeunDraws
from dimo_jax.state import NetworkState
from dimo_jax.types import UserError
from tests.helpers import FOUR_STEPS, IMAGE_SHAPE, toy_denoiser

KEY = jax.random.key(3)
CONDITION = {"class_id": jnp.asarray([0, 1, 2, 1], jnp.int32)}
CHURN = {"s_churn": 3.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}


def heun(**options):
  return Heun(**{"image_shape": IMAGE_SHAPE, "num_steps": 7} | options)


def denoise(network, xt, sigma, scale=1.0):
  """One guided call, without `guided`."""
  inputs = Noised(jnp.asarray(xt, jnp.float32), jnp.full(len(xt), sigma, jnp.float32))
  conditional = np.asarray(network.predict(inputs, CONDITION), np.float64)
  if scale == 1:
    return conditional
  null = {"class_id": jnp.full(len(xt), 3, jnp.int32)}
  unconditional = np.asarray(network.predict(inputs, null), np.float64)
  return unconditional + scale * (conditional - unconditional)


def plain_heun(sampler, network, start, churn):
  """Algorithm 2 of EDM, step by step in float64."""
  num = sampler.num_steps
  low, high = sampler.sigma_min ** (1 / sampler.rho), sampler.sigma_max ** (1 / sampler.rho)
  levels = [(high + i / max(num - 1, 1) * (low - high)) ** sampler.rho for i in range(num)] + [0.0]
  x = levels[0] * np.asarray(start, np.float64)
  for i, (sigma, following) in enumerate(itertools.pairwise(levels)):
    gamma = 0.0
    if sampler.s_min <= sigma <= sampler.s_max:
      gamma = min(sampler.s_churn / num, np.sqrt(2) - 1)
    raised = sigma * (1 + gamma)
    x = x + np.sqrt(raised**2 - sigma**2) * sampler.s_noise * np.asarray(churn[i], np.float64)
    slope = (x - denoise(network, x, raised, sampler.guidance_scale)) / raised
    moved = x + (following - raised) * slope
    if following > 0:
      second = (moved - denoise(network, moved, following, sampler.guidance_scale)) / following
      moved = x + (following - raised) * (slope + second) / 2
    x = moved
  return x


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"num_steps": 1},
    {"num_steps": 2, "guidance_scale": 2.0},
    CHURN,
    {**CHURN, "s_churn": 40.0, "guidance_scale": 1.5},  # the rise is cut at sqrt(2)
  ],
)
def test_heun_is_the_plain_loop(options):
  sampler, network = heun(**options), toy_denoiser(0)
  shape = (sampler.num_steps, 4, *IMAGE_SHAPE)
  churn = jax.random.normal(jax.random.key(1), shape)
  draws = HeunDraws(jax.random.normal(KEY, shape[1:]), churn)
  ours = jax.jit(lambda d: sampler.integrate(network, CONDITION, d))(draws)
  wanted = plain_heun(sampler, network, draws.start, churn)
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-4 * abs(wanted).max())


def test_churn_from_keys_is_churn_from_their_noise():
  sampler, network = heun(**CHURN), toy_denoiser(0)
  draws = sampler.draw(KEY, 4)
  noise = jnp.stack([jax.random.normal(key, draws.start.shape) for key in draws.churn])
  run = jax.jit(lambda d: sampler.integrate(network, CONDITION, d))
  np.testing.assert_allclose(run(draws), run(draws.replace(churn=noise)), rtol=0, atol=1e-5)
  np.testing.assert_array_equal(
    sampler.sample(network, CONDITION, KEY), sampler.integrate(network, CONDITION, draws)
  )


def gaussian_denoiser(mean, std):
  """The exact denoiser of a normal distribution, as a network."""

  def apply_fn(params, inputs, condition):
    s = inputs.sigma[:, None, None, None]
    return (std**2 * inputs.xt + s**2 * mean) / (std**2 + s**2)

  return NetworkState.create(apply_fn=apply_fn, params={}, tx=optax.identity())


@pytest.mark.parametrize("options", [{}, CHURN | {"s_noise": 1.0}])
def test_heun_reaches_the_distribution_of_an_exact_denoiser(options):
  sampler = Heun(image_shape=(4, 4, 1), num_steps=40, **options)
  samples = np.asarray(
    jax.jit(lambda key: sampler.sample(
      gaussian_denoiser(0.3, 0.2), {"class_id": jnp.zeros(512, jnp.int32)}, key
    ))(KEY)
  )  # fmt: skip
  np.testing.assert_allclose([samples.mean(), samples.std()], [0.3, 0.2], atol=0.01)


def test_heun_is_of_second_order():
  """Twice the steps, a quarter of the error, for an exact denoiser whose solution is known."""
  mean, std, start = 0.3, 0.5, jax.random.normal(KEY, (4, *IMAGE_SHAPE))
  with jax.enable_x64(True):
    start = np.asarray(start, np.float64)
    exact = mean + std * (80 * start - mean) / np.sqrt(std**2 + 80**2)
    errors = []
    for num in (20, 40):
      sampler = heun(num_steps=num)
      draws = HeunDraws(jnp.asarray(start), jnp.zeros((num, 1)))
      ours = sampler.integrate(gaussian_denoiser(mean, std), CONDITION, draws)
      errors.append(abs(np.asarray(ours) - exact).max())
  assert 3 < errors[0] / errors[1] < 5.5 and errors[1] < 0.03


# The student.


def student(**options):
  return FewStep(**{"process": Edm(), "image_shape": IMAGE_SHAPE, "sigmas": FOUR_STEPS} | options)


def plain_student(sampler, network, noise, num_steps):
  """The image after `num_steps` steps, one at a time."""
  xt = np.sqrt(sampler.sigmas[0] ** 2 + isinstance(sampler.process, VariancePreserving))
  xt = xt * np.asarray(noise[0], np.float64)
  for i in range(num_steps):
    x0 = denoise(network, xt, sampler.sigmas[i], sampler.guidance_scale)
    if i + 1 < num_steps:
      xt = x0 + sampler.sigmas[i + 1] * np.asarray(noise[i + 1], np.float64)
  return x0


VP_STEPS = tuple(VariancePreserving().sigmas()[[999, 749, 499, 249]].tolist())


@pytest.mark.parametrize(
  "options",
  [
    {"sigmas": (80.0,)},
    {"sigmas": (20.0,)},
    {},
    {"guidance_scale": 2.0},
    {"process": VariancePreserving(), "sigmas": VP_STEPS},
    {"process": VariancePreserving(), "sigmas": VP_STEPS[2:3]},
  ],
)
def test_the_student_is_the_plain_loop(options):
  sampler, network = student(**options), toy_denoiser(0)
  noise = sampler.draw(KEY, (4,))
  assert noise.shape == (sampler.num_steps, 4, *IMAGE_SHAPE)
  ours = jax.jit(lambda key: sampler.sample(network, CONDITION, key))(KEY)
  wanted = plain_student(sampler, network, noise, sampler.num_steps)
  np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * abs(wanted).max())


def test_a_variance_preserving_student_starts_from_unit_noise():
  """The published one-step rule: `(n - sqrt(1 - abar) eps(n)) / sqrt(abar)`, n at any level."""
  process = VariancePreserving()
  sigma = float(process.sigmas()[399])
  epsilon = jax.random.normal(jax.random.key(9), (4, *IMAGE_SHAPE))

  def apply_fn(params, inputs, condition):
    noise = X0AndNoise(inputs.xt - inputs.sigma[:, None, None, None] * epsilon, epsilon)
    return as_prediction(noise, inputs.sigma, "x0")

  network = NetworkState.create(apply_fn=apply_fn, params={}, tx=optax.identity())
  sampler = student(process=process, sigmas=(sigma,))
  n = np.asarray(sampler.draw(KEY, (4,))[0], np.float64)
  abar = 1 / (1 + sigma**2)
  wanted = (n - np.sqrt(1 - abar) * np.asarray(epsilon)) / np.sqrt(abar)
  np.testing.assert_allclose(sampler.sample(network, CONDITION, KEY), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("index", range(4))
def test_simulation_stops_before_its_step(index):
  """The input of step `index`, with a traced index, against the plain loop."""
  sampler, network = student(), toy_denoiser(0)
  noise = sampler.draw(KEY, (4,))
  inputs = jax.jit(lambda i: sampler.simulate(network, CONDITION, noise, i))(index)
  np.testing.assert_allclose(inputs.sigma, sampler.sigmas[index])
  wanted = sampler.sigmas[index] * np.asarray(noise[index], np.float64)
  if index:
    wanted = wanted + plain_student(sampler, network, noise, index)
  np.testing.assert_allclose(inputs.xt, wanted, rtol=0, atol=1e-5 * abs(wanted).max())


# Options and bad values.


@pytest.mark.parametrize(
  ("base", "name", "value"),
  [
    *(({}, *flip) for flip in (
      ("image_shape", (2, 3, 2)), ("num_steps", 5), ("sigma_min", 0.1), ("sigma_max", 20.0),
      ("rho", 3.0), ("s_churn", 3.0), ("guidance_scale", 2.0),
    )),
    *((CHURN, *flip) for flip in (("s_min", 1.0), ("s_max", 1.0), ("s_noise", 1.1))),
  ],
)  # fmt: skip
def test_an_option_changes_the_samples(base, name, value):
  network = toy_denoiser(0)
  one = heun(**base).sample(network, CONDITION, KEY)
  other = heun(**base | {name: value}).sample(network, CONDITION, KEY)
  assert one.shape != other.shape or (one != other).any()


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("process", VariancePreserving()),
    ("image_shape", (2, 3, 2)),
    ("sigmas", (80.0, 24.0, 6.0, 2.0)),
    ("guidance_scale", 2.0),
  ],
)
def test_an_option_changes_the_students_samples(name, value):
  assert {f.name for f in dataclasses.fields(FewStep)} == {
    "process", "image_shape", "sigmas", "guidance_scale",
  }  # fmt: skip
  network = toy_denoiser(0)
  one = student().sample(network, CONDITION, KEY)
  other = student(**{name: value}).sample(network, CONDITION, KEY)
  assert one.shape != other.shape or (one != other).any()


def test_every_option_of_heun_is_flipped():
  assert {f.name for f in dataclasses.fields(Heun)} == {
    "image_shape", "num_steps", "sigma_min", "sigma_max", "rho", "s_churn", "s_min", "s_max",
    "s_noise", "guidance_scale",
  }  # fmt: skip


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("num_steps", 0),
    ("sigma_min", 0.0),
    ("sigma_max", 0.001),
    ("rho", -1.0),
    ("s_churn", -1.0),
    ("s_min", -1.0),
    ("s_max", -2.0),
    ("s_noise", -1.0),
    ("guidance_scale", -1.0),
  ],
)
def test_impossible_values_are_refused_in_one_line(name, value):
  with pytest.raises(UserError, match=f"teacher.sampling.{name}={value!r}") as error:
    heun(**{name: value})
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("sigmas", "text"),
  [
    ((), "be one or more positive noise levels"),
    ((80.0, 0.0), "be one or more positive noise levels"),
    ((80.0, 20.0, 20.0), "fall from step to step"),
    ((40.0, 20.0), "start at the noise end, 80 or above"),
  ],
)
def test_impossible_schedules_are_refused_in_one_line(sigmas, text):
  with pytest.raises(UserError) as error:
    student(sigmas=sigmas)
  assert str(error.value) == f"dmd2.student_sigmas={sigmas!r} must {text}"
  with pytest.raises(UserError, match=r"sampling\.guidance_scale=-1\.0"):
    student(guidance_scale=-1.0)


def test_a_student_is_the_same_at_every_clock():
  assert student().at(17) == student()
