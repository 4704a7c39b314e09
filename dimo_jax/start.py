"""What a distillation starts from: states on the mesh, its jitted step, its batches and key."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dimo_jax.build import Experiment
from dimo_jax.data.pipeline import condition_batches, image_batches
from dimo_jax.sharding import (
  Rules,
  jit_step,
  local_rows,
  put,
  replicated,
  shard_batch,
  state_sharding,
)
from dimo_jax.state import DistillState, FirstStage, NetworkState
from dimo_jax.step import distill_step
from dimo_jax.types import Params

_DATA_STREAM = 7919  # keeps the order of the data apart from a stage's other use of the seed


def place(state: Any, mesh: Mesh, rules: Rules, host: Sequence[str] = ()) -> Any:
  """Puts a state on the mesh by the config's rules, and parts of it in the `host`'s memory."""
  return put(state, state_sharding(state, mesh, rules, host))


def on_host(experiment: Experiment) -> tuple[str, ...]:
  """The parts of a training's state that lie in the host's memory, as `place` takes them."""
  return ("^ema/",) if experiment.config.train.ema_memory == "host" else ()


def initial_state(
  experiment: Experiment, teacher_params: Params, weights: FirstStage | None = None
) -> Callable[[], DistillState]:
  """Makes generator, fake score and average, not yet on the mesh: copies of the teacher, or the
  `weights` of an earlier stage.

  A function, so that a resumed run needs their shapes only (`jax.eval_shape`).
  """
  first = weights or FirstStage(teacher_params, teacher_params)
  frozen = tuple(experiment.config.optim.frozen)
  specs = experiment.generator_optimizer, experiment.fake_score_optimizer
  optimizers = [spec.build(experiment.num_updates) for spec in specs]

  key = jax.random.fold_in(jax.random.key(experiment.config.seed), 4)

  def make() -> DistillState:
    score = experiment.teacher.frozen_state(first.score, {})
    fake_params = experiment.objective.fake_score_params(key, score)
    generator, fake_score = (
      experiment.teacher.trained_state(params, tx, frozen)
      for params, tx in zip((first.generator, fake_params), optimizers, strict=True)
    )
    return DistillState.create(generator, fake_score, experiment.objective.init_extra())

  return make


def teacher_state(
  experiment: Experiment, teacher_params: Params, tokenizer_params: Params
) -> NetworkState:
  """The frozen teacher in its storage precision, on the mesh."""
  dtype = jnp.dtype(experiment.config.precision.teacher_dtype)
  network = jax.tree.map(lambda x: np.asarray(x, dtype), teacher_params)
  state = experiment.teacher.frozen_state(network, tokenizer_params)
  return place(state, experiment.mesh, experiment.config.mesh.rules)


def jit_distill_step(
  experiment: Experiment,
  state: DistillState,
  teacher: NetworkState,
  num_rounds: int | None = None,
) -> jax.stages.Wrapped:
  """The jitted iteration `(state, teacher, batch, base_key) -> (state, metrics)`.

  `num_rounds` stops it after so many fake-score rounds.
  """
  train = experiment.config.train
  # XLA's CPU compiler brings convolutions into the form of its fast kernels outside of loops only:
  # their gradients took 20 times as long inside one. Kernels of convolutions have four axes.
  convolves = any(len(x.shape) == 4 for x in jax.tree.leaves(state.fake_score.params))
  unroll = convolves and experiment.mesh.devices.flat[0].platform == "cpu"
  return jit_step(
    functools.partial(
      distill_step,
      experiment.objective,
      train.ema_decay,
      train.ema_every_steps,
      num_rounds=num_rounds,
      unroll=unroll,
    ),
    experiment.mesh,
    state,
    teacher,
    experiment.config.mesh.rules,
    on_host(experiment),
  )


def distill_batches(experiment: Experiment, start: int, num_steps: int) -> Iterator[Any]:
  """Batches of iterations start .. start + num_steps - 1, on the mesh; a process reads only its
  own rows of them.

  Without real images, conditions for the generator and for each round; with them a batch of images
  for each round, the generator's being the first round's.
  """
  config, rounds = experiment.config, experiment.objective.fake_rounds
  micro = (config.train.accumulation, config.train.batch_size)
  local = local_rows(config.train.batch_size, experiment.mesh)
  local_micro = (config.train.accumulation, len(local))

  def rows(num_batches: int) -> np.ndarray:  # of so many batches one after the other
    return (np.arange(num_batches)[:, None] * config.train.batch_size + local).ravel()

  seed = config.seed + _DATA_STREAM
  if experiment.objective.uses_images:
    stream = image_batches(
      experiment.source("train"),
      batch_size=rounds * math.prod(micro),
      rows=rows(rounds * config.train.accumulation),
      seed=seed,
      start_step=start,
      num_steps=num_steps,
      num_threads=config.data.num_read_threads,
      flip=config.data.flip,
    )
  else:
    stream = condition_batches(
      config.data.num_classes,
      shape=(1 + rounds, *micro),
      seed=seed,
      start_step=start,
      num_steps=num_steps,
    )
  pairs: Iterator[dict[str, Any] | None] = itertools.repeat(None)
  if experiment.pairs is not None:
    pairs = image_batches(
      experiment.pairs,
      batch_size=math.prod(micro),
      rows=rows(config.train.accumulation),
      seed=seed + 1,
      start_step=start,
      num_steps=num_steps,
      num_threads=config.data.num_read_threads,
    )
  for batch, pair in zip(stream, pairs, strict=False):
    if experiment.objective.uses_images:
      fake_score = {k: v.reshape(rounds, *local_micro, *v.shape[1:]) for k, v in batch.items()}
      generator = {k: v[0] for k, v in fake_score.items()}
    else:
      generator = {k: v[0][..., local] for k, v in batch.items()}
      fake_score = {k: v[1:][..., local] for k, v in batch.items()}
    if pair is not None:
      generator["pairs"] = {k: v.reshape(*local_micro, *v.shape[1:]) for k, v in pair.items()}
    yield {
      "generator": shard_batch(generator, experiment.mesh, batch_axis=1),
      "fake_score": shard_batch(fake_score, experiment.mesh, batch_axis=2),
    }


def base_key(experiment: Experiment) -> jax.Array:
  """The key of every draw of the distillation."""
  key = jax.random.fold_in(jax.random.key(experiment.config.seed), 3)
  return put(key, replicated(experiment.mesh))
