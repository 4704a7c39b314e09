"""Training: a teacher where none is given, then the distillation. Build, restore, loop."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview
from flax import traverse_util

from dimo_jax import prepare, records
from dimo_jax.build import Experiment
from dimo_jax.checkpoint import (
  BEST_METRIC,
  Checkpoints,
  changed_fields,
  check_record,
  params_hash,
  refuse_changes,
)
from dimo_jax.data.pipeline import image_batches
from dimo_jax.distributed import exists, on_first
from dimo_jax.evaluation.protocols import Reference
from dimo_jax.health import Health, RunStopped
from dimo_jax.hooks import draw_pictures, evaluate_sampler, sampling_network
from dimo_jax.preemption import STOP
from dimo_jax.profile import Profile
from dimo_jax.run_judge import RunJudge
from dimo_jax.sharding import jit_step, local_rows, put, replicated, shard_batch, to_memory
from dimo_jax.start import (
  base_key,
  distill_batches,
  initial_state,
  jit_distill_step,
  on_host,
  place,
  teacher_state,
)
from dimo_jax.state import DistillState, NetworkState, PretrainState, all_finite
from dimo_jax.step import pretrain_step
from dimo_jax.trackers import Stage, open_trackers
from dimo_jax.types import Metrics, Params, UserError
from dimo_jax.writers import Writer, say

Hook = Callable[[Any, Writer], dict[str, float]]  # (state, writer) -> metrics


class Loop:
  """One stage's loop: dispatch an iteration, read the one before, save now and then.

  A step's row of metrics is on disk before the checkpoint of that step is begun, so a run that is
  killed anywhere goes on to the same rows and the same state as one that is not.
  """

  def __init__(self, experiment: Experiment, directory: Path, name: str, num_steps: int):
    """Opens the stage's checkpoints."""
    config = experiment.config
    self._log, self._mesh, self._rules = config.log, experiment.mesh, config.mesh.rules
    self._host = on_host(experiment)
    self._settings = traverse_util.flatten_dict(config.to_dict(), sep=".")
    self._health = Health(**config.health)
    self._directory, self._name, self._num_steps = directory, name, num_steps
    self._checkpoints = Checkpoints(
      directory / "checkpoints", config.log.keep_checkpoints, config.log.keep_every_steps
    )
    if config.log.profile_steps and config.log.profile_steps[0] > num_steps:
      say(
        f"{name}: log.profile_steps={config.log.profile_steps} begins after its {num_steps} steps"
      )
    self._profile = Profile(
      directory / "profile" / f"process_{jax.process_index()}", config.log.profile_steps
    )

  def run(
    self,
    step_fn: Callable[..., tuple[Any, Metrics]],
    make_state: Callable[[], Any],
    constants: Any,
    batches: Callable[[int], Iterator[Any]],
    base_key: jax.Array,
    hooks: Sequence[tuple[int, Hook]] = (),
  ) -> Any:
    """Runs to the end from the newest checkpoint; returns the final state.

    Args:
      step_fn: jitted `(state, constants, batch, base_key) -> (state, metrics)`.
      make_state: the state of step 0; called only where no checkpoint can be restored.
      batches: from the number of steps done to the batches that follow.
      hooks: (period, `(state, writer) -> metrics`); also run after the last step; period 0 is off.
    """
    restored = self._checkpoints.restore(jax.eval_shape(make_state), self._mesh, self._rules)
    if restored and restored[1] > self._num_steps:
      raise UserError(
        f"the {self._name} in {self._directory} has done {restored[1]} steps, more than the"
        f" {self._num_steps} that the config asks for"
      )
    if restored:
      state, start = restored
      state = to_memory(state, self._mesh, self._rules, self._host)
    else:
      state, start = place(make_state(), self._mesh, self._rules, self._host), 0
    del restored  # else what has moved would stay, too
    if start:
      say(f"{self._name}: goes on from step {start}")
      self._health.resume()
    stage = Stage(self._directory, self._name, start, self._settings)
    trackers = open_trackers(stage, self._log.trackers)
    writer = Writer(self._directory, self._name, start, self._num_steps, trackers)
    pending = None  # (step, metrics) of the previous iteration
    stream = batches(start)
    with contextlib.ExitStack() as opened:
      for resource in (self._profile, writer, self._checkpoints):  # closed in the reverse order
        opened.callback(resource.close)
      for step in range(start + 1, self._num_steps + 1):
        batch = next(stream)
        with jax.transfer_guard("disallow"):  # nothing waits for a host's array unseen
          state, metrics = self._profile.call(step, step_fn, state, constants, batch, base_key)
        if pending:
          self._record(writer, *pending)
        due = functools.partial(self._due, step)
        pending = (step, metrics) if due(self._log.every_steps) else None
        extra: dict[str, float] = {}
        for period, hook in hooks:
          if due(period):
            extra |= hook(self._on_device(state), writer)
        saving = due(self._log.checkpoint_every_steps) or BEST_METRIC in extra
        if extra or saving:
          self._record(writer, step, metrics, extra)
          pending = None
        stopping = STOP.is_set()
        if saving or stopping:
          if pending:
            self._record(writer, *pending)
          whole = self._on_device(state)
          self._check_state(step, whole, metrics)
          scores = {BEST_METRIC: extra[BEST_METRIC]} if BEST_METRIC in extra else None
          self._checkpoints.save(step, whole, scores)
          del whole
        if stopping:
          STOP.raise_if_set()
    return state

  def _on_device(self, state: Any) -> Any:
    return to_memory(state, self._mesh, self._rules)

  def _due(self, step: int, period: int) -> bool:
    return period > 0 and (step % period == 0 or step == self._num_steps)

  def _record(
    self, writer: Writer, step: int, metrics: Metrics, extra: dict[str, float] | None = None
  ) -> None:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    values |= extra or {}
    writer.metrics(step, values)
    note = self._health.check(step, values, str(self._directory), of_update=metrics.keys())
    if note:
      say(f"{self._name}: {note}")

  def _check_state(self, step: int, state: Any, metrics: Metrics) -> None:
    """Raises RunStopped where what is about to be saved would not be worth restoring."""
    counts = {k: v for k, v in metrics.items() if k.endswith("/skipped_in_a_row")}
    if any(jax.device_get(counts).values()) and not jax.jit(all_finite)(state):
      raise RunStopped(
        f"step {step}: parameters or moments hold NaN or infinity. The last checkpoint in"
        f" {self._directory} is intact: run the same command again, on another machine if it recurs"
      )


def train_teacher(
  experiment: Experiment, workdir: Path, tokenizer_params: Params
) -> tuple[Params, Params]:
  """(network, tokenizer) parameters of the teacher: given, already trained here, or trained now."""
  config, directory = experiment.config, workdir / "teacher"
  if config.teacher.path == "random":
    return prepare.random_teacher(experiment), tokenizer_params
  if config.teacher.path:
    network, tokenizer = prepare.load_teacher(experiment, config.teacher.path)
    if not (tokenizer and tokenizer_params):
      return network, tokenizer_params
    if jax.tree.map(jnp.shape, tokenizer) != jax.tree.map(jnp.shape, tokenizer_params):
      raise UserError(
        f"teacher.path={config.teacher.path!r} was trained with another tokenizer than"
        f" tokenizer.name={config.tokenizer.name!r} of the config"
      )
    return network, tokenizer
  directory.mkdir(parents=True, exist_ok=True)
  fields = records.teacher_fields(experiment)
  check_record(directory, fields)
  path = directory / prepare.TEACHER_FILE
  if not exists(path):
    state = _pretrain(experiment, directory, tokenizer_params)
    recipe = prepare.recipe(experiment)
    prepare.save_teacher(path, state.ema, tokenizer_params, fields, recipe)
  return prepare.load_teacher(experiment, path)[0], tokenizer_params


def _pretrain(experiment: Experiment, directory: Path, tokenizer_params: Params) -> PretrainState:
  pretrain = experiment.config.teacher.pretrain
  mesh, rules = experiment.mesh, experiment.config.mesh.rules
  tx = experiment.pretrain_optimizer.build(pretrain.num_steps)

  def make_state() -> PretrainState:
    teacher = prepare.random_teacher(experiment)
    return PretrainState.create(experiment.teacher.trained_state(teacher, tx))

  constants = place(tokenizer_params, mesh, rules)
  step_fn = jit_step(
    functools.partial(
      pretrain_step, experiment.pretraining, experiment.tokenizer, pretrain.ema_decay
    ),
    mesh,
    jax.eval_shape(make_state),
    constants,
    rules,
    on_host(experiment),
  )

  source = prepare.training_source(experiment, tokenizer_params)

  def batches(start: int) -> Iterator[Any]:
    stream = image_batches(
      source,
      batch_size=pretrain.batch_size,
      rows=local_rows(pretrain.batch_size, mesh),
      seed=experiment.config.seed,
      start_step=start,
      num_steps=pretrain.num_steps - start,
      num_threads=experiment.config.data.num_read_threads,
      flip=experiment.config.data.flip,
    )
    return (shard_batch(batch, experiment.mesh) for batch in stream)

  key = jax.random.fold_in(jax.random.key(experiment.config.seed), 2)
  loop = Loop(experiment, directory, "teacher", pretrain.num_steps)
  return loop.run(step_fn, make_state, constants, batches, put(key, replicated(mesh)))


def distill(
  experiment: Experiment,
  workdir: Path,
  teacher_params: Params,
  tokenizer_params: Params,
  judge: Reference | RunJudge | None,
) -> DistillState:
  """Runs (or goes on with) the distillation; returns its final state.

  Args:
    judge: of the student on the way: the reference of the data set's own protocol, or a published
      one.
  """
  config, directory = experiment.config, workdir / "distill"
  directory.mkdir(parents=True, exist_ok=True)
  # Of a first stage only the shapes are needed once there is a checkpoint.
  begun = records.has_checkpoints(directory)
  weights = None if begun else prepare.first_stage(experiment, teacher_params)
  check_record(directory, records.distill_fields(experiment, teacher_params))
  if experiment.pairs and experiment.pairs.teacher_sha256 != params_hash(teacher_params):
    raise UserError(
      f"data.pairs={config.data.pairs!r} were made by another teacher than this run's"
    )
  make_state = initial_state(experiment, teacher_params, weights)
  teacher = teacher_state(experiment, teacher_params, tokenizer_params)
  if not begun:
    table = parameter_overview.get_parameter_overview(
      teacher.params, include_stats=False, max_lines=60
    )
    say(table)

  def evaluate(
    judge: Reference | RunJudge, state: DistillState, writer: Writer
  ) -> dict[str, float]:
    del writer
    if isinstance(judge, RunJudge):
      return judge.metrics(state, teacher.autoencoder)
    student = sampling_network(experiment, state.ema_params, teacher.autoencoder)
    sampler = experiment.student_sampler.at(int(state.clock))
    row = evaluate_sampler(experiment, judge, sampler, student, interruptible=False)
    row.pop("images_per_second")  # a wall-clock figure
    return {f"evaluation/{k}": v for k, v in row.items() if v is not None}

  def draw(state: DistillState, writer: Writer) -> dict[str, float]:
    return draw_pictures(experiment, state, teacher, directory / "pictures", writer)

  hooks: list[tuple[int, Hook]] = []
  if judge is not None:
    hooks.append((config.log.evaluate_every_steps, functools.partial(evaluate, judge)))
  if experiment.has_pictures:
    hooks.append((config.log.pictures_every_steps, draw))
  loop = Loop(experiment, directory, "distill", config.train.num_steps)
  return loop.run(
    jit_distill_step(experiment, jax.eval_shape(make_state), teacher),
    make_state,
    teacher,
    lambda start: distill_batches(experiment, start, config.train.num_steps - start),
    base_key(experiment),
    hooks,
  )


def make_teacher(
  experiment: Experiment, workdir: Path
) -> tuple[Params, Params, Reference | RunJudge | None]:
  """The stages before the distillation, where not yet done: tokenizer, classifier, the teacher and
  its evaluation by a published protocol.

  Returns:
    The teacher's network and tokenizer parameters, and the judge of the student if any.
  """
  on_first(lambda: records.forget_if_fruitless(workdir))
  prepare.check_workdir(experiment, workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  run_judge = RunJudge.of(experiment, workdir)
  on_first(lambda: prepare.record_config(experiment, workdir))
  tokenizer_params = prepare.fit_tokenizer(experiment, workdir)
  reference = prepare.fit_classifier(experiment, workdir)
  fitted = tokenizer_params
  teacher_params, tokenizer_params = train_teacher(experiment, workdir, fitted)
  if tokenizer_params is not fitted:
    prepare.keep_tokenizer(workdir, tokenizer_params)
  if run_judge is not None and experiment.config.evaluation.teacher_first:
    run_judge.evaluate_teacher(teacher_state(experiment, teacher_params, tokenizer_params))
  return teacher_params, tokenizer_params, reference or run_judge


def train(experiment: Experiment, workdir: Path) -> None:
  """Every stage of a run that is not yet done."""
  for line in experiment.untested:
    say(line)
  if experiment.mesh.size > 1:
    axes = ", ".join(f"{name} {size}" for name, size in experiment.mesh.shape.items())
    say(f"mesh: {axes}; {experiment.mesh.size} devices, processes: {jax.process_count()}")
  distill(experiment, workdir, *make_teacher(experiment, workdir))


def restore(
  experiment: Experiment, workdir: Path, *, checkpoint: str = "last"
) -> tuple[NetworkState, DistillState]:
  """(teacher, distillation) of a trained workdir, which is only read.

  Args:
    checkpoint: "last", the newest that can be read, "best", the best evaluated, or a step.

  Raises:
    UserError: nothing was trained there, or nothing evaluated.
  """
  records.check_trained(workdir)
  directory = workdir / "distill"
  prepare.check_workdir(experiment, workdir)
  tokenizer_params = prepare.fit_tokenizer(experiment, workdir)
  teacher_params, tokenizer_params = train_teacher(experiment, workdir, tokenizer_params)
  refuse_changes(
    directory, changed_fields(directory, records.distill_fields(experiment, teacher_params))
  )
  state = jax.eval_shape(initial_state(experiment, teacher_params))
  checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
  step = checkpoints.find_step(checkpoint)
  restored = checkpoints.restore(state, experiment.mesh, experiment.config.mesh.rules, step)
  checkpoints.close()
  if restored is None:
    raise UserError(f"--workdir={str(workdir)!r} holds no checkpoint; run --mode=train there first")
  return teacher_state(experiment, teacher_params, tokenizer_params), restored[0]
