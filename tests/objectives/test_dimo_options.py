"""Every option of Dimo and OneStep matters, impossible values are refused, and the fixed point."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from dimo_jax.objectives.dimo import Dimo
from dimo_jax.processes import masking
from dimo_jax.samplers.maskgit import MaskGit
from dimo_jax.samplers.one_step import OneStep
from dimo_jax.state import Nets
from dimo_jax.types import UserError
from tests.helpers import CODEBOOK_SIZE, dimo, dimo_fields, toy_params, toy_state

CLOCK = 3
LABELS = jnp.asarray([[0, 1, 2, 1, 0, 2, 2, 1]], jnp.int32)

# Option: (another value, the setting in which it matters).
FLIPS = {
  "num_tokens": (8, {}),
  "codebook_size": (3, {}),
  "mask_token_id": (0, {}),
  "r_init": (0.0, {}),
  "r_init_high": (0.9, {}),
  "sigma_schedule": ("linear", {}),
  "sigma": (0.5, {}),
  "sigma_num_warmup": (20, {"sigma_schedule": "linear"}),
  "divergence": ("reverse_kl", {}),
  "jeffreys_beta": (-0.2, {}),
  "weighting": ("teacher_gap", {}),
  "reduction": ("mean", {}),
  "matching_weight": (2.0, {}),
  "mask_schedule": ("linear", {}),
  "fake_mask_schedule": ("linear", {}),
  "teacher_guidance": (3.0, {}),
  "adaptive_guidance": (True, {}),
  "fake_guidance": (2.0, {}),
  "fake_train_guidance": (2.0, {}),
  "fake_condition_drop": (0.9, {"fake_train_guidance": 2.0}),
  "generator_temperature": (3.0, {}),
  "teacher_temperature": (2.0, {}),
  "fake_temperature": (2.0, {}),
  "top_k": (1, {}),
  "top_p": (0.1, {}),
  "allow_mask_token": (True, {}),
  "label_smoothing": (0.3, {}),
  "soft_target_weight": (0.5, {}),
  "soft_temperature": (3.0, {"soft_target_weight": 0.5}),
  "dropout": (True, {}),
}
ELSEWHERE = {
  "fake_rounds": "tests/test_step.py counts the rounds",
  "reuse_samples": "tests/test_step.py follows the samples",
}
ONE_STEP_NAMES = {"temperature": "generator_temperature"}
ONE_STEP_FIELDS = [f.name for f in dataclasses.fields(OneStep) if f.name != "section"]  # wording


@pytest.fixture(scope="module")
def nets():
  return Nets(toy_state(0), toy_state(1), toy_state(2))


def first(tree):
  """The first micro-batch."""
  return jax.tree.map(lambda leaf: leaf[0], tree)


def outcome(objective, nets):
  """Samples and losses of one generator and one fake-score update, at a fixed key and clock."""
  batch, key, clock = {"class_id": LABELS}, jax.random.key(0), jnp.asarray(CLOCK)
  both = [objective.draw_generator(key, batch, clock), objective.draw_fake(key, batch, clock)]
  draws, micro = first((both, batch))
  params = nets.generator.params
  loss, (samples, _, extra) = objective.generator_loss(params, nets, micro, draws[0], ("kept",))
  assert extra == ("kept",)
  fake_samples = objective.generate(params, nets, micro, draws[1])
  fake_loss, _ = objective.fake_score_loss(
    nets.fake_score.params, nets, fake_samples, micro, draws[1], ()
  )
  return [np.asarray(x) for x in (samples.output, samples.logits, loss, fake_loss)]


def same(one, other):
  return all(a.shape == b.shape and (a == b).all() for a, b in zip(one, other, strict=True))


def test_every_option_is_covered():
  fields = {field.name for field in dataclasses.fields(Dimo)}
  assert set(FLIPS) | set(ELSEWHERE) == fields and not set(FLIPS) & set(ELSEWHERE)
  one_step = {ONE_STEP_NAMES.get(name, name) for name in ONE_STEP_FIELDS}
  assert one_step <= set(FLIPS)


@pytest.mark.parametrize("name", FLIPS)
def test_an_option_changes_a_loss_or_a_sample(name, nets):
  value, setting = FLIPS[name]
  base = outcome(dimo(**setting), nets)
  assert same(base, outcome(dimo(**setting), nets))
  assert not same(base, outcome(dimo(**setting | {name: value}), nets))


@pytest.mark.parametrize("field", ONE_STEP_FIELDS)
def test_an_option_of_the_sampler_changes_a_sample(field, nets):
  name = ONE_STEP_NAMES.get(field, field)
  value, setting = FLIPS[name]
  base = dimo(**setting).one_step
  other = dataclasses.replace(base, **{field: value})
  samples = []
  for sampler in (base, other):
    draws = first(sampler.draw(jax.random.key(0), jax.random.key(1), LABELS.shape, CLOCK))
    tokens, logits = sampler.generate(nets.generator, {"class_id": LABELS[0]}, draws)
    samples.append([np.asarray(tokens), np.asarray(logits)])
  assert not same(*samples)


def generator_gradient(objective, nets):
  batch = {"class_id": LABELS}
  draws = objective.draw_generator(jax.random.key(3), batch, jnp.asarray(CLOCK))
  micro, draws = first((batch, draws))
  gradient = jax.grad(lambda params: objective.generator_loss(params, nets, micro, draws, ())[0])(
    nets.generator.params
  )
  return max(float(abs(leaf).max()) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jeffreys"])
@pytest.mark.parametrize("weighting", ["none", "teacher_gap"])
def test_no_gradient_where_the_fake_score_equals_the_teacher(divergence, weighting):
  setting = {
    "divergence": divergence,
    "jeffreys_beta": -0.2,
    "weighting": weighting,
    "teacher_guidance": 2.0,
    "fake_guidance": 2.0,
    "teacher_temperature": 0.8,
    "fake_temperature": 0.8,
  }
  equal = Nets(toy_state(0), toy_state(2), toy_state(2))
  assert generator_gradient(dimo(**setting), equal) < 1e-5
  for name in ("fake_guidance", "fake_temperature"):
    assert generator_gradient(dimo(**setting | {name: 1.0}), equal) > 1e-2
  different = Nets(toy_state(0), toy_state(1), toy_state(2))
  assert generator_gradient(dimo(**setting), different) > 1e-2


def test_no_weight_turns_matching_off(nets):
  assert generator_gradient(dimo(), nets) > 1e-2
  assert generator_gradient(dimo(matching_weight=0.0), nets) == 0


def test_the_teacher_gap_weight_divides_by_the_mean_difference(nets):
  """The paper's weight, recomputed from the probabilities of one sample at a time."""
  plain, weighted = dimo(teacher_guidance=1.0), dimo(teacher_guidance=1.0, weighting="teacher_gap")
  batch = {"class_id": LABELS[:, :1]}
  draws = plain.draw_generator(jax.random.key(3), batch, jnp.asarray(CLOCK))
  micro, draws = first((batch, draws))
  losses = [
    objective.generator_loss(nets.generator.params, nets, micro, draws, ())
    for objective in (plain, weighted)
  ]
  samples = losses[0][1][0]
  num = masking.num_masked(masking.mask_ratio(draws.mask_u, plain.mask_schedule), 9)
  mask = masking.exact_mask(draws.mask_order, num)
  masked = masking.corrupt(samples.output, mask, plain.mask_token_id)
  teacher = jax.nn.softmax(nets.teacher.predict(masked, micro))
  gap = abs(jax.nn.softmax(samples.logits) - teacher).mean()
  np.testing.assert_allclose(losses[1][0], losses[0][0] / gap**2, rtol=1e-4)


def test_two_updates_share_the_ratio_but_no_other_draw():
  objective = dimo(r_init=0.1, r_init_high=0.9, sigma_schedule="linear", sigma_num_warmup=6)
  batch = {"class_id": jnp.zeros((3, 4), jnp.int32)}
  key, clock = jax.random.key(0), jnp.asarray(CLOCK)
  one = objective.draw_generator(key, batch, clock)
  two = objective.draw_fake(key, batch, clock)
  ratios = np.concatenate([one.generation.r_init, two.generation.r_init])
  assert (ratios == ratios[0]).all() and 0.1 <= ratios[0] <= 0.9  # one for all micro-batches
  assert (one.generation.sigma == 0.5).all() and (two.generation.sigma == 0.5).all()
  other = objective.draw_generator(jax.random.key(1), batch, clock)
  assert other.generation.r_init[0] != ratios[0]
  for name in ("initial_tokens", "initial_order"):
    drawn = getattr(one.generation, name)
    assert (drawn != getattr(two.generation, name)).any()
    assert (drawn[0] != drawn[1]).any()  # micro-batches differ
  for name in ("mask_u", "mask_order"):
    assert (getattr(one, name) != getattr(two, name)).all()
  orders = [one.mask_order, one.generation.initial_order]
  assert (orders[0] != orders[1]).all()


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("r_init", -0.1),
    ("r_init", 1.5),
    ("r_init_high", 0.5),  # below r_init
    ("sigma", 1.5),
    ("sigma_schedule", "lineer"),
    ("divergence", "forward"),
    ("weighting", "gap"),
    ("reduction", "max"),
    ("matching_weight", -1.0),
    ("mask_schedule", "arcos"),
    ("fake_mask_schedule", "arcos"),
    ("teacher_guidance", -1.0),
    ("fake_guidance", -1.0),
    ("fake_train_guidance", -1.0),
    ("fake_condition_drop", 1.5),
    ("generator_temperature", 0.0),
    ("teacher_temperature", 0.0),
    ("fake_temperature", -1.0),
    ("top_k", -1),
    ("top_k", 99),
    ("top_p", 1.5),
    ("label_smoothing", -0.1),
    ("soft_target_weight", 1.1),
    ("soft_temperature", 0.0),
    ("fake_rounds", 0),
  ],
)
def test_impossible_values_are_refused_in_one_line(name, value):
  with pytest.raises(UserError) as error:
    dimo(**{name: value})
  text = str(error.value)
  assert name.removeprefix("generator_") in text and str(value) in text
  assert "\n" not in text


def test_a_warm_up_needs_a_length():
  with pytest.raises(UserError, match="sigma_num_warmup=0"):
    dimo(sigma_schedule="cosine", sigma_num_warmup=0)


def test_the_mask_id_is_forbidden_unless_allowed(nets):
  """A generator that wants to emit the mask id at every position."""
  params = toy_params(0)
  params["out"] = params["out"] * 0
  generator = nets.generator.replace(
    params=params,
    apply_fn=lambda p, tokens, condition, **_: jnp.zeros((*tokens.shape, 6)).at[..., 5].set(50.0),
  )
  for allowed in (False, True):
    sampler = dimo(allow_mask_token=allowed).one_step
    draws = first(sampler.draw(jax.random.key(0), jax.random.key(1), LABELS.shape, 0))
    tokens, _ = sampler.generate(generator, {"class_id": LABELS[0]}, draws)
    assert (tokens == 5).all() == allowed
    sampled = sampler.sample(generator, {"class_id": LABELS[0]}, jax.random.key(0))
    assert sampled.max() <= 4


def test_the_config_has_every_field_of_the_objective():
  assert set(dimo_fields()) == {field.name for field in dataclasses.fields(Dimo)}


def test_the_target_reveals_one_token_a_step():
  decoding = MaskGit(
    grid=(4, 4),
    codebook_size=CODEBOOK_SIZE,
    mask_token_id=CODEBOOK_SIZE,
    **base.get_config().teacher.decoding.to_dict(),
  )
  objective = dimo(num_tokens=16, teacher_guidance=1.25, teacher_temperature=0.8)
  target = objective.target(decoding)
  assert target.counts().tolist() == [1] * 16
  assert (target.order, target.temperature, target.guidance_scale) == ("random", 0.8, 1.25)
  assert not target.guidance_ramp


def test_one_ratio_unless_a_range_is_asked_for():
  for options, wanted in (({"r_init": 0.4}, {0.4}), ({"r_init": 0.4, "r_init_high": 0.8}, None)):
    sampler = dimo(**options).one_step
    drawn = {
      round(float(sampler.draw(jax.random.key(0), jax.random.key(i), (1, 2), 0).r_init[0]), 5)
      for i in range(5)
    }
    assert drawn == wanted if wanted else len(drawn) == 5


def test_sampling_draws_the_ratio_from_a_key_of_its_own(monkeypatch):
  """One key for two draws would correlate them."""
  draw, seen = OneStep.draw, []

  def spy(self, key, ratio_key, shape, clock):
    seen.append((key, ratio_key))
    return draw(self, key, ratio_key, shape, clock)

  monkeypatch.setattr(OneStep, "draw", spy)
  dimo().one_step.sample(toy_state(0), {"class_id": LABELS[0]}, jax.random.key(0))
  ((key, ratio_key),) = seen
  others = jax.random.key_data(jax.random.split(key, 4)).tolist()
  assert jax.random.key_data(ratio_key).tolist() not in [*others, jax.random.key_data(key).tolist()]
