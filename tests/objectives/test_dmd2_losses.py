"""The two losses of DMD2 on recorded answers of the networks: EDM, SD 1.5 and SDXL.

The networks below answer with a table, and with NaN where they are asked anything else than what
was recorded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimo_jax.objectives.dmd2 import (
  FakeScoreDraws,
  GenerationDraws,
  GeneratorDraws,
  NoiseDraws,
  Samples,
)
from dimo_jax.processes.gaussian import (
  Edm,
  Noised,
  VariancePreserving,
  X0AndNoise,
  as_prediction,
  per_sample,
  x0_and_noise,
)
from dimo_jax.state import Nets, NetworkState
from tests.helpers import NO_GAN, dmd2

PROCESSES = {
  "08_dmd2_edm_math": Edm(),
  "09_sd15_math": VariancePreserving(),
  "09_sdxl_math": VariancePreserving(),
}


@pytest.fixture(params=PROCESSES)
def recorded(request, golden):
  arrays = golden(request.param)
  arrays["process"] = PROCESSES[request.param]
  arrays["samples"] = arrays["image" if request.param.startswith("08") else "latents"]
  return arrays


def nhwc(array):
  return jnp.asarray(np.moveaxis(array, 1, -1), jnp.float32)


def network(answer, asked=None, scale=None, wrap=lambda params: params):
  """Answers `answer`, if it is asked `asked` (whose coordinates are `xt * scale(sigma)`)."""

  def apply_fn(params, inputs, condition, **_):
    x0 = params["x0"]
    if asked is not None:
      off = jnp.abs(inputs.xt * per_sample(scale(inputs.sigma), inputs.xt) - nhwc(asked)).max()
      x0 = jnp.where(off < 2e-5 * abs(asked).max(), x0, jnp.nan)
    return x0

  return NetworkState.create(
    apply_fn=apply_fn,
    params=wrap({"x0": nhwc(answer)}),
    tx=optax.identity(),
    null_fn=lambda c: c,
  )


def noise_draws(recorded, name):
  timesteps = recorded[f"{name}/timesteps"].ravel()
  sigma = jnp.asarray(recorded["process"].sigmas()[timesteps])
  return NoiseDraws(sigma, nhwc(recorded[f"{name}/noise"]))


def setting(recorded):
  x0 = nhwc(recorded["samples"])
  vp = isinstance(recorded["process"], VariancePreserving)
  scale = (lambda s: 1 / jnp.sqrt(1 + s**2)) if vp else jnp.ones_like
  generation = GenerationDraws(
    jnp.zeros(len(x0), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros((1, *x0.shape))
  )
  objective = dmd2(process=recorded["process"], image_shape=x0.shape[1:], **NO_GAN)
  return x0, scale, generation, objective


def test_matching_gradient(recorded):
  x0, scale, generation, objective = setting(recorded)
  generator = network(recorded["samples"])
  noisy = recorded["dm/noisy"]
  nets = Nets(
    generator,
    network(recorded["dm/pred_fake"], noisy, scale, lambda params: {"score": params}),
    network(recorded["dm/pred_real"], noisy, scale),
  )
  draws = GeneratorDraws(generation, noise_draws(recorded, "dm"), noise_draws(recorded, "dm"))
  batch = {"class_id": generation.class_id}

  def loss_fn(params):
    return objective.generator_loss(params, nets, batch, draws, ())

  (loss, (samples, metrics, _)), slope = jax.value_and_grad(loss_fn, has_aux=True)(generator.params)
  np.testing.assert_array_equal(samples.output, x0)
  np.testing.assert_allclose(loss, recorded["dm/loss"], rtol=1e-5)
  gradient = slope["x0"] * x0.size
  wanted = recorded["dm/grad"]
  np.testing.assert_allclose(gradient, nhwc(wanted), rtol=0, atol=1e-5 * abs(wanted).max())
  np.testing.assert_allclose(metrics["distill/gradient"], abs(wanted).mean(), rtol=1e-5)
  key = next(key for key in recorded if key.startswith("dm/dloss_d"))
  atol = 1e-5 * abs(recorded[key]).max()
  np.testing.assert_allclose(slope["x0"], nhwc(recorded[key]), rtol=0, atol=atol)


def test_fake_score_loss(recorded):
  """EDM's weighting, and epsilon-prediction's plain error of the noise."""
  x0, _, generation, objective = setting(recorded)
  fake_score = network(recorded["fake/x0_pred"], wrap=lambda params: {"score": params})
  nets = Nets(network(recorded["samples"]), fake_score, network(recorded["samples"]))
  noise = noise_draws(recorded, "fake")
  draws = FakeScoreDraws(generation, noise, noise, noise, noise.noise)
  condition = {"class_id": generation.class_id}
  samples = Samples(x0, condition)

  def loss_fn(params):
    return objective.fake_score_loss(params, nets, samples, condition, draws, ())[0]

  loss, slope = jax.value_and_grad(loss_fn)(fake_score.params)
  np.testing.assert_allclose(loss, recorded["fake/loss"], rtol=1e-5)
  if isinstance(recorded["process"], Edm):
    weight = recorded["fake/weights"].ravel()
    np.testing.assert_allclose(objective.process.loss_weight(noise.sigma), weight, rtol=1e-5)
    error = nhwc(recorded["fake/x0_pred"]) - x0
    wanted = 2 * per_sample(jnp.asarray(weight), error) * error / x0.size
    np.testing.assert_allclose(slope["score"]["x0"], wanted, rtol=1e-4, atol=1e-7)


def test_an_epsilon_network_behind_the_contract(golden):
  """A network that predicts noise, wrapped to answer x0: loss and gradient are epsilon's own."""
  recorded = golden("09_sd15_math") | {"process": VariancePreserving()}
  recorded["samples"] = recorded["latents"]
  x0, _, generation, objective = setting(recorded)
  noise = noise_draws(recorded, "fake")
  xt = x0 + per_sample(noise.sigma, x0) * noise.noise
  ends = X0AndNoise(nhwc(recorded["fake/x0_pred"]), jnp.zeros_like(x0))
  epsilon = x0_and_noise(
    as_prediction(ends, noise.sigma, "x0"), Noised(xt, noise.sigma), "x0"
  ).noise

  def apply_fn(params, inputs, condition, **_):
    return x0_and_noise(params["epsilon"], inputs, "epsilon").x0

  fake_score = NetworkState.create(
    apply_fn=apply_fn, params={"score": {"epsilon": epsilon}}, tx=optax.identity()
  )
  nets = Nets(fake_score, fake_score, fake_score)
  draws = FakeScoreDraws(generation, noise, noise, noise, noise.noise)
  condition = {"class_id": generation.class_id}

  def loss_fn(params):
    samples = Samples(x0, condition)
    return objective.fake_score_loss(params, nets, samples, condition, draws, ())[0]

  loss, slope = jax.value_and_grad(loss_fn)(fake_score.params)
  np.testing.assert_allclose(loss, recorded["fake/loss"], rtol=1e-5)
  wanted = 2 * (epsilon - noise.noise) / x0.size
  np.testing.assert_allclose(slope["score"]["epsilon"], wanted, rtol=1e-3, atol=1e-7)


def test_a_sample_that_the_teacher_agrees_with_has_no_gradient(golden):
  """Zero over zero and over-large quotients become 0, not NaN or infinity."""
  recorded = golden("08_dmd2_edm_math") | {"process": Edm()}
  recorded["samples"] = recorded["image"]
  _, _, generation, objective = setting(recorded)
  fake = np.array(recorded["image"])
  fake[0] += 0.1  # infinite quotient; the others are 0 / 0
  generator = network(recorded["image"])
  nets = Nets(
    generator, network(fake, wrap=lambda params: {"score": params}), network(recorded["image"])
  )
  noise = noise_draws(recorded, "dm")
  draws = GeneratorDraws(generation, noise, noise)
  batch = {"class_id": generation.class_id}
  slope = jax.grad(lambda p: objective.generator_loss(p, nets, batch, draws, ())[0])(
    generator.params
  )
  np.testing.assert_array_equal(slope["x0"], 0)
