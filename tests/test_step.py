import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from dimo_jax.objectives.denoising import MaskedDenoising
from dimo_jax.optim import OptimizerSpec, scale_by_clock
from dimo_jax.state import (
  DistillState,
  Nets,
  NetworkState,
  PretrainState,
  all_finite,
  copy_tree,
  merge,
  split,
)
from dimo_jax.step import distill_step, pretrain_step
from dimo_jax.types import UserError
from tests.helpers import dimo, toy_apply, toy_params, toy_state

KEY = jax.random.key(7)


@functools.cache
def adam(learning_rate=1e-2, **options):
  fields = {
    "name": "adam",
    "learning_rate": learning_rate,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "schedule": "constant",
    "num_warmup": 0,
    "final_fraction": 1.0,
  }
  return OptimizerSpec(**fields | options).build(100)


def distill_state(tx=None, frozen=(), extra=()):
  tx = adam() if tx is None else tx
  nets = []
  for seed in (0, 1):
    trainable, rest = split(toy_params(seed), frozen)
    state = toy_state(seed).replace(params=trainable, frozen=rest, tx=tx)
    nets.append(state.replace(opt_state=tx.init(trainable)))
  ema = copy_tree(nets[0].params)
  return DistillState(*nets, ema, jnp.zeros((), jnp.int32), extra)


def batch(rounds=1, accumulation=1, seed=0):
  rng = np.random.default_rng(seed)
  labels = jnp.asarray(rng.integers(0, 3, (1 + rounds, accumulation, 8), np.int32))
  return {"generator": {"class_id": labels[0]}, "fake_score": {"class_id": labels[1:]}}


_STATIC = ("objective", "decay", "every", "num_rounds", "unroll")


@functools.partial(jax.jit, static_argnames=_STATIC)
def run(objective, state, data, key=KEY, *, decay=0.9, every=1, num_rounds=None, unroll=False):
  options = {"num_rounds": num_rounds, "unroll": unroll}
  return distill_step(objective, decay, every, state, toy_state(2), data, key, **options)


def assert_equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def differs(one, other):
  return any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), one, other)))


# The schedule of one iteration.


@pytest.mark.parametrize("rounds", [2, pytest.param(3, marks=pytest.mark.ci)])
def test_an_iteration_without_loops_is_the_same(rounds):
  objective, data = dimo(fake_rounds=rounds), batch(rounds=rounds, accumulation=2)
  start = distill_state()
  looped, plain = (run(objective, start, data, unroll=unroll) for unroll in (False, True))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), plain, looped)
  for unroll in (False, True):
    traced = jax.make_jaxpr(functools.partial(run, objective, unroll=unroll))(start, data)
    assert ("scan[" in str(traced)) != unroll


@pytest.mark.parametrize("rounds", [1, 3])
def test_one_generator_update_then_the_rounds(rounds):
  state, _ = run(dimo(fake_rounds=rounds), distill_state(), batch(rounds))
  assert (state.generator.step, state.fake_score.step, state.clock) == (1, rounds, rounds)
  state, _ = run(dimo(fake_rounds=rounds), state, batch(rounds))
  assert (state.generator.step, state.fake_score.step, state.clock) == (2, 2 * rounds, 2 * rounds)


def test_stopping_inside_an_iteration_is_doing_its_first_rounds():
  three = dimo(fake_rounds=3)
  data = batch(3)
  whole, _ = run(three, distill_state(), data)
  part, _ = run(three, distill_state(), data, num_rounds=2)
  two, metrics = run(dimo(fake_rounds=2), distill_state(), data)
  assert part.clock == 2
  assert_equal(part.fake_score.params, two.fake_score.params)
  assert_equal(part.generator.params, whole.generator.params)
  assert differs(part.fake_score.params, whole.fake_score.params)
  assert np.isfinite(metrics["fake_score/loss"])


def test_rounds_are_the_updates_of_a_plain_loop():
  """A generator update and two rounds, by calls of the losses and the optimiser."""
  objective, start, teacher, data = dimo(fake_rounds=2), distill_state(), toy_state(2), batch(2)
  nets = Nets(start.generator, start.fake_score, teacher)
  first = functools.partial(jax.tree.map, lambda leaf: leaf[0])
  draws = objective.draw_generator(jax.random.fold_in(KEY, 0), data["generator"], jnp.asarray(0))
  gradient = jax.jit(
    jax.grad(
      lambda p: objective.generator_loss(p, nets, first(data["generator"]), first(draws), ())[0]
    )
  )(start.generator.params)
  updated = start.generator.apply_gradients(grads=gradient, clock=jnp.asarray(0))
  nets = nets.replace(generator=updated)
  losses = []

  @jax.jit
  @jax.value_and_grad
  def fake_score_gradient(params, nets, samples, now, draws):
    return objective.fake_score_loss(params, nets, samples, now, draws, ())[0]

  for clock in range(2):
    now = jax.tree.map(lambda leaf, clock=clock: leaf[clock], data["fake_score"])
    draws = objective.draw_fake(jax.random.fold_in(KEY, clock), now, jnp.asarray(clock))
    now, draws = first((now, draws))
    samples = jax.jit(objective.generate)(nets.generator.params, nets, now, draws)
    loss, gradient = fake_score_gradient(nets.fake_score.params, nets, samples, now, draws)
    losses.append(loss)
    updated = nets.fake_score.apply_gradients(grads=gradient, clock=jnp.asarray(clock))
    nets = nets.replace(fake_score=updated)
  state, metrics = run(objective, start, data)
  for ours, plain in ((state.generator, nets.generator), (state.fake_score, nets.fake_score)):
    for name, wanted in plain.params.items():
      np.testing.assert_allclose(ours.params[name], wanted, rtol=0, atol=2e-6)
  np.testing.assert_allclose(metrics["fake_score/loss"], np.mean(losses), rtol=1e-5)


def test_schedules_follow_the_clock_of_fake_score_updates():
  """The second iteration of three rounds is at clock 3: a warm-up of 6 is half way."""
  tx = scale_by_clock(lambda clock: jnp.minimum(1.0, clock / 6))
  objective, state = dimo(fake_rounds=3), distill_state(tx)
  first, _ = run(objective, state, batch(3))
  assert_equal(first.generator.params, state.generator.params)  # the rate starts at 0
  second, metrics = run(objective, first, batch(3))
  moved = jax.tree.map(jnp.subtract, second.generator.params, first.generator.params)
  wanted = 0.5 * metrics["generator/grad_norm"]
  np.testing.assert_allclose(optax.tree.norm(moved), wanted, rtol=1e-4)


def test_accumulation_is_the_mean_over_micro_batches():
  """Two micro-batches of the same shapes, against the losses one micro-batch at a time."""
  objective, start, data = (
    dimo(),
    distill_state(scale_by_clock(lambda _: 1.0)),
    batch(1, accumulation=2),
  )
  state, metrics = run(objective, start, data)
  draws = objective.draw_generator(jax.random.fold_in(KEY, 0), data["generator"], jnp.asarray(0))
  nets = Nets(start.generator, start.fake_score, toy_state(2))

  def loss_fn(params, i):
    micro = jax.tree.map(lambda leaf: leaf[i], (data["generator"], draws))
    return objective.generator_loss(params, nets, *micro, ())[0]

  losses, gradients = zip(
    *(jax.value_and_grad(loss_fn)(start.generator.params, i) for i in range(2)), strict=True
  )
  assert losses[0] != losses[1]
  np.testing.assert_allclose(metrics["generator/loss"], np.mean(losses), rtol=1e-5)
  for name, before in start.generator.params.items():
    wanted = before - (gradients[0][name] + gradients[1][name]) / 2
    np.testing.assert_allclose(state.generator.params[name], wanted, rtol=1e-4, atol=1e-5)


# Randomness, averages, frozen parts.


def test_the_same_state_and_key_give_the_same_result_and_another_clock_other_draws():
  objective, start, data = dimo(), distill_state(), batch()
  one, metrics = run(objective, start, data)
  again, same_metrics = run(objective, start, data)
  assert_equal(one.generator.params, again.generator.params)
  assert_equal(metrics, same_metrics)
  _, other_key = run(objective, start, data, jax.random.key(8))
  _, later = run(objective, start.replace(clock=jnp.asarray(5)), data)
  assert len({float(m["generator/loss"]) for m in (metrics, other_key, later)}) == 3


@pytest.mark.parametrize("every", [1, 2])
def test_the_average_counts_generator_updates_from_zero(every):
  objective, state, decay = dimo(fake_rounds=2), distill_state(), 0.15
  ema = state.ema
  for k in range(3):
    state, _ = run(objective, state, batch(2), decay=decay, every=every)
    if k % every == 0:
      rate = min(decay, (1 + k) / (10 + k))
      ema = jax.tree.map(
        lambda old, new, r=rate: r * old + (1 - r) * new, ema, state.generator.params
      )
    for name in ema:
      np.testing.assert_allclose(state.ema[name], ema[name], rtol=0, atol=1e-6)


def test_no_decay_makes_the_average_follow():
  state, _ = run(dimo(), distill_state(), batch(), decay=0.0)
  assert_equal(state.ema, state.generator.params)


def test_frozen_parameters_have_no_moments_and_never_change():
  start = distill_state(frozen=("^table$",))
  state, _ = run(dimo(), start, batch())
  for before, after in (
    (start.generator, state.generator),
    (start.fake_score, state.fake_score),
  ):
    assert set(after.params) == {"classes", "out"} and set(after.frozen) == {"table"}
    assert_equal(after.frozen, before.frozen)
    assert differs(after.params, before.params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(after.opt_state)}
    assert shapes == {(), before.params["classes"].shape, before.params["out"].shape}
  assert set(state.ema) == {"classes", "out"}
  assert_equal(state.ema_params["table"], start.generator.frozen["table"])


def test_split_and_merge():
  params = {"a": {"b": 1, "c": 2}, "d": 3}
  trainable, frozen = split(params, ("^a/b$", "d"))
  assert (trainable, frozen) == ({"a": {"c": 2}}, {"a": {"b": 1}, "d": 3})
  assert merge(trainable, frozen) == params
  with pytest.raises(UserError, match=r"optim\.frozen='x' matches no parameter"):
    split(params, ("x",))
  with pytest.raises(UserError, match="leaves nothing to train"):
    split(params, ("a", "d"))


def test_the_teacher_is_neither_changed_nor_part_of_the_state():
  start, teacher = distill_state(), toy_state(2)
  copy = copy_tree(teacher.params)
  state, _ = jax.jit(functools.partial(distill_step, dimo(), 0.9, 1), donate_argnums=0)(
    start, teacher, batch(), KEY
  )
  assert_equal(teacher.params, copy)
  assert jax.tree.structure(state) == jax.tree.structure(distill_state())
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start.generator.params))
  for leaf in jax.tree.leaves(state):
    assert not any(np.array_equal(leaf, other) for other in jax.tree.leaves(copy))


def test_clipping_and_decay():
  params, grads = {"x": jnp.asarray([3.0, 4.0])}, {"x": jnp.asarray([30.0, 40.0])}
  seen = []
  for options in ({"clip_norm": 5.0}, {}, {"name": "adamw", "weight_decay": 0.5}):
    # b1 = b2 = 0 makes Adam's step g / (|g| + eps): a large eps shows the size of g.
    spec = OptimizerSpec(
      **{
        "name": "adam", "learning_rate": 0.1, "b1": 0.0, "b2": 0.0, "eps": 1e3, "weight_decay": 0.0,
        "clip_norm": 0.0, "schedule": "constant", "num_warmup": 0, "final_fraction": 1.0,
      } | options
    )  # fmt: skip
    tx = spec.build(10)
    updates, _ = tx.update(grads, tx.init(params), params, clock=jnp.asarray(0))
    seen.append(np.asarray(updates["x"]))
  g = np.asarray([30.0, 40.0])
  np.testing.assert_allclose(seen[0], -0.1 * (g / 10) / (g / 10 + 1e3), rtol=1e-5)
  np.testing.assert_allclose(seen[1], -0.1 * g / (g + 1e3), rtol=1e-5)
  np.testing.assert_allclose(seen[2], seen[1] - 0.1 * 0.5 * np.asarray([3.0, 4.0]), rtol=1e-5)


# An objective that reuses the generator's samples, as DMD2 does.


class Sample(struct.PyTreeNode):
  value: Any  # [b]
  made_by: Any  # [b], the generator's parameter


@dataclasses.dataclass(frozen=True)
class Reusing:
  """Generator and fake score have one number each; the fake score learns the samples' mean."""

  fake_rounds: int
  reuse_samples: bool

  def draw_generator(self, key, batch, clock):
    return jax.random.normal(jax.random.fold_in(key, 1), batch["class_id"].shape)

  def draw_fake(self, key, batch, clock):
    return jax.random.normal(jax.random.fold_in(key, 2), batch["class_id"].shape)

  def generate(self, generator_params, nets, batch, draws):
    x = generator_params["x"]
    return Sample(x + draws, jnp.full_like(draws, x))

  def generator_loss(self, generator_params, nets, batch, draws, extra):
    samples = self.generate(generator_params, nets, batch, draws)
    return generator_params["x"], (samples, {"generator/loss": samples.value.mean()}, extra + 1)

  def fake_score_loss(self, fake_params, nets, samples, batch, draws, extra):
    metrics = {
      "fake_score/made_by": jnp.mean(samples.made_by),
      "fake_score/sample": jnp.mean(samples.value),
    }
    return fake_params["x"], (metrics, extra + 10)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_round_receives_the_samples_of_before_the_update(reuse, accumulation):
  objective = Reusing(fake_rounds=1, reuse_samples=reuse)
  net = NetworkState.create(
    apply_fn=toy_apply, params={"x": jnp.asarray(3.0)}, tx=scale_by_clock(lambda _: 1.0)
  )
  start = DistillState(net, net, net.params, jnp.zeros((), jnp.int32), jnp.asarray(0))
  state, metrics = run(objective, start, batch(1, accumulation))
  assert state.generator.params["x"] == 2.0  # descended by its gradient, 1
  assert metrics["fake_score/made_by"] == (3.0 if reuse else 2.0)
  if reuse:
    np.testing.assert_allclose(metrics["fake_score/sample"], metrics["generator/loss"], rtol=1e-6)
  assert state.extra == 11 * accumulation  # handed from micro-batch to micro-batch


def test_later_rounds_generate_afresh():
  objective = Reusing(fake_rounds=3, reuse_samples=True)
  net = NetworkState.create(
    apply_fn=toy_apply, params={"x": jnp.asarray(3.0)}, tx=scale_by_clock(lambda _: 1.0)
  )
  start = DistillState(net, net, net.params, jnp.zeros((), jnp.int32), jnp.asarray(0))
  state, metrics = run(objective, start, batch(3))
  np.testing.assert_allclose(metrics["fake_score/made_by"], (3 + 2 + 2) / 3, rtol=1e-6)
  assert state.extra == 31 and state.fake_score.params["x"] == 0.0


def test_adams_mean_may_be_stored_in_bfloat16():
  start, short = distill_state(), distill_state(adam(mean_dtype="bfloat16"))
  (full, _), (half, _) = (run(dimo(), state, batch()) for state in (start, short))

  def types(state):
    adam_state = state.generator.opt_state[0]
    return [
      {x.dtype.name for x in jax.tree.leaves(tree)} for tree in (adam_state.mu, adam_state.nu)
    ]

  assert types(full) == [{"float32"}, {"float32"}]
  assert types(half) == [{"bfloat16"}, {"float32"}]
  again, _ = run(dimo(), half, batch())
  assert types(again) == types(half)
  assert differs(run(dimo(), full, batch())[0].generator.params, again.generator.params)
  with pytest.raises(UserError, match=r"o\.mean_dtype='float16' is unknown; known: float32, bfl"):
    OptimizerSpec(
      "adam", 1e-3, 0.9, 0.99, 1e-8, 0.0, 0.0, "constant", 0, 1.0, mean_dtype="float16"
    ).check(10, "o")


def test_reuse_spares_the_fake_score_a_generation():
  data, start = batch(), distill_state()
  (fresh, seen), (reused, seen_again) = (
    run(dimo(reuse_samples=reuse), start, data) for reuse in (False, True)
  )
  assert_equal(fresh.generator.params, reused.generator.params)
  assert seen["generator/loss"] == seen_again["generator/loss"]
  assert seen["fake_score/loss"] != seen_again["fake_score/loss"]
  counts = [dimo(reuse_samples=reuse).forward_equivalents for reuse in (False, True)]
  assert counts[0]["generator"] == 1 + counts[1]["generator"]


# Updates that come out NaN or infinite.


@dataclasses.dataclass(frozen=True)
class Faulty(Reusing):
  """The draws of one generator update and of one round are `value`, and so are their gradients or
  else only a metric, or `extra`.
  """

  value: float
  bad_generator: int  # its clock
  bad_fake: int
  place: str

  def draw_generator(self, key, batch, clock):
    del key
    return jnp.full(batch["class_id"].shape, jnp.where(clock == self.bad_generator, self.value, 1))

  def draw_fake(self, key, batch, clock):
    del key
    return jnp.full(batch["class_id"].shape, jnp.where(clock == self.bad_fake, self.value, 1))

  def generator_loss(self, generator_params, nets, batch, draws, extra):
    samples = self.generate(generator_params, nets, batch, jnp.ones_like(draws))
    loss, metric, extra = self._spoilt(generator_params["x"], draws, extra)
    return loss, (samples, {"generator/loss": metric}, extra)

  def fake_score_loss(self, fake_params, nets, samples, batch, draws, extra):
    loss, metric, extra = self._spoilt(fake_params["x"], draws, extra)
    return loss, ({"fake_score/loss": metric}, extra)

  def _spoilt(self, x, draws, extra):
    value = jnp.mean(draws)
    factors = [jnp.where(self.place == place, value, 1.0) for place in ("loss", "metric", "extra")]
    return x * factors[0], x * factors[1], extra + factors[2]


def one_number(tx):
  net = NetworkState.create(apply_fn=toy_apply, params={"x": jnp.asarray(3.0)}, tx=tx)
  return DistillState(net, net, net.params, jnp.zeros((), jnp.int32), jnp.zeros(()))


@pytest.mark.parametrize("place", ["loss", "metric", "extra"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_generator_update_that_is_not_finite_is_skipped_and_training_goes_on(value, place):
  objective = Faulty(1, False, value, bad_generator=1, bad_fake=-1, place=place)
  one, _ = run(objective, one_number(adam(0.1)), batch())
  two, metrics = run(objective, one, batch())
  for before, after in (
    (one.generator.params, two.generator.params),
    (one.generator.opt_state, two.generator.opt_state),
    (one.ema, two.ema),
  ):
    assert_equal(before, after)
  assert (two.generator.step, two.clock, two.extra) == (
    2,
    2,
    3.0,
  )  # only the fake score's was added
  assert (metrics["generator/skipped"], metrics["generator/skipped_in_a_row"]) == (1, 1)
  assert metrics["fake_score/skipped"] == 0 and differs(
    one.fake_score.params, two.fake_score.params
  )
  three, metrics = run(objective, two, batch())
  assert (metrics["generator/skipped"], metrics["generator/skipped_in_a_row"]) == (1, 0)
  assert all(np.isfinite(value) for value in metrics.values())
  assert differs(two.generator.params, three.generator.params) and differs(two.ema, three.ema)
  # Adam's bias correction counts what was applied: as the second update of a run without the fault.
  healthy = Faulty(1, False, 1.0, bad_generator=-1, bad_fake=-1, place=place)
  wanted = run(healthy, run(healthy, one_number(adam(0.1)), batch())[0], batch())[0]
  assert_equal(three.generator.params, wanted.generator.params)
  assert_equal(three.generator.opt_state, wanted.generator.opt_state)


@pytest.mark.parametrize("place", ["loss", "metric", "extra"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_round_that_is_not_finite_is_skipped_alone(bad, place):
  objective = Faulty(3, False, np.nan, bad_generator=-1, bad_fake=bad, place=place)
  state, metrics = run(objective, one_number(scale_by_clock(lambda _: 1.0)), batch(3))
  assert state.generator.params["x"] == 2.0
  assert state.fake_score.params["x"] == 1.0  # two of three rounds descended by 1
  assert (state.fake_score.step, state.clock, state.extra) == (3, 3, 3.0)
  assert metrics["fake_score/skipped"] == 1
  assert metrics["fake_score/skipped_in_a_row"] == (1 if bad == 2 else 0)
  assert metrics["generator/skipped"] == 0


def test_skipped_updates_in_a_row_are_counted():
  start = one_number(adam(0.1))
  spoilt = start.replace(generator=start.generator.replace(params={"x": jnp.asarray(jnp.nan)}))
  healthy = Faulty(2, False, 1.0, bad_generator=-1, bad_fake=-1, place="loss")
  state = spoilt
  for _ in range(3):
    state, metrics = run(healthy, state, batch(2))
  assert metrics["generator/skipped"] == metrics["generator/skipped_in_a_row"] == 3
  assert metrics["fake_score/skipped"] == 0 and not all_finite(state)
  assert all_finite(start)


# Pre-training.


class Ready:
  """A tokenizer whose images are tokens already."""

  def encode(self, params, images):
    return images.astype(jnp.int32) + params["shift"]


def pretraining(**options):
  fields = {
    "num_tokens": 9,
    "mask_token_id": 5,
    "mask_schedule": "arccos",
    "mask_kind": "exact",
    "loss_positions": "masked",
    "label_smoothing": 0.0,
    "condition_drop_rate": 0.1,
    "dropout": False,
  }
  return MaskedDenoising(**fields | options)


def pretrain_state(tx):
  network = toy_state(0, tx)
  return PretrainState(network, copy_tree(network.params))


def pretrain(step, state, num_updates):
  labels = jnp.arange(32) % 3
  images = jnp.broadcast_to(labels[:, None].astype(jnp.float32), (32, 9))  # all tokens: the class
  data = {"image": images, "class_id": labels}
  losses = []
  for _ in range(num_updates):
    state, metrics = step(state, {"shift": jnp.asarray(1)}, data, KEY)
    losses.append(float(metrics["teacher/loss"]))
  return state, losses, metrics


def test_pretraining_learns_and_averages():
  step = jax.jit(functools.partial(pretrain_step, pretraining(), Ready(), 0.9))
  start = pretrain_state(adam(3e-2))
  one, _, _ = pretrain(step, start, 1)
  for name, new in one.network.params.items():
    wanted = 0.1 * start.ema[name] + 0.9 * new
    np.testing.assert_allclose(one.ema[name], wanted, rtol=0, atol=1e-6)
  state, losses, metrics = pretrain(step, start, 60)
  assert losses[0] > 1.0 and np.mean(losses[-5:]) < 0.2
  assert metrics["teacher/token_accuracy"] > 0.9
  assert state.network.step == 60
  _, again, _ = pretrain(step, start, 2)
  assert again == losses[:2] and losses[0] != losses[1]


class Scaled(MaskedDenoising):
  """Its loss is multiplied by a number of the batch."""

  def loss(self, params, network, encoded, batch, draws):
    loss, metrics = super().loss(params, network, encoded, batch, draws)
    return loss * batch["scale"], metrics


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_teachers_update_that_is_not_finite_is_skipped(value):
  objective = Scaled(**dataclasses.asdict(pretraining()))
  step = jax.jit(functools.partial(pretrain_step, objective, Ready(), 0.5))
  batch = {"image": jnp.ones((4, 9)), "class_id": jnp.zeros(4, jnp.int32)}
  constants = {"shift": jnp.asarray(1)}
  one, _ = step(pretrain_state(adam(0.1)), constants, batch | {"scale": jnp.asarray(1.0)}, KEY)
  two, metrics = step(one, constants, batch | {"scale": jnp.asarray(value)}, KEY)
  for before, after in (
    (one.ema, two.ema),
    (one.network.params, two.network.params),
    (one.network.opt_state, two.network.opt_state),
  ):
    assert_equal(before, after)
  assert two.network.step == 2
  assert metrics["teacher/skipped"] == metrics["teacher/skipped_in_a_row"] == 1
  three, metrics = step(two, constants, batch | {"scale": jnp.asarray(1.0)}, KEY)
  assert differs(two.network.params, three.network.params) and differs(two.ema, three.ema)
  assert (metrics["teacher/skipped"], metrics["teacher/skipped_in_a_row"]) == (1, 0)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("num_tokens", 8),
    ("mask_token_id", 0),
    ("mask_schedule", "linear"),
    ("mask_kind", "bernoulli"),
    ("loss_positions", "all"),
    ("label_smoothing", 0.2),
    ("condition_drop_rate", 0.9),
    ("dropout", True),
  ],
)
def test_an_option_of_pretraining_changes_the_loss(name, value):
  losses = []
  for options in ({}, {name: value}):
    objective = pretraining(**options)
    tokens = jnp.arange(8 * objective.num_tokens).reshape(8, -1) % 5
    network, draws = toy_state(0), objective.draw(KEY, 8)
    data = {"class_id": jnp.arange(8) % 3}
    losses.append(objective.loss(network.params, network, tokens, data, draws)[0])
  assert losses[0] != losses[1]


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("mask_schedule", "arcos"),
    ("mask_kind", "exakt"),
    ("loss_positions", "some"),
    ("label_smoothing", 1.0),
    ("condition_drop_rate", -0.1),
  ],
)
def test_impossible_pretraining_is_refused_in_one_line(name, value):
  with pytest.raises(UserError) as error:
    pretraining(**{name: value})
  assert f"teacher.pretrain.{name}={value!r}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("name", "sgd"),
    ("schedule", "linear"),
    ("weight_decay", 0.1),
    ("learning_rate", 0.0),
    ("b1", 1.5),
    ("final_fraction", -0.1),
    ("clip_norm", -1.0),
  ],
)
def test_impossible_optimisers_are_refused_in_one_line(name, value):
  spec = OptimizerSpec("adam", 0.1, 0.9, 0.9, 1e-8, 0.0, 0.0, "constant", 0, 1.0)
  spec.check(10, "optim.generator")
  with pytest.raises(UserError, match=f"optim.generator.{name}={value!r}") as error:
    dataclasses.replace(spec, **{name: value}).check(10, "optim.generator")
  assert "\n" not in str(error.value)
