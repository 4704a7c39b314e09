"""Every option of Dmd2 matters, impossible values are refused; fixed point, backward simulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimo_jax.objectives import OBJECTIVES, Objective, adversarial
from dimo_jax.objectives.denoising import GaussianDenoising
from dimo_jax.objectives.dmd2 import Dmd2, score_network
from dimo_jax.optim import OptimizerSpec
from dimo_jax.processes.gaussian import Edm, Noised, VariancePreserving, add_noise
from dimo_jax.state import Nets, PretrainState, copy_tree
from dimo_jax.step import pretrain_step
from dimo_jax.types import UserError
from tests.helpers import (
  FOUR_STEPS,
  IMAGE_SHAPE,
  NO_GAN,
  NUM_CLASSES,
  dmd2,
  dmd2_fields,
  toy_denoiser,
)

CLOCK, KEY = jnp.asarray(3), jax.random.key(4)
LABELS = jnp.asarray([[0, 1, 2, 1, 0, 2, 2, 1]], jnp.int32)

# Option: (another value, the setting in which it matters).
FOUR = {"student_sigmas": FOUR_STEPS}
F_DISTILL = {"divergence": "jensen_shannon"}
FLIPS = {
  "process": (Edm(sigma_max=10.0), {}),
  "num_classes": (1, {}),
  "student_sigmas": ((20.0,), {}),
  "student_inputs": ("real", FOUR),
  "matching_weight": (2.0, {}),
  "min_level": (0.9, {}),
  "max_level": (0.1, {}),
  "teacher_guidance": (2.0, {}),
  "fake_guidance": (2.0, {}),
  "gan_generator_weight": (1.0, {}),
  "gan_critic_weight": (1.0, {}),
  "gan_num_levels": (0, {}),
  "critic_features": ("teacher", {}),
  "critic_groups": (2, {}),
  "r1_weight": (1000.0, {}),
  "r1_alpha": (0.5, {"r1_weight": 1000.0}),
  "divergence": ("jensen_shannon", {}),
  "ratio_normalization": (False, F_DISTILL),
  "ratio_rate": (0.5, F_DISTILL),
  "regression_weight": (1.0, {}),
}
ELSEWHERE = {
  "fake_rounds": "tests/test_step.py counts the rounds",
  "reuse_samples": "tests/test_step.py follows the samples",
  "image_shape": "the shape of everything",
}


@pytest.fixture(scope="module")
def nets():
  return make_nets()


def make_nets(teacher=2, fake=1):
  objective, state = dmd2(), toy_denoiser(fake)
  params = objective.fake_score_params(jax.random.key(0), state)
  fake_score = state.replace(params=params)
  return Nets(toy_denoiser(0), fake_score, toy_denoiser(teacher))


def real_batch(seed=0):
  rng = np.random.default_rng(seed)
  pairs = {"noise": rng.standard_normal((1, 8, *IMAGE_SHAPE))}
  pairs |= {"image": np.tanh(pairs["noise"]), "class_id": LABELS}
  image = rng.uniform(-1, 1, (1, 8, *IMAGE_SHAPE))
  return jax.tree.map(
    lambda x: jnp.asarray(x, jnp.int32 if x.dtype == np.int32 else jnp.float32),
    {"image": image, "class_id": np.asarray(LABELS), "pairs": pairs},
  )


def first(tree):
  """The first micro-batch."""
  return jax.tree.map(lambda leaf: leaf[0], tree)


def outcome(objective, nets, batch=None, key=KEY):
  """Samples, losses and extra of one generator and one fake-score update, at a fixed key."""
  batch = real_batch() if batch is None else batch
  both = [objective.draw_generator(key, batch, CLOCK), objective.draw_fake(key, batch, CLOCK)]
  draws, micro = first((both, batch))
  params = nets.generator.params
  loss, (samples, _, extra) = objective.generator_loss(
    params, nets, micro, draws[0], objective.init_extra()
  )
  fake_samples = objective.generate(params, nets, micro, draws[1])
  fake_loss, _ = objective.fake_score_loss(
    nets.fake_score.params, nets, fake_samples, micro, draws[1], extra
  )
  kept = samples.output, loss, fake_samples.output, fake_loss, extra
  return [np.asarray(x) for x in jax.tree.leaves(kept)]


def same(one, other):
  return len(one) == len(other) and all((a == b).all() for a, b in zip(one, other, strict=True))


def test_every_option_is_covered():
  fields = {field.name for field in dataclasses.fields(Dmd2)}
  assert set(FLIPS) | set(ELSEWHERE) == fields and not set(FLIPS) & set(ELSEWHERE)
  assert set(dmd2_fields()) == fields


def test_it_is_an_objective():
  assert OBJECTIVES["dmd2"] is Dmd2 and isinstance(dmd2(), Objective)


@pytest.mark.parametrize("name", FLIPS)
def test_an_option_changes_a_loss_or_a_sample(name, nets):
  value, setting = FLIPS[name]
  base = outcome(dmd2(**setting), nets)
  assert all(np.isfinite(x).all() for x in base)
  assert not same(base, outcome(dmd2(**setting | {name: value}), nets))


def test_the_same_key_gives_the_same_and_another_key_another_outcome(nets):
  one = outcome(dmd2(), nets)
  assert same(one, outcome(dmd2(), nets))
  assert not same(one, outcome(dmd2(), nets, key=jax.random.key(5)))


@pytest.mark.parametrize("divergence", adversarial.F_DIVERGENCES)
def test_each_divergence_weighs_the_gradient_its_own_way(divergence, nets):
  """The gradient of each sample is plain DMD2's times one positive number, of mean one."""
  batch, slopes = first(real_batch()), []
  for name in ("reverse_kl", divergence):
    objective = dmd2(divergence=name, gan_generator_weight=0.0)
    draws = first(objective.draw_generator(KEY, real_batch(), CLOCK))
    gradient, extra = objective._matching_gradient(
      objective.generate(nets.generator.params, nets, batch, draws).output,
      nets,
      {"class_id": draws.generation.class_id},
      draws,
      objective.init_extra(),
    )
    slopes.append(np.asarray(gradient).reshape(8, -1))
  weights = slopes[1] / slopes[0]
  np.testing.assert_allclose(weights, weights[:, :1].repeat(slopes[0].shape[1], 1), rtol=1e-4)
  np.testing.assert_allclose(weights[:, 0].mean(), 1, rtol=1e-4)
  if divergence == "reverse_kl":
    np.testing.assert_array_equal(slopes[0], slopes[1])
    assert extra == ()
  else:
    assert np.ptp(weights[:, 0]) > 1e-3 and (extra["ratio_bins"] != 1).any()


# The fixed point.


def generator_gradient(objective, nets, batch=None):
  batch = real_batch() if batch is None else batch
  draws = first(objective.draw_generator(KEY, batch, CLOCK))
  gradient = jax.grad(
    lambda params: objective.generator_loss(
      params, nets, first(batch), draws, objective.init_extra()
    )[0]
  )(nets.generator.params)
  return max(float(abs(leaf).max()) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("setting", [{}, {"process": VariancePreserving()}, FOUR])
def test_no_gradient_where_the_fake_score_equals_the_teacher(setting):
  setting = {"teacher_guidance": 2.0, "fake_guidance": 2.0} | NO_GAN | setting
  equal = make_nets(teacher=2, fake=2)
  assert generator_gradient(dmd2(**setting), equal) < 1e-6
  assert generator_gradient(dmd2(**setting | {"fake_guidance": 1.0}), equal) > 1e-3
  assert generator_gradient(dmd2(**setting), make_nets(teacher=2, fake=1)) > 1e-3
  adversary = {"gan_critic_weight": 1.0, "gan_generator_weight": 1.0}
  assert generator_gradient(dmd2(**setting | adversary), equal) > 1e-4
  assert generator_gradient(dmd2(**setting | {"regression_weight": 1.0}), equal) > 1e-3


def test_terms_add_up(nets):
  """The loss is the weighted sum of its reported terms; matching may be off."""
  batch = real_batch()
  options = {"matching_weight": 0.5, "gan_generator_weight": 0.25, "regression_weight": 2.0}
  objective = dmd2(**options, r1_weight=3.0, gan_critic_weight=0.125)
  draws = first(
    (objective.draw_generator(KEY, batch, CLOCK), objective.draw_fake(KEY, batch, CLOCK))
  )
  micro = first(batch)
  params = nets.generator.params
  loss, (samples, metrics, _) = objective.generator_loss(params, nets, micro, draws[0], ())
  terms = [f"generator/{name}_loss" for name in ("matching", "gan", "regression")]
  wanted = np.dot(list(options.values()), [metrics[name] for name in terms])
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  fake_loss, (metrics, _) = objective.fake_score_loss(
    nets.fake_score.params, nets, samples, micro, draws[1], ()
  )
  wanted = metrics["fake_score/denoising_loss"]
  wanted += 0.125 * metrics["critic/loss"] + 3.0 * metrics["critic/r1_loss"]
  np.testing.assert_allclose(fake_loss, wanted, rtol=1e-5)
  alone = dmd2(matching_weight=0.0)
  loss, (_, metrics, _) = alone.generator_loss(params, nets, micro, draws[0], ())
  assert "generator/matching_loss" not in metrics
  np.testing.assert_allclose(loss, 3e-3 * metrics["generator/gan_loss"], rtol=1e-6)


# The critic.


def test_the_critics_gradient_trains_the_fake_scores_encoder_or_the_head_alone(nets):
  """With the teacher's features the fake score learns from its denoising loss alone."""
  batch = real_batch()
  slopes = {}
  for features in ("fake_score", "teacher"):
    for weight in (1e-6, 1.0):
      objective = dmd2(gan_critic_weight=weight, critic_features=features)
      draws = first(objective.draw_fake(KEY, batch, CLOCK))
      samples = objective.generate(nets.generator.params, nets, first(batch), draws)

      def loss_fn(params, objective=objective, samples=samples, draws=draws):
        return objective.fake_score_loss(params, nets, samples, first(batch), draws, ())[0]

      slopes[features, weight] = jax.grad(loss_fn)(nets.fake_score.params)
  for features, moved in (("fake_score", True), ("teacher", False)):
    one, other = (slopes[features, weight]["score"] for weight in (1e-6, 1.0))
    assert (
      abs(one["in"] - other["in"]).max() > 1e-3
      if moved
      else same(*map(jax.tree.leaves, (one, other)))
    )
    head = slopes[features, 1.0]["critic"]
    assert all(abs(leaf).max() > 0 for leaf in jax.tree.leaves(head["logit"]))


def test_the_generator_and_the_critic_pull_in_opposite_directions(nets):
  """On the same noised samples: what the generator descends, the critic climbs."""
  objective = dmd2(matching_weight=0.0, gan_generator_weight=1.0)
  batch = real_batch()
  draws = first(objective.draw_generator(KEY, batch, CLOCK))
  samples = objective.generate(nets.generator.params, nets, first(batch), draws)

  def logits(params):
    noised = add_noise(samples.output, draws.critic.noise, draws.critic.sigma)
    features = score_network(nets.fake_score).predict(
      noised, samples.condition, output="bottleneck"
    )
    return objective.critic.apply({"params": params}, features)

  loss, _ = objective.generator_loss(nets.generator.params, nets, first(batch), draws, ())
  wanted = np.log1p(np.exp(-np.asarray(logits(nets.fake_score.params["critic"]), np.float64)))
  np.testing.assert_allclose(loss, wanted.mean(), rtol=1e-5)


def test_r1_is_the_critics_sensitivity_at_the_noised_real_images(nets):
  """Against derivatives of the logit by autodiff, along the drawn direction."""
  batch, alpha = real_batch(), 1e-3
  objective = dmd2(r1_weight=1.0, r1_alpha=alpha)
  draws = first(objective.draw_fake(KEY, batch, CLOCK))
  micro = first(batch)
  samples = objective.generate(nets.generator.params, nets, micro, draws)
  _, (metrics, _) = objective.fake_score_loss(
    nets.fake_score.params, nets, samples, micro, draws, ()
  )
  noised = add_noise(micro["image"], draws.critic_real.noise, draws.critic_real.sigma)

  def logits(xt):
    features = score_network(nets.fake_score).predict(
      noised.replace(xt=xt), {"class_id": micro["class_id"]}, output="bottleneck"
    )
    return objective.critic.apply({"params": nets.fake_score.params["critic"]}, features)

  slope = jax.jvp(logits, (noised.xt,), (draws.r1_noise,))[1]
  wanted = jnp.mean(jnp.square(alpha * slope))
  np.testing.assert_allclose(metrics["critic/r1_loss"], wanted, rtol=0.05)


def test_without_diffusion_the_critic_sees_clean_images_at_the_smallest_level():
  objective = dmd2(gan_num_levels=0)
  draws = objective.draw_fake(KEY, real_batch(), CLOCK)
  for noise in (draws.critic_fake, draws.critic_real):
    assert (noise.noise == 0).all() and (noise.sigma == np.float32(0.002)).all()


def test_a_critic_needs_images(nets):
  batch = {"class_id": LABELS}
  for setting, field in (
    ({}, "dmd2.gan_critic_weight=0.01"),
    (NO_GAN | FOUR | {"student_inputs": "real"}, "dmd2.student_inputs='real'"),
  ):
    objective = dmd2(**setting)
    assert objective.uses_images
    with pytest.raises(UserError) as error:
      outcome(objective, nets, batch)
    assert str(error.value).startswith(f"{field} needs real images") and "\n" not in str(
      error.value
    )
  for setting in (NO_GAN, NO_GAN | FOUR):
    assert not dmd2(**setting).uses_images
    outcome(dmd2(**setting), nets, batch)


def test_regression_needs_pairs(nets):
  batch = real_batch()
  batch.pop("pairs")
  with pytest.raises(UserError, match=r"dmd2\.regression_weight=1\.0 needs noise-image pairs"):
    outcome(dmd2(regression_weight=1.0), nets, batch)


def test_regression_is_the_squared_distance_of_the_first_step(nets):
  micro = first(real_batch())
  objective = dmd2(matching_weight=0.0, regression_weight=1.0, **NO_GAN | FOUR)
  draws = first(objective.draw_generator(KEY, real_batch(), CLOCK))
  loss, _ = objective.generator_loss(nets.generator.params, nets, micro, draws, ())
  pairs = micro["pairs"]
  inputs = Noised(80.0 * pairs["noise"], jnp.full(8, 80.0))
  image = nets.generator.predict(inputs, {"class_id": pairs["class_id"]})
  np.testing.assert_allclose(loss, np.mean((np.asarray(image) - pairs["image"]) ** 2), rtol=1e-5)


# Draws.


def test_levels_are_uniform_on_their_ranges():
  """Matching: [20, 980] of 1000 inclusive; fake score and critic: their whole ranges."""
  objective = dmd2(process=Edm(num_levels=50), gan_num_levels=10, min_level=0.02, max_level=0.98)
  batch = {"class_id": jnp.zeros((1, 4000), jnp.int32)}
  sigmas = objective.process.sigmas()
  generator = objective.draw_generator(KEY, batch, CLOCK)
  fake = objective.draw_fake(KEY, batch, CLOCK)
  for noise, low, high in (
    (generator.matching, 1, 49),
    (generator.critic, 0, 9),
    (fake.denoising, 0, 49),
    (fake.critic_fake, 0, 9),
    (fake.critic_real, 0, 9),
  ):
    index = np.searchsorted(sigmas, np.asarray(noise.sigma[0]))
    assert (index.min(), index.max()) == (low, high)
    counts = np.bincount(index)[low:]
    assert abs(counts / counts.mean() - 1).max() < 0.5
  whole = dmd2(max_level=1.0).draw_generator(KEY, batch, CLOCK)
  assert whole.matching.sigma.max() <= 80  # the table's end is never passed
  labels = np.bincount(np.asarray(generator.generation.class_id[0]))
  assert len(labels) == NUM_CLASSES and abs(labels / labels.mean() - 1).max() < 0.2


def test_one_step_index_is_shared_by_the_global_batch_and_no_noise_is_shared():
  objective = dmd2(**FOUR)
  batch = {"class_id": jnp.zeros((3, 4), jnp.int32)}
  indices = set()
  for seed in range(20):
    key = jax.random.key(seed)
    one, two = objective.draw_generator(key, batch, CLOCK), objective.draw_fake(key, batch, CLOCK)
    index = np.asarray(one.generation.index)
    assert index.shape == (3,) and (index == index[0]).all()
    indices |= {int(index[0]), int(two.generation.index[0])}
  assert indices == set(range(4))
  arrays = [
    one.generation.noise[:, 0], one.generation.noise[:, 1], two.generation.noise[:, 0],
    one.matching.noise, one.critic.noise, two.denoising.noise, two.critic_fake.noise,
    two.critic_real.noise, two.r1_noise,
  ]  # fmt: skip
  micro = [leaf for array in arrays for leaf in array]
  for i, a in enumerate(micro):
    assert a.shape == (4, *IMAGE_SHAPE)
    assert all((a != b).all() for b in micro[:i])


# Backward simulation.


@pytest.mark.parametrize("index", range(4))
def test_generation_is_a_plain_loop_over_the_students_own_steps(index, nets):
  objective = dmd2(**FOUR)
  draws = first(objective.draw_generator(KEY, real_batch(), CLOCK))
  generation = draws.generation.replace(index=jnp.asarray(index))
  samples = jax.jit(objective.generate)(
    nets.generator.params, nets, first(real_batch()), draws.replace(generation=generation)
  )
  condition = {"class_id": generation.class_id}
  xt = FOUR_STEPS[0] * generation.noise[0]
  for i in range(index + 1):
    x0 = nets.generator.predict(Noised(xt, jnp.full(8, FOUR_STEPS[i])), condition)
    if i < index:
      xt = x0 + FOUR_STEPS[i + 1] * generation.noise[i + 1]
  np.testing.assert_allclose(samples.output, x0, rtol=0, atol=2e-5 * float(abs(x0).max()))
  np.testing.assert_array_equal(samples.condition["class_id"], generation.class_id)


def test_no_gradient_passes_through_the_steps_before(nets):
  """The gradient is that of the last step alone, from a constant input."""
  objective = dmd2(**FOUR, **NO_GAN)
  draws = first(objective.draw_generator(KEY, real_batch(), CLOCK))
  generation = draws.generation.replace(index=jnp.asarray(2))
  draws, condition = draws.replace(generation=generation), {"class_id": generation.class_id}
  params = nets.generator.params
  constant = objective.student.simulate(nets.generator, condition, generation.noise, 2)

  def output(params):
    return objective.generate(params, nets, first(real_batch()), draws).output.sum()

  def last_step(params):
    return nets.generator.replace(params=params).predict(constant, condition).sum()

  for ours, wanted in zip(
    jax.tree.leaves(jax.grad(output)(params)), jax.tree.leaves(jax.grad(last_step)(params)),
    strict=True,
  ):  # fmt: skip
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


def test_backward_simulation_never_sees_real_data(nets):
  """Without a critic a generator update depends on no real image or label; the ablation does."""
  for inputs, independent in (("simulated", True), ("real", False)):
    objective = dmd2(**FOUR, **NO_GAN, student_inputs=inputs)
    losses = []
    for seed in (0, 1):
      batch = real_batch(seed) | {"class_id": jnp.roll(LABELS, seed)}
      draws = first(objective.draw_generator(KEY, batch, CLOCK))
      draws = draws.replace(generation=draws.generation.replace(index=jnp.asarray(2)))
      loss, slope = jax.value_and_grad(
        lambda p, o=objective, b=batch, d=draws: o.generator_loss(p, nets, first(b), d, ())[0]
      )(nets.generator.params)
      losses.append([loss, *jax.tree.leaves(slope)])
    assert same(*losses) == independent


def test_real_inputs_are_noised_real_images_with_their_labels(nets):
  objective, micro = dmd2(**FOUR, student_inputs="real"), first(real_batch())
  draws = first(objective.draw_generator(KEY, real_batch(), CLOCK))
  for index in (0, 2):
    generation = draws.generation.replace(index=jnp.asarray(index))
    samples = objective.generate(
      nets.generator.params, nets, micro, draws.replace(generation=generation)
    )
    xt = FOUR_STEPS[index] * generation.noise[index] + (micro["image"] if index else 0)
    condition = {"class_id": micro["class_id"]}
    wanted = nets.generator.predict(Noised(xt, jnp.full(8, FOUR_STEPS[index])), condition)
    np.testing.assert_allclose(samples.output, wanted, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(samples.condition["class_id"], micro["class_id"])


# Bad values.


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"num_classes": 0}, "data.num_classes=0 must be 1 or more"),
    ({"student_sigmas": (40.0, 1.0)}, "dmd2.student_sigmas=(40.0, 1.0) must start at the noise"),
    ({"student_inputs": "noised"}, "dmd2.student_inputs='noised' must be 'simulated' or 'real'"),
    ({"matching_weight": -1.0}, "dmd2.matching_weight=-1.0 must not be negative"),
    ({"matching_weight": 0.0, **NO_GAN}, "dmd2.matching_weight=0.0 must be positive, or"),
    ({"min_level": 1.0}, "dmd2.min_level=1.0 must lie in [0, 1)"),
    ({"max_level": 0.01}, "dmd2.max_level=0.01 must lie in (min_level, 1]"),
    ({"max_level": 1.5}, "dmd2.max_level=1.5 must lie in (min_level, 1]"),
    ({"teacher_guidance": -1.0}, "dmd2.teacher_guidance=-1.0 must not be negative"),
    ({"fake_guidance": -1.0}, "dmd2.fake_guidance=-1.0 must not be negative"),
    ({"gan_generator_weight": -1.0}, "dmd2.gan_generator_weight=-1.0 must not be negative"),
    ({"gan_critic_weight": -1.0}, "dmd2.gan_critic_weight=-1.0 must not be negative"),
    ({"gan_critic_weight": 0.0}, "dmd2.gan_generator_weight=0.003 needs the critic"),
    ({"gan_num_levels": 1001}, "dmd2.gan_num_levels=1001 must lie in [0, 1000]"),
    ({"critic_features": "student"}, "dmd2.critic_features='student' must be 'fake_score' or"),
    ({"critic_groups": 0}, "dmd2.critic_groups=0 must be 1 or more"),
    ({"r1_weight": 1.0, **NO_GAN}, "dmd2.r1_weight=1.0 needs the critic"),
    ({"r1_alpha": 0.0}, "dmd2.r1_alpha=0.0 must be positive"),
    ({"divergence": "jeffrey"}, "dmd2.divergence='jeffrey' is unknown; did you mean 'jeffreys'"),
    ({"divergence": "jeffreys", **NO_GAN}, "dmd2.divergence='jeffreys' needs the critic"),
    ({"ratio_rate": 1.0}, "dmd2.ratio_rate=1.0 must lie in [0, 1)"),
    ({"regression_weight": -1.0}, "dmd2.regression_weight=-1.0 must not be negative"),
    ({"fake_rounds": 0}, "dmd2.fake_rounds=0 must be 1 or more"),
  ],
)
def test_impossible_values_are_refused_in_one_line(options, text):
  with pytest.raises(UserError) as error:
    dmd2(**options)
  assert str(error.value).startswith(text) and "\n" not in str(error.value)


# What training starts from, and what an iteration costs.


def test_the_fake_score_starts_as_a_copy_of_the_teacher_with_a_head():
  teacher = toy_denoiser(2)
  params = dmd2().fake_score_params(jax.random.key(0), teacher)
  for name, leaf in teacher.params.items():
    np.testing.assert_array_equal(params["score"][name], leaf)
    assert params["score"][name] is not leaf
  assert params["critic"]["conv_0"]["kernel"].shape == (3, 3, 8, 8)
  assert set(dmd2(**NO_GAN).fake_score_params(jax.random.key(0), teacher)) == {"score"}
  assert dmd2().init_extra() == () and dmd2(ratio_normalization=False).init_extra() == ()
  np.testing.assert_array_equal(dmd2(**F_DISTILL).init_extra()["ratio_bins"], np.ones(10))


def test_frozen_parts_of_the_fake_score_are_used(nets):
  """A fake score split into trained and frozen parts gives the same losses."""
  params = nets.fake_score.params
  frozen = {"score": {"in": params["score"]["in"]}}
  rest = {k: v for k, v in params["score"].items() if k != "in"}
  split = nets.fake_score.replace(params={"score": rest, "critic": params["critic"]}, frozen=frozen)
  assert same(outcome(dmd2(), nets), outcome(dmd2(), nets.replace(fake_score=split)))


def test_forward_equivalents_count_the_passes():
  reused, fresh = (dmd2(**FOUR, reuse_samples=reuse).forward_equivalents for reuse in (True, False))
  assert fresh["generator"] == reused["generator"] + 1 + 3 / 2  # simulated from 0 .. 3 steps before
  plain = dmd2(**NO_GAN).forward_equivalents
  assert plain == {"generator": 7, "teacher": 1, "fake_score": 1 + 15}
  more = dmd2(**NO_GAN, **FOUR, teacher_guidance=2.0).forward_equivalents
  assert more == {"generator": 7 + 1.5 * 5, "teacher": 2, "fake_score": 16}
  gan, by_teacher = dmd2().forward_equivalents, dmd2(critic_features="teacher").forward_equivalents
  assert gan["fake_score"] == 16 + 1 + 15 and gan["teacher"] == 1
  assert by_teacher == {"generator": 7, "teacher": 1 + 1 + 5, "fake_score": 16}


# Pre-training of a Gaussian teacher.


def pretraining(**options):
  fields = {
    "process": Edm(), "image_shape": IMAGE_SHAPE, "noise_levels": "log_normal",
    "noise_mean": -1.2, "noise_std": 1.2, "condition_drop_rate": 0.1, "dropout": False,
  }  # fmt: skip
  return GaussianDenoising(**fields | options)


def pretraining_loss(objective):
  network, batch = toy_denoiser(0), first(real_batch())
  return objective.loss(network.params, network, batch["image"], batch, objective.draw(KEY, 8))[0]


@pytest.mark.parametrize(
  ("name", "value", "setting"),
  [
    ("process", Edm(sigma_data=1.0), {}),
    ("process", VariancePreserving(), {"noise_levels": "table"}),
    ("noise_levels", "table", {}),
    ("noise_mean", 0.0, {}),
    ("noise_std", 0.5, {}),
    ("condition_drop_rate", 0.9, {}),
    ("dropout", True, {}),
  ],
)
def test_an_option_of_pretraining_changes_the_loss(name, value, setting):
  base, other = pretraining(**setting), pretraining(**setting | {name: value})
  assert pretraining_loss(base) != pretraining_loss(other)


def test_the_pretraining_loss_is_edms():
  """Loss by hand, one image at a time, in float64."""
  objective, network, batch = (
    pretraining(condition_drop_rate=0.5),
    toy_denoiser(0),
    first(real_batch()),
  )
  draws = objective.draw(KEY, 8)
  dropped = np.asarray(draws.drop_u) < 0.5
  assert dropped.any() and not dropped.all()
  errors = []
  for i in range(8):
    s = float(draws.sigma[i])
    label = NUM_CLASSES if dropped[i] else int(batch["class_id"][i])
    noised = Noised(batch["image"][i : i + 1] + s * draws.noise[i : i + 1], draws.sigma[i : i + 1])
    x0 = network.predict(noised, {"class_id": jnp.asarray([label])})
    errors.append((s**2 + 0.25) / (s * 0.5) ** 2 * np.square(np.asarray(x0[0] - batch["image"][i])))
  np.testing.assert_allclose(pretraining_loss(objective), np.mean(errors), rtol=1e-5)


@pytest.mark.parametrize(
  ("name", "value"),
  [("noise_levels", "uniform"), ("noise_std", 0.0), ("condition_drop_rate", 1.0)],
)
def test_impossible_pretraining_is_refused_in_one_line(name, value):
  with pytest.raises(UserError, match=f"teacher.pretrain.{name}={value!r}") as error:
    pretraining(**{name: value})
  assert "\n" not in str(error.value)


def test_a_pretrained_network_learns():
  """Adam on one batch: the loss falls; through the step that train.py jits."""

  class Pixels:
    def encode(self, params, images):
      return images

  tx = OptimizerSpec("adam", 1e-2, 0.9, 0.999, 1e-8, 0.0, 0.0, "constant", 0, 1.0).build(200)
  network = toy_denoiser(0, tx=tx)
  state = PretrainState(network, copy_tree(network.params))
  micro = first(real_batch())
  step = jax.jit(lambda s: pretrain_step(pretraining(), Pixels(), 0.9, s, {}, micro, KEY))
  losses = []
  for _ in range(200):
    state, metrics = step(state)
    losses.append(float(metrics["teacher/loss"]))
  assert np.mean(losses[-50:]) < 0.7 * np.mean(losses[:10])
  assert optax.tree.norm(state.ema) > 0
