"""Times the distillation step, and sampling if wanted:

    python -m dimo_jax.benchmark --config=configs/imagenet256.py --sampling=1,8,64

Weights are random, so nothing needs to be trained. Prints one line per phase and one JSON line with
everything; times are medians, compilation apart.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dimo_jax import cli, prepare, start
from dimo_jax.build import Experiment, build
from dimo_jax.evaluation.generation import sample_images
from dimo_jax.evaluation.report import versions
from dimo_jax.preemption import STOP
from dimo_jax.sharding import check_batch, shard_batch
from dimo_jax.state import DistillState, Nets, NetworkState
from dimo_jax.types import Metrics, Params, UserError
from dimo_jax.writers import say

_REPEATS = flags.DEFINE_integer("repeats", 10, "benchmark: timed runs of each phase.")
_PEAK_SIZES = flags.DEFINE_list(
  "peak_sizes", None, "benchmark: sides of the square products that give the matmul peak."
)
_SAMPLING = flags.DEFINE_list(
  "sampling", None, "benchmark: batch sizes at which generator and teacher are sampled; none."
)
_NUM_WARMUP = 2

Row = dict[str, Any]


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
  """Median wall-clock seconds of a call whose result is waited for, after two warm-ups."""
  times = []
  for i in range(_NUM_WARMUP + repeats):
    began = time.perf_counter()
    jax.block_until_ready(call())
    if i >= _NUM_WARMUP:
      times.append(time.perf_counter() - began)
  return statistics.median(times)


def matmul_peak(dtype: Any, sizes: list[int], repeats: int) -> float:
  """The best FLOP/s of square products on one device: what a step is measured against."""
  best = 0.0
  product = jax.jit(jnp.matmul)
  for n in sizes:
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    best = max(best, 2 * n**3 / median_seconds(functools.partial(product, a, b), repeats))
  return best


class Setting:
  """What an iteration of a config is called with, on the devices: random weights and one batch.

  Attributes:
    params: of the network, which generator, fake score and teacher begin with.
    state: what the last iteration left; the step donates the one before.
  """

  def __init__(self, experiment: Experiment):
    self.experiment = experiment
    self.params = prepare.random_teacher(experiment)
    self.state: DistillState = start.place(
      start.initial_state(experiment, self.params)(),
      experiment.mesh,
      experiment.config.mesh.rules,
      start.on_host(experiment),
    )
    self.teacher: NetworkState = start.teacher_state(experiment, self.params, {})
    self.batch = next(start.distill_batches(experiment, 0, 1))
    self._key = start.base_key(experiment)

  def compile(self, num_rounds: int) -> jax.stages.Compiled:
    """The program of an iteration with `num_rounds` updates of the fake score."""
    step = start.jit_distill_step(self.experiment, self.state, self.teacher, num_rounds)
    return step.lower(self.state, self.teacher, self.batch, self._key).compile()

  def iterate(self, program: jax.stages.Compiled) -> tuple[DistillState, Metrics]:
    """One iteration from where the last one ended; what it returns is not waited for."""
    self.state, metrics = program(self.state, self.teacher, self.batch, self._key)
    return self.state, metrics


def phases(setting: Setting) -> dict[str, Callable[[], Any]]:
  """Parts of the iteration, jitted alone; they overlap, so they do not add up to the whole."""
  objective, state, batch = setting.experiment.objective, setting.state, setting.batch
  nets = Nets(state.generator, state.fake_score, setting.teacher)
  key, clock = jax.random.key(0), state.clock
  micro = jax.tree.map(lambda x: x[0], batch["generator"])

  @jax.jit
  def generate(nets, micro):
    draws = _first(objective.draw_generator(key, batch["generator"], clock))
    return objective.generate(nets.generator.params, nets, micro, draws).output

  @jax.jit
  def generator_gradient(nets, micro):
    draws = _first(objective.draw_generator(key, batch["generator"], clock))
    loss = functools.partial(
      objective.generator_loss, nets=nets, batch=micro, draws=draws, extra=state.extra
    )
    return jax.grad(loss, has_aux=True)(nets.generator.params)[0]

  @jax.jit
  def fake_score_gradient(nets, micro):
    draws = _first(objective.draw_fake(key, batch["generator"], clock))
    samples = objective.generate(nets.generator.params, nets, micro, draws)
    loss = functools.partial(
      objective.fake_score_loss,
      nets=nets,
      samples=samples,
      batch=micro,
      draws=draws,
      extra=state.extra,
    )
    return jax.grad(loss, has_aux=True)(nets.fake_score.params)[0]

  return {
    "generate": functools.partial(generate, nets, micro),
    "generator_gradient": functools.partial(generator_gradient, nets, micro),
    "fake_score_gradient": functools.partial(fake_score_gradient, nets, micro),
  }


def sampling(experiment: Experiment, params: Params, sizes: list[int], repeats: int) -> list[Row]:
  """Latency and throughput of the generator and of its teacher, as they are decoded by default.

  Args:
    params: of the network; both have the same shapes.
    sizes: batch sizes, multiples of the number of devices.

  Returns:
    One row for each of them and each size: model, sampler, steps, batch_size, seconds (the median
    latency of a batch), images_per_second, decoded (whether a decoder is part of it: a tokenizer
    that must be fitted on images is not).
  """
  tokenizer = experiment.tokenizer
  decoded = tokenizer.image_shape is not None and not tokenizer.needs_images
  decoder = tokenizer.fit(None, 0) if decoded else {}
  network = start.teacher_state(experiment, params, decoder)
  rows = []
  for model, sampler in (
    ("generator", experiment.student_sampler),
    ("teacher", experiment.decoding),
  ):
    sample = jax.jit(sampler.sample)
    for size in sizes:
      key = jax.random.key(0)
      condition = {"class_id": shard_batch(np.zeros(size, np.int32), experiment.mesh)}

      def draw(sampler=sampler, sample=sample, condition=condition, key=key):
        if decoded:
          return sample_images(sampler, tokenizer, network, condition, key, experiment.mesh)
        return sample(network, condition, key)

      seconds = median_seconds(draw, repeats)
      steps = sampler.num_steps
      rows.append(
        {
          "model": model,
          "sampler": sampler.name,
          "steps": steps,
          "batch_size": size,
          "seconds": seconds,
          "images_per_second": size / seconds,
          "decoded": decoded,
        }
      )
      what = f"{model}, {steps} step{'s' if steps > 1 else ''}, batch {size}"
      say(f"{what:34s} {1e3 * seconds:10.1f} ms {size / seconds:10.1f} images/s")
  return rows


def _first(draws: Any) -> Any:
  return jax.tree.map(lambda x: x[0], draws)


def run(
  experiment: Experiment, repeats: int, peak_sizes: list[int], sampled: list[int]
) -> dict[str, Any]:
  """Benchmarks one config; returns what the JSON line holds.

  "iteration" is a generator update with all its fake-score updates; where there are several,
  "one_round" has one only and "fake_round" is what each further one adds.
  """
  config = experiment.config
  setting = Setting(experiment)
  rounds = experiment.objective.fake_rounds
  began = time.perf_counter()
  compiled = setting.compile(rounds)
  compile_seconds = time.perf_counter() - began
  memory = compiled.memory_analysis()
  programs = {"iteration": compiled}
  if rounds > 1:
    programs = {"one_round": setting.compile(1)} | programs

  seconds = {}

  def measure(name: str, call: Callable[[], Any]) -> None:
    seconds[name] = median_seconds(call, repeats)
    say(f"{name:22s} {1e3 * seconds[name]:10.1f} ms")

  for name, call in phases(setting).items():
    measure(name, call)
  for name, program in programs.items():
    measure(name, functools.partial(setting.iterate, program))
  if rounds > 1:
    seconds["fake_round"] = (seconds["iteration"] - seconds["one_round"]) / (rounds - 1)
    say(f"{'fake_round':22s} {1e3 * seconds['fake_round']:10.1f} ms")

  flops = experiment.model_flops
  rate = sum(flops.values()) / seconds["iteration"]
  dtype = jnp.dtype(config.precision.compute_dtype)
  peak = matmul_peak(dtype, peak_sizes, repeats) * jax.device_count()
  device = jax.devices()[0]
  statistics_of_device = device.memory_stats() or {}
  result = {
    "versions": versions(),
    "batch_size": config.train.batch_size,
    "accumulation": config.train.accumulation,
    "compute_dtype": config.precision.compute_dtype,
    "num_parameters": sum(x.size for x in jax.tree.leaves(setting.params)),
    "seconds": seconds,
    "compile_seconds": compile_seconds,
    "iterations_per_second": 1 / seconds["iteration"],
    "model_flops": flops,
    "model_flops_per_second": rate,
    "matmul_peak_flops_per_second": peak,
    "share_of_peak": rate / peak,
    "program_bytes": {
      "arguments": memory.argument_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
    }
    if memory  # not every backend knows
    else None,
    "peak_bytes_in_use": statistics_of_device.get("peak_bytes_in_use"),
    "sampling": sampling(experiment, setting.params, sampled, repeats),
  }
  say(
    f"{result['iterations_per_second']:.3f} iterations/s, {rate / 1e9:.1f} GFLOP/s,"
    f" {100 * result['share_of_peak']:.1f}% of the matmul peak {peak / 1e9:.1f} GFLOP/s,"
    f" compiled in {compile_seconds:.1f} s"
  )
  return result


def dispatch() -> None:
  """Runs the benchmark that the flags describe."""
  STOP.at_once()
  if _REPEATS.value < 1:
    raise UserError(f"--repeats={_REPEATS.value} must be 1 or more")
  sizes, sampled = _numbers(_PEAK_SIZES), _numbers(_SAMPLING)
  on_cpu = jax.default_backend() == "cpu"
  sizes = sizes or ([512, 1024, 2048] if on_cpu else [4096, 8192, 16384])
  config = cli.CONFIG.value
  config.teacher.path = "random"
  experiment = build(config)
  for size in sampled:
    check_batch(size, experiment.mesh, "--sampling")
  say(json.dumps(run(experiment, _REPEATS.value, sizes, sampled)))


def _numbers(flag: flags.FlagHolder) -> list[int]:
  """The positive numbers of a list flag."""
  try:
    numbers = [int(text) for text in flag.value or []]
  except ValueError:
    numbers = [0]
  if any(number < 1 for number in numbers):
    given = ",".join(flag.value)
    raise UserError(f"--{flag.name}={given} must be numbers of 1 or more, such as 1,8,64")
  return numbers


if __name__ == "__main__":
  cli.run(dispatch)
