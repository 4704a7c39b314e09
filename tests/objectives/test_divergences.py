import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimo_jax.objectives.dimo import Dimo, DimoDraws, Samples
from dimo_jax.objectives.divergences import DIVERGENCES, divergence_fn, logit_gradient
from dimo_jax.samplers.one_step import OneStepDraws
from dimo_jax.state import Nets, NetworkState
from dimo_jax.types import UserError
from tests.helpers import dimo_fields

BETAS = (-0.2, 0.0, 0.3, 1.0)
CASES = [("forward_kl", 0.0), ("reverse_kl", 0.0), *(("jeffreys", beta) for beta in BETAS)]


def softmax(z):
  e = np.exp(z - z.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def closed_form(name, beta, fake, teacher):
  """Derivatives by hand, in float64: (value, gradient)."""
  q, p = softmax(fake), softmax(teacher)
  reverse = (q * np.log(q / p)).sum(axis=-1)
  forward = (p * np.log(p / q)).sum(axis=-1)
  forward_gradient = q - p
  reverse_gradient = q * (np.log(q) - np.log(p) - reverse[..., None])
  if name == "forward_kl":
    return forward, forward_gradient
  if name == "reverse_kl":
    return reverse, reverse_gradient
  mixed = [(1 - beta) * f + beta * r for f, r in
           ((forward, reverse), (forward_gradient, reverse_gradient))]  # fmt: skip
  return tuple(mixed)


@pytest.fixture(scope="module")
def logits():
  return np.random.default_rng(0).standard_normal((2, 2, 3, 7)) * 2


def test_every_divergence_is_tested():
  assert {name for name, _ in CASES} == set(DIVERGENCES)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_gradient_is_the_closed_form(name, beta, logits):
  fake, teacher = jnp.asarray(logits, jnp.float32)
  divergence = divergence_fn(name, beta)
  value, gradient = closed_form(name, beta, *logits)
  np.testing.assert_allclose(divergence(fake, teacher), value, rtol=1e-5, atol=1e-6)
  ours = logit_gradient(divergence, fake, teacher)
  np.testing.assert_allclose(ours, gradient, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_gradient_is_the_slope_of_the_value(name, beta, logits):
  with jax.enable_x64(True):
    fake, teacher = jnp.asarray(logits)
    divergence = divergence_fn(name, beta)
    gradient = np.asarray(logit_gradient(divergence, fake, teacher))
    assert gradient.dtype == np.float64
    step = 1e-5
    for v in range(fake.shape[-1]):
      up, down = fake.at[..., v].add(step), fake.at[..., v].add(-step)
      slope = (divergence(up, teacher) - divergence(down, teacher)) / (2 * step)
      np.testing.assert_allclose(gradient[..., v], slope, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_equal_distributions_have_no_gradient(name, beta, logits):
  fake = jnp.asarray(logits[0], jnp.float32)
  divergence = divergence_fn(name, beta)
  shifted = fake + 3.0  # the same distribution
  np.testing.assert_allclose(divergence(fake, shifted), 0, atol=1e-6)
  np.testing.assert_allclose(logit_gradient(divergence, fake, shifted), 0, atol=1e-6)


def test_unknown_divergences_are_named():
  with pytest.raises(UserError, match=r"dimo\.divergence='jefreys'.*did you mean 'jeffreys'"):
    divergence_fn("jefreys", 0.0)


# The two losses of Di[M]O on recorded logits. The networks below answer with a table, whatever
# their input; class 0 gives the conditional logits and the null class 1 the others.


def recorded_network(*tables):
  logits = jnp.stack([jnp.asarray(table) for table in tables])

  def apply_fn(params, tokens, condition, **_):
    b, n = params["logits"].shape[1], tokens.shape[0]  # guidance doubles each sample in its place
    return params["logits"][condition["class_id"], jnp.arange(n) * b // n]

  return NetworkState.create(
    apply_fn=apply_fn,
    params={"logits": logits},
    tx=optax.set_to_zero(),
    null_fn=lambda condition: {"class_id": jnp.ones_like(condition["class_id"])},
  )


def objective(config, **options):
  size = config["codebook_size"]
  grid = {"num_tokens": config["P"] ** 2, "codebook_size": size, "mask_token_id": size}
  return Dimo(**dimo_fields(**grid, allow_mask_token=True, sigma=0.0) | options)


def draws(recorded):
  b, length = recorded["perm_uniform"].shape
  codes = jnp.asarray(recorded["pred_code"].reshape(b, length), jnp.int32)
  return DimoDraws(
    generation=OneStepDraws(
      r_init=jnp.float32(0.6),
      sigma=jnp.float32(0.0),
      initial_tokens=codes,
      initial_order=jnp.asarray(recorded["perm_uniform"]),
      noise=jax.random.key(0),
      tokens=codes,
    ),
    mask_u=jnp.asarray(recorded["mask_u"]),
    mask_order=jnp.asarray(recorded["perm_uniform"]),
    drop_u=jnp.zeros(b),
    dropout_key=jax.random.key(0),
  )


def divergence_options(name):
  if name.startswith("Jeffreys_"):
    return {"divergence": "jeffreys", "jeffreys_beta": float(name.split("_")[1])}
  return {"divergence": {"FKL": "forward_kl", "RKL": "reverse_kl"}[name]}


@pytest.mark.parametrize("index", range(22))
def test_recorded_generator_losses(golden, index):
  recorded = golden("04_dimo_generator_losses")
  config = recorded["config"]
  case = types.SimpleNamespace(**config["cases"][index])
  scale = np.float32(case.teacher_fake_logit_scale)
  student = recorded["student_logits"]
  nets = Nets(
    generator=recorded_network(student, np.full_like(student, np.nan)),
    fake_score=recorded_network(scale * recorded["fake_logits"], np.zeros_like(student)),
    teacher=recorded_network(
      scale * recorded["teacher_logits_cond"], scale * recorded["teacher_logits_uncond"]
    ),
  )
  method = objective(
    config,
    **divergence_options(case.loss),
    reduction=case.reduction,
    teacher_guidance=case.true_cfg,
    adaptive_guidance=case.adaptive_cfg,
    teacher_temperature=case.true_temp,
    fake_temperature=case.fake_temp,
    mask_schedule=config["ratio_mode"],
  )
  batch = {"class_id": jnp.zeros(config["B"], jnp.int32)}

  def loss_fn(params):
    return method.generator_loss(params, nets, batch, draws(recorded), ())

  (loss, (samples, _, _)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
    nets.generator.params
  )
  slope = np.asarray(gradient["logits"][0])
  wanted = {key: recorded[f"{case.name}/{key}"] for key in ("loss", "grad", "dloss_dlogits")}
  np.testing.assert_array_equal(samples.output, recorded["pred_code"].reshape(3, 16))
  np.testing.assert_allclose(loss, wanted["loss"], rtol=1e-5)
  divisor = config["B"] if case.reduction == "sum" else slope.size
  np.testing.assert_allclose(slope * divisor, wanted["grad"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(slope, wanted["dloss_dlogits"], rtol=0, atol=1e-5 / divisor)
  assert not slope[~recorded["mask"].reshape(3, 16)].any()


@pytest.mark.parametrize("index", range(6))
def test_recorded_fake_score_losses(golden, index):
  recorded = golden("04_dimo_fake_losses")
  config = recorded["config"]
  case = types.SimpleNamespace(**config["cases"][index])
  fake_logits = recorded["fake_logits"]
  network = recorded_network(fake_logits, np.full_like(fake_logits, np.nan))
  method = objective(
    config,
    label_smoothing=config["label_smoothing"],
    soft_target_weight=case.alpha_fake,
    soft_temperature=case.temperature_fake,
  )
  batch = {"class_id": jnp.zeros(config["B"], jnp.int32)}
  given = draws(recorded)
  samples = Samples(given.generation.tokens, jnp.asarray(recorded["generator_logits"]), batch)

  def loss_fn(params):
    return method.fake_score_loss(
      params, Nets(network, network, network), samples, batch, given, ()
    )

  (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(network.params)
  np.testing.assert_allclose(loss, recorded[f"{case.name}/loss"], rtol=0, atol=1e-6)
  slope = gradient["logits"][0]
  np.testing.assert_allclose(slope, recorded[f"{case.name}/dloss_dlogits"], rtol=0, atol=1e-6)
