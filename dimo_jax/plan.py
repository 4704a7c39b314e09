"""Whether a distillation fits, from shapes alone: `--mode=plan --devices=8 --device_memory_gib=16`.

Nothing is allocated and no file but `data.pairs` is read: networks are traced, not run. Two kinds
of figures:

* The state's bytes (parameters, moments, average, teacher) are exact for the sharding rules.
* Temporaries are an estimate: what JAX keeps of one loss's forward pass for its backward pass on
  one device's share of a micro-batch, for the costlier of the two losses, and that network's
  gradients. A compiler fuses some of it away, and needs scratch space of its own. Not counted are
  the parameters gathered with `mesh.fsdp` above 1, and what a rematerialised block computes again.
"""

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_collections
from jax.extend import core

from dimo_jax.build import Experiment, build
from dimo_jax.data.sources import SOURCES
from dimo_jax.sharding import abstract_mesh, bytes_per_device, check_batch, make_mesh
from dimo_jax.start import initial_state, on_host
from dimo_jax.state import DistillState, Nets, NetworkState
from dimo_jax.teachers import build_tokenizer
from dimo_jax.teachers.vqgan import RANDOM
from dimo_jax.types import Params, UserError
from dimo_jax.writers import say

_GIB = 2**30
# Samples in a trace: a prime that no other size has as a factor, so that it marks what grows with
# the batch.
_NUM_TRACED = 10_007
_NETWORKS = ("generator", "fake_score")


@dataclasses.dataclass(frozen=True)
class Layout:
  """What a plan may change of a config to make it fit.

  Attributes:
    batch_size: of one micro-batch over all devices.
    accumulation: micro-batches of one update.
    remat: of the network's blocks.
  """

  fsdp: int
  batch_size: int
  accumulation: int
  remat: str = "none"


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on each device.

  Attributes:
    state: exact, by part; "teacher" includes the tokenizer.
    gradients: of the costlier loss's network, and their running sum where micro-batches accumulate.
    activations: estimate, of the costlier loss.
    batch: one iteration's data.
  """

  state: dict[str, int]
  gradients: int
  activations: int
  batch: int

  @property
  def total(self) -> int:
    """All of it."""
    return sum(self.state.values()) + self.gradients + self.activations + self.batch


class Planner:
  """The shapes of one config's distillation, and what they cost under a layout."""

  def __init__(self, config: ml_collections.ConfigDict, num_devices: int):
    """Builds the networks; they are traced when first asked for.

    Raises:
      UserError: a config that cannot work, or no devices.
    """
    if num_devices < 1:
      raise UserError(f"--devices={num_devices} must be 1 or more")
    self.config, self.num_devices = config, num_devices
    train = config.train
    check_batch(train.batch_size, abstract_mesh(num_devices, config.mesh.fsdp), "train.batch_size")
    self._mesh = make_mesh(1, jax.devices()[:1])  # not planned for: networks need one to be built
    self.experiment = build(without_files(config), self._mesh)
    self._section = "model" if self.experiment.teacher.kind == "masked" else "denoiser"
    remat = config[self._section].remat
    self.layout = Layout(config.mesh.fsdp, train.batch_size, train.accumulation, remat)
    self._activations: dict[str, dict[str, tuple[int, int]]] = {}
    self._state_bytes: dict[int, tuple[dict[str, int], dict[str, int]]] = {}

  @functools.cached_property
  def _traced(self) -> tuple[NetworkState, DistillState]:
    return shapes(self.experiment)

  @property
  def teacher(self) -> NetworkState:
    """Shapes of the teacher."""
    return self._traced[0]

  @property
  def state(self) -> DistillState:
    """Shapes of what is trained."""
    return self._traced[1]

  def activations(self, remat: str) -> dict[str, tuple[int, int]]:
    """By loss: (bytes that do not depend on the batch, bytes for each sample)."""
    if remat not in self._activations:
      experiment, teacher, state = self.experiment, self.teacher, self.state
      if remat != self.layout.remat:
        config = without_files(self.config)
        config[self._section].remat = remat
        experiment = build(config, self._mesh)
        teacher, state = shapes(experiment)
      self._activations[remat] = {
        name: residual_bytes(experiment, state, teacher, name) for name in _NETWORKS
      }
    return self._activations[remat]

  def state_bytes(self, fsdp: int) -> tuple[dict[str, int], dict[str, int]]:
    """(what stays on each device, by part; the gradients of each network)."""
    if fsdp not in self._state_bytes:
      mesh = abstract_mesh(self.num_devices, fsdp)
      count = functools.partial(
        bytes_per_device, mesh=mesh, rules=self.config.mesh.rules, host=on_host(self.experiment)
      )
      parts = state_parts(self.state, self.teacher)
      gradients = {name: count(getattr(self.state, name).params) for name in _NETWORKS}
      self._state_bytes[fsdp] = {name: count(tree) for name, tree in parts.items()}, gradients
    return self._state_bytes[fsdp]

  def memory(self, layout: Layout) -> Memory:
    """What each device holds."""
    state, gradients_of = self.state_bytes(layout.fsdp)
    samples = layout.batch_size / self.num_devices  # of a micro-batch, on one device
    sums = 2 if layout.accumulation > 1 else 1
    costs = []
    for name, (fixed, per_sample) in self.activations(layout.remat).items():
      costs.append((sums * gradients_of[name], fixed + math.ceil(samples * per_sample)))
    gradients, activations = max(costs, key=sum)
    rounds = self.experiment.objective.fake_rounds
    generator, fake = (_tree_bytes(batch_shapes(self.experiment, name, 1)) for name in _NETWORKS)
    batch = math.ceil(samples * layout.accumulation * (generator + rounds * fake))
    return Memory(state, gradients, activations, batch)

  def largest_batch(self, layout: Layout, limit: int) -> int:
    """The largest micro-batch, a multiple of the devices, that needs at most `limit` bytes each."""
    smallest = min(per_sample for _, per_sample in self.activations(layout.remat).values())
    low, high = 0, limit // max(1, smallest) + 1  # samples on one device: low fits, high does not
    while high - low > 1:
      middle = (low + high) // 2
      batch_size = middle * self.num_devices
      fits = self.memory(dataclasses.replace(layout, batch_size=batch_size)).total <= limit
      low, high = (middle, high) if fits else (low, middle)
    return low * self.num_devices

  def remedies(self, limit: int) -> dict[str, Layout]:
    """Layouts that fit into `limit` bytes: by sharding alone, by smaller micro-batches alone, by
    rematerialisation alone, and where none helps by several at once.
    """
    shards = [
      dataclasses.replace(self.layout, fsdp=fsdp)
      for fsdp in range(self.layout.fsdp + 1, self.num_devices + 1)
      if self.num_devices % fsdp == 0 and self._can_shard(fsdp)
    ]
    kinds = {
      "shard": shards,
      "accumulate": list(self._accumulated(self.layout)),
      "rematerialise": [_rematerialised(self.layout)] if self._can_rematerialise() else [],
    }
    both = [layout for shard in shards for layout in self._accumulated(shard)]
    everything = [_rematerialised(layout) for layout in kinds["accumulate"] + shards + both]
    everything = everything if self._can_rematerialise() else []
    several = {"shard and accumulate": both, "rematerialise and more": everything}
    return self._fitting(kinds, limit) or self._fitting(several, limit)

  def _can_rematerialise(self) -> bool:
    """Whether there is something that the network could compute again."""
    try:
      return self.activations("full") != self.activations(self.layout.remat)
    except UserError:  # some networks keep everything
      return False

  def _fitting(self, kinds: dict[str, list[Layout]], limit: int) -> dict[str, Layout]:
    """The first layout of each kind that fits."""
    first = {
      kind: next((layout for layout in layouts if self.memory(layout).total <= limit), None)
      for kind, layouts in kinds.items()
    }
    return {kind: layout for kind, layout in first.items() if layout is not None}

  def _can_shard(self, fsdp: int) -> bool:
    """Whether the config's own rules allow it."""
    try:
      self.state_bytes(fsdp)
    except UserError:
      return False
    return True

  def flags(self, layout: Layout) -> str:
    """The flags that make a config of it."""
    fields = {
      "mesh.fsdp": layout.fsdp,
      "train.batch_size": layout.batch_size,
      "train.accumulation": layout.accumulation,
      f"{self._section}.remat": layout.remat,
    }
    if layout.remat == self.layout.remat:
      fields.popitem()
    return " ".join(f"--config.{name}={value}" for name, value in fields.items())

  def _accumulated(self, layout: Layout) -> Iterator[Layout]:
    """The same update from more and smaller micro-batches, the largest ones first."""
    for pieces in range(2, layout.batch_size // self.num_devices + 1):
      if layout.batch_size % (pieces * self.num_devices) == 0:
        yield dataclasses.replace(
          layout,
          batch_size=layout.batch_size // pieces,
          accumulation=layout.accumulation * pieces,
        )


def _rematerialised(layout: Layout) -> Layout:
  return dataclasses.replace(layout, remat="full")


def plan(
  config: ml_collections.ConfigDict, num_devices: int, device_memory_gib: float | None
) -> dict[str, Any]:
  """Prints what a distillation needs on each of so many devices, and what would make it fit.

  Returns:
    The figures, which the last printed line holds as JSON.

  Raises:
    UserError: a config that cannot work, or no devices or memory.
  """
  if device_memory_gib is not None and not 0 < device_memory_gib < math.inf:
    raise UserError(f"--device_memory_gib={device_memory_gib} must be positive")
  planner = Planner(config, num_devices)
  say("of the distillation, not of a teacher's training; a minute for the largest networks:")
  layout, memory = planner.layout, planner.memory(planner.layout)
  flops = planner.experiment.model_flops
  rows = memory.state | {
    "gradients (estimate)": memory.gradients,
    "activations (estimate)": memory.activations,
    "batch": memory.batch,
    "together": memory.total,
  }
  say(
    f"on each device of {num_devices}, mesh.fsdp={layout.fsdp}, train.batch_size="
    f"{layout.batch_size} of all devices together, train.accumulation={layout.accumulation}:"
  )
  for line in planner.experiment.untested:
    say(line)
  for name, num_bytes in rows.items():
    say(f"{name:24s} {num_bytes / _GIB:10.3f} GiB")
  for name, count in flops.items():
    say(f"{name:24s} {count / 1e12:10.3f} TFLOP an iteration, on all devices together")
  result = {
    "devices": num_devices,
    "num_parameters": {
      name: sum(x.size for x in jax.tree.leaves(getattr(planner.state, name).all_params))
      for name in _NETWORKS
    },
    "layout": dataclasses.asdict(layout),
    "state_bytes": memory.state,
    "gradient_bytes_estimate": memory.gradients,
    "activation_bytes_estimate": memory.activations,
    "batch_bytes": memory.batch,
    "total_bytes": memory.total,
    "model_flops": flops,
  }
  if device_memory_gib is None:
    say("--device_memory_gib=16 or the like says whether that fits, and what would make it fit")
  else:
    result |= _advise(planner, memory, int(device_memory_gib * _GIB))
  say(json.dumps(result))
  return result


def _advise(planner: Planner, memory: Memory, limit: int) -> dict[str, Any]:
  """Says whether it fits, and what to change where it does not; returns it as figures."""
  largest = planner.largest_batch(planner.layout, limit)
  remedies = {} if memory.total <= limit else planner.remedies(limit)
  say(f"largest train.batch_size that fits into {limit / _GIB:g} GiB: {largest or 'none'}")
  if memory.total <= limit:
    say(f"it fits, with {(limit - memory.total) / _GIB:.3f} GiB to spare")
  elif not remedies:
    say(
      "it does not fit, however sharded, accumulated and rematerialised: take more devices, or ones"
      " with more memory"
    )
  for kind, layout in remedies.items():
    say(
      f"it does not fit; {kind}: {planner.flags(layout)} needs"
      f" {planner.memory(layout).total / _GIB:.3f} GiB"
    )
  return {
    "fits": memory.total <= limit,
    "largest_batch_size": largest,
    "remedies": {kind: dataclasses.asdict(layout) for kind, layout in remedies.items()},
  }


def without_files(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A copy that needs no teacher, no data set and no earlier run, with the same shapes.

  Raises:
    UserError: the side of the images is known from the data set alone.
  """
  config = copy.deepcopy(config)
  config.teacher.path, config.train.start_from = "random", ""
  config.evaluation.protocol = "none"
  if config.tokenizer.name == "vqgan":
    config.tokenizer.path = config.tokenizer.path or RANDOM
  source = SOURCES.get(config.data.name)
  sized = source is not None and "image_size" in source.fields
  if sized and not config.data.image_size and config.tokenizer.name == "vqgan":
    shape = build_tokenizer(config, None).image_shape
    assert shape is not None  # a VQGAN's is known from its sizes
    config.data.image_size = shape[0]
  known = sized and config.data.image_size
  if source is not None and "path" in source.fields and (known or not config.data.path):
    if not config.data.image_size:
      raise UserError(
        f"data.image_size=0 must be the side of the images, or data.path where"
        f" data.name={config.data.name!r} lies"
      )
    config.data.update(name="noise", path="", tfds_name="")
  return config


def shapes(experiment: Experiment) -> tuple[NetworkState, DistillState]:
  """(teacher, state) of a distillation as shapes and types."""

  def make(tokenizer: Params) -> tuple[NetworkState, DistillState]:
    params = experiment.teacher.init(jax.random.key(0))
    dtype = jnp.dtype(experiment.config.precision.teacher_dtype)
    stored = jax.tree.map(lambda x: x.astype(dtype), params)
    teacher = experiment.teacher.frozen_state(stored, tokenizer)
    return teacher, initial_state(experiment, params)()

  return jax.eval_shape(make, experiment.tokenizer.shapes())


def state_parts(state: DistillState, teacher: NetworkState) -> dict[str, Any]:
  """What stays on a device from one iteration to the next, as trees by name: all of it, once."""
  parts: dict[str, Any] = {}
  for name in _NETWORKS:
    network = getattr(state, name)
    parts[f"{name} parameters"] = network.params, network.frozen
    parts[f"{name} optimiser"] = network.opt_state
  parts["average"] = {"ema": state.ema}
  networks = [getattr(state, name) for name in _NETWORKS]
  counts = [(net.step, net.skipped, net.skipped_in_a_row) for net in networks]
  parts["counts"] = counts, state.clock, state.extra
  parts["teacher"] = teacher
  return parts


def batch_shapes(experiment: Experiment, network: str, num: int) -> dict[str, Any]:
  """A micro-batch of `num` samples for one network's loss."""
  batch: dict[str, Any] = {"class_id": jax.ShapeDtypeStruct((num,), jnp.int32)}
  shape = num, *(experiment.tokenizer.image_shape or ())
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  if experiment.objective.uses_images:
    batch["image"] = image
  if network == "generator" and experiment.objective.uses_pairs:
    batch["pairs"] = {"noise": image, "image": image, "class_id": batch["class_id"]}
  return batch


def residual_bytes(
  experiment: Experiment, state: DistillState, teacher: NetworkState, network: str
) -> tuple[int, int]:
  """What the backward pass of a network's loss needs of the forward pass besides its arguments, as
  JAX's linearisation keeps it: (bytes whatever the batch, bytes for each sample).
  """
  objective = experiment.objective
  first = functools.partial(jax.tree.map, lambda x: x[0])

  def generator_loss(params, nets, batch, key, clock, extra):
    draws = first(objective.draw_generator(key, _micro(batch), clock))
    return objective.generator_loss(params, nets, batch, draws, extra)

  def fake_score_loss(params, nets, batch, key, clock, extra):
    draws = first(objective.draw_fake(key, _micro(batch), clock))
    samples = objective.generate(nets.generator.params, nets, batch, draws)
    return objective.fake_score_loss(params, nets, samples, batch, draws, extra)

  loss = {"generator": generator_loss, "fake_score": fake_score_loss}[network]

  def residuals(params, *rest):
    return jax.vjp(lambda params: loss(params, *rest), params, has_aux=True)[1]

  jaxpr = jax.make_jaxpr(residuals)(
    getattr(state, network).params,
    Nets(state.generator, state.fake_score, teacher),
    batch_shapes(experiment, network, _NUM_TRACED),
    jax.eval_shape(lambda: jax.random.key(0)),
    state.clock,
    state.extra,
  ).jaxpr
  arguments = set(jaxpr.invars)
  kept = {v for v in jaxpr.outvars if isinstance(v, core.Var) and v not in arguments}
  arrays = [cast(jax.core.ShapedArray, v.aval) for v in kept]
  samples = [x for x in arrays if x.size % _NUM_TRACED == 0]
  fixed = [x for x in arrays if x.size % _NUM_TRACED]
  return _tree_bytes(fixed), _tree_bytes(samples) // _NUM_TRACED


def _micro(batch: Any) -> Any:
  return jax.tree.map(lambda x: x[None], batch)


def _tree_bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
