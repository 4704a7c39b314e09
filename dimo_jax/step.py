"""The two training steps, pure and un-jitted; the update schedule is stated here and only here.

An update of which anything came out NaN or infinite is skipped on the device: clocks advance,
parameters, moments, average and `extra` stay as they were, and the network's state counts it. A
gradient is judged by its norm.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dimo_jax.objectives import StepObjective
from dimo_jax.objectives.denoising import GaussianDenoising, MaskedDenoising
from dimo_jax.optim import ema_rate
from dimo_jax.state import DistillState, Nets, NetworkState, PretrainState, all_finite
from dimo_jax.types import Batch, Key, Metrics, Params


def pretrain_step(
  objective: MaskedDenoising | GaussianDenoising,
  tokenizer: Any,
  ema_decay: float,
  state: PretrainState,
  tokenizer_params: Params,
  batch: Batch,
  base_key: Key,
) -> tuple[PretrainState, Metrics]:
  """One update of a teacher.

  Args:
    objective: the denoising loss.
    tokenizer: encodes images to what the teacher models (tokens, latents, the images themselves)
      with `tokenizer_params`.
    ema_decay: limit of the moving average's rate.
    batch: {"image": [b, h, w, c] in [-1, 1], "class_id": [b]}, or with what the images are encoded
      to as "tokens" in their place.
    base_key: the run's key; this update's is `fold_in(base_key, updates done)`.
  """
  network = state.network
  key = jax.random.fold_in(base_key, network.step)
  draws = objective.draw(key, batch["class_id"].shape[0])
  encoded = batch.get("tokens")
  if encoded is None:
    encoded = tokenizer.encode(tokenizer_params, batch["image"])
  (_, metrics), grads = jax.value_and_grad(objective.loss, has_aux=True)(
    network.params, network, encoded, batch, draws
  )
  metrics["teacher/grad_norm"] = optax.tree.norm(grads)
  sound = all_finite(metrics)
  ema_step = network.step
  network = network.apply_gradients(grads=grads, clock=network.step, sound=sound)
  averaged = _update_ema(state.ema, network.params, ema_decay, ema_step)
  ema = optax.tree.where(sound, averaged, state.ema)
  return PretrainState(network, ema), metrics | _skipped("teacher", network)


def distill_step(
  objective: StepObjective,
  ema_decay: float,
  ema_every_steps: int,
  state: DistillState,
  teacher: NetworkState,
  batch: Batch,
  base_key: Key,
  *,
  num_rounds: int | None = None,
  unroll: bool = False,
) -> tuple[DistillState, Metrics]:
  """One iteration: a generator update, then `objective.fake_rounds` fake-score updates.

  Args:
    objective: supplies draws and the two losses.
    ema_decay: limit of the moving average's rate; 0 makes the average follow the generator.
    ema_every_steps: generator updates between two updates of the average.
    state: donated by the caller.
    teacher: frozen; neither changed nor returned.
    batch: {"generator": [accumulation, b, ...], "fake_score": [rounds, accumulation, b, ...]}.
    base_key: the run's key; an update's is `fold_in(base_key, clock)`.
    num_rounds: stop after so many fake-score rounds (a replay may end inside an iteration).
    unroll: write rounds and micro-batches out instead of looping: longer to compile.
  """
  num_rounds = objective.fake_rounds if num_rounds is None else num_rounds
  before = state.generator.params

  # 1. The generator.
  nets = Nets(state.generator, state.fake_score, teacher)
  draws = objective.draw_generator(
    jax.random.fold_in(base_key, state.clock), batch["generator"], state.clock
  )

  def generator_loss(params, micro, extra):
    batch, draws = micro
    return objective.generator_loss(params, nets, batch, draws, extra)

  grads, extra, (samples, metrics) = _accumulate(
    generator_loss, before, (batch["generator"], draws), state.extra, unroll
  )
  metrics = metrics | {"generator/grad_norm": optax.tree.norm(grads)}
  sound = all_finite((metrics, extra))
  ema_step = state.generator.step
  generator = state.generator.apply_gradients(grads=grads, clock=state.clock, sound=sound)
  averaged = _update_ema(state.ema, generator.params, ema_decay, ema_step)
  ema = optax.tree.where(sound & (ema_step % ema_every_steps == 0), averaged, state.ema)
  extra = optax.tree.where(sound, extra, state.extra)
  state = state.replace(generator=generator, ema=ema, extra=extra)

  # 2. The fake score: the first round may reuse the samples of the update above.
  def fake_round(state: DistillState, round_batch: Batch, reused: Any = None):
    nets = Nets(state.generator, state.fake_score, teacher)
    draws = objective.draw_fake(jax.random.fold_in(base_key, state.clock), round_batch, state.clock)

    def fake_score_loss(params, micro, extra):
      batch, draws, samples = micro
      if samples is None:
        samples = objective.generate(state.generator.params, nets, batch, draws)
      loss, (metrics, extra) = objective.fake_score_loss(params, nets, samples, batch, draws, extra)
      return loss, (None, metrics, extra)

    grads, extra, (_, metrics) = _accumulate(
      fake_score_loss, state.fake_score.params, (round_batch, draws, reused), state.extra, unroll
    )
    metrics = metrics | {"fake_score/grad_norm": optax.tree.norm(grads)}
    sound = all_finite((metrics, extra))
    fake_score = state.fake_score.apply_gradients(grads=grads, clock=state.clock, sound=sound)
    extra = optax.tree.where(sound, extra, state.extra)
    state = state.replace(fake_score=fake_score, clock=state.clock + 1, extra=extra)
    return state, metrics

  first = jax.tree.map(lambda x: x[0], batch["fake_score"])
  rest = jax.tree.map(lambda x: x[1:num_rounds], batch["fake_score"])
  state, fake_metrics = fake_round(state, first, samples if objective.reuse_samples else None)
  if num_rounds > 1:
    state, more = _loop(fake_round, state, rest, unroll)
    fake_metrics = jax.tree.map(
      lambda one, many: (one + jnp.sum(many)) / num_rounds, fake_metrics, more
    )
  metrics |= _skipped("generator", state.generator) | _skipped("fake_score", state.fake_score)
  return state, metrics | fake_metrics


def _loop(body: Callable[..., Any], carry: Any, inputs: Any, unroll: bool) -> Any:
  """`jax.lax.scan`, or the same without a loop (`scan` keeps one where there is one turn)."""
  if not unroll:
    return jax.lax.scan(body, carry, inputs)
  outputs = []
  for i in range(len(jax.tree.leaves(inputs)[0])):
    carry, output = body(carry, jax.tree.map(lambda x, i=i: x[i], inputs))
    outputs.append(output)
  return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


def _accumulate(loss_fn, params: Params, micro_batches: Any, extra: Any, unroll: bool):
  """Mean gradient and metrics over the leading axis: (gradient, extra, (samples, metrics)).

  `loss_fn(params, micro_batch, extra) -> loss, (samples, metrics, extra)`; the samples keep the
  leading axis.
  """
  grad_fn = jax.grad(loss_fn, has_aux=True)
  num = len(jax.tree.leaves(micro_batches)[0])

  def one(carry, micro):
    total, extra = carry
    grads, (samples, metrics, extra) = grad_fn(params, micro, extra)
    total = jax.tree.map(jnp.add, total, grads)
    return (total, extra), (samples, metrics)

  if num == 1:
    grads, (samples, metrics, extra) = grad_fn(
      params, jax.tree.map(lambda x: x[0], micro_batches), extra
    )
    return grads, extra, (jax.tree.map(lambda x: x[None], samples), metrics)
  zero = jax.tree.map(jnp.zeros_like, params)
  carry, (samples, metrics) = _loop(one, (zero, extra), micro_batches, unroll)
  total, extra = carry
  mean = jax.tree.map(lambda x: x / num, total)
  return mean, extra, (samples, jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics))


def _skipped(name: str, network: NetworkState) -> Metrics:
  counts = {"skipped": network.skipped, "skipped_in_a_row": network.skipped_in_a_row}
  return {f"{name}/{count}": jnp.asarray(value) for count, value in counts.items()}


def _update_ema(ema: Params, params: Params, decay: float, num_updates: jax.Array | int) -> Params:
  rate = ema_rate(decay, num_updates)
  return jax.tree.map(lambda old, new: rate * old + (1 - rate) * new, ema, params)
