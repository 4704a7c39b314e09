"""One device, eight devices, and parameters split over two: the same numbers from the same code."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dimo_jax import sharding
from dimo_jax.optim import OptimizerSpec
from dimo_jax.state import DistillState, copy_tree
from dimo_jax.step import distill_step
from dimo_jax.teachers.maskgit import MaskedTeacher
from dimo_jax.types import UserError
from tests.helpers import NUM_CLASSES, dimo, transformer

BATCH, ROUNDS = 16, 2
SPEC = OptimizerSpec("adam", 1e-3, 0.9, 0.99, 1e-8, 0.0, 1.0, "constant", 0, 1.0)


@functools.cache
def initial_params():
  return MaskedTeacher(transformer()).init(jax.random.key(0))


def conditions(seed):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, NUM_CLASSES, (1 + ROUNDS, 1, BATCH), np.int32)
  return {"class_id": labels[0]}, {"class_id": labels[1:]}


@functools.cache
def trained(num_devices, fsdp, rules=(), host=()):
  """(state, metrics, batch) after two iterations of the jitted step on a mesh."""
  mesh = sharding.make_mesh(fsdp, jax.devices()[:num_devices])
  maker, params = MaskedTeacher(transformer()), initial_params()
  networks = [maker.trained_state(params, SPEC.build(10)) for _ in range(2)]
  state = DistillState(*networks, copy_tree(params), np.zeros((), np.int32), ())
  teacher = maker.frozen_state(params, {})
  state, teacher = (
    jax.device_put(tree, sharding.state_sharding(tree, mesh, rules, host))
    for tree in (state, teacher)
  )
  objective = dimo(fake_rounds=ROUNDS, sigma=0.1)
  step = sharding.jit_step(
    functools.partial(distill_step, objective, 0.9, 1), mesh, state, teacher, rules, host
  )
  key = jax.device_put(jax.random.key(3), sharding.replicated(mesh))
  for i in range(2):
    generator, fake_score = conditions(i)
    batch = {
      "generator": sharding.shard_batch(generator, mesh, 1),
      "fake_score": sharding.shard_batch(fake_score, mesh, 2),
    }
    state, metrics = step(state, teacher, batch, key)
  return state, jax.device_get(metrics), batch


def assert_close(one, other):
  """Up to the order of sums: an Adam step of 1e-3 may turn round where a gradient is nearly 0."""
  worst = [
    np.abs(np.asarray(a) - np.asarray(b)).max()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  ]
  assert max(worst) < 1e-4, max(worst)


@pytest.fixture(
  scope="module",
  params=[(8, 2), *(pytest.param(mesh, marks=pytest.mark.ci) for mesh in ((8, 1), (2, 2)))],
)
def runs(request):
  """On one device, and on a mesh of (devices, fsdp)."""
  return trained(1, 1), trained(*request.param)


def test_a_mesh_trains_like_one_device(runs):
  (one, one_metrics, _), (many, metrics, _) = runs
  assert_close(one.generator.params, many.generator.params)
  assert_close(one.fake_score.params, many.fake_score.params)
  assert_close(one.ema, many.ema)
  assert one_metrics.keys() == metrics.keys()
  for name, value in one_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_every_device_holds_its_slice_of_the_batch():
  _, _, batch = trained(8, 2)
  for name, axis in (("generator", 1), ("fake_score", 2)):
    labels = batch[name]["class_id"]
    whole = np.asarray(labels)
    starts = set()
    for shard in labels.addressable_shards:
      assert shard.data.shape[axis] == BATCH // 8
      np.testing.assert_array_equal(shard.data, whole[shard.index])
      starts.add(shard.index[axis].start)
    assert starts == set(range(0, BATCH, BATCH // 8))


def test_parameters_moments_and_averages_are_split_over_fsdp():
  state, _, _ = trained(8, 2)
  for tree in (state.generator.params, state.generator.opt_state, state.fake_score.params):
    for leaf in jax.tree.leaves(tree):
      split = any(size % 2 == 0 for size in leaf.shape)
      assert leaf.sharding.is_fully_replicated is not split
      local = leaf.addressable_shards[0].data.size
      assert local * (2 if split else 1) == leaf.size
  largest = state.ema["block_0"]["mlp_in"]["kernel"]  # [16, 32]
  assert largest.sharding.spec == PartitionSpec(None, "fsdp")


@pytest.mark.ci
def test_without_fsdp_every_device_holds_everything():
  state, _, _ = trained(8, 1)
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


@pytest.mark.ci
def test_an_average_in_the_hosts_memory_is_the_same():
  (on_device, metrics, _), (on_host, metrics_too, _) = trained(8, 2), trained(8, 2, (), ("^ema/",))
  for leaf, plain in zip(*map(jax.tree.leaves, (on_host.ema, on_device.ema)), strict=True):
    assert leaf.sharding.memory_kind == "pinned_host" != plain.sharding.memory_kind
    assert leaf.sharding.spec == plain.sharding.spec
    np.testing.assert_array_equal(leaf, plain)
  assert {x.sharding.memory_kind for x in jax.tree.leaves(on_host.generator)} == {"device"}
  assert metrics == metrics_too
  mesh = sharding.make_mesh(2)
  whole = sharding.bytes_per_device({"ema": on_host.ema, "x": np.zeros(3)}, mesh)
  assert (
    24
    == sharding.bytes_per_device({"ema": on_host.ema, "x": np.zeros(3)}, mesh, (), ("^ema/",))
    < whole
  )


@dataclasses.dataclass(frozen=True)
class SliceDevice:
  """What a mesh asks of a TPU that is one of several slices."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"
  core_on_chip: int = 0
  __class__ = jax.Device  # for isinstance

  @property
  def coords(self) -> tuple[int, int, int]:
    return self.id // 2 % 2, self.id // 4, 0


def test_only_what_lies_elsewhere_moves_between_memories():
  mesh = sharding.make_mesh(2)
  tree = {"ema": {"x": np.ones((4, 2))}, "params": {"x": np.zeros((4, 2))}}
  placed = jax.device_put(tree, sharding.state_sharding(tree, mesh))
  moved = sharding.to_memory(placed, mesh, (), ("^ema/",))
  assert moved["ema"]["x"].sharding.memory_kind == "pinned_host"
  assert moved["params"]["x"] is placed["params"]["x"]
  compiled = sharding._mover.cache_info().misses
  sharding.to_memory(placed, mesh, (), ("^ema/",))
  assert sharding._mover.cache_info().misses == compiled
  back = sharding.to_memory(moved, mesh)
  assert back["ema"]["x"].sharding == placed["ema"]["x"].sharding
  np.testing.assert_array_equal(back["ema"]["x"], tree["ema"]["x"])
  assert sharding.to_memory(placed, mesh)["ema"]["x"] is placed["ema"]["x"]


def test_slices_are_joined_along_the_data_axis_alone():
  devices = [SliceDevice(i, i % 2) for i in range(8)]
  mesh = sharding.make_mesh(2, devices)
  assert mesh.shape == {"data": 4, "fsdp": 2}
  slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  assert (slices[:, 0] == slices[:, 1]).all() and set(slices[:, 0]) == {0, 1}
  with pytest.raises(UserError, match=r"mesh\.fsdp=8 must divide the devices of one slice, 4"):
    sharding.make_mesh(8, devices)


def test_rules_come_before_the_largest_dimension():
  mesh = sharding.make_mesh(2)
  tree = {"a": {"kernel": np.zeros((4, 8))}, "b": {"kernel": np.zeros((4, 8))}, "c": np.zeros(3)}
  specs = jax.tree.map(
    lambda s: s.spec, sharding.state_sharding(tree, mesh, (("^a/", 0), ("^b/", None)))
  )
  assert specs["a"]["kernel"] == PartitionSpec("fsdp")
  assert specs["b"]["kernel"] == specs["c"] == PartitionSpec()
  plain = sharding.state_sharding(tree, mesh)
  assert plain["a"]["kernel"].spec == PartitionSpec(None, "fsdp")


def test_impossible_meshes_are_refused():
  with pytest.raises(UserError, match=r"mesh\.fsdp=3 must divide the number of devices, 8"):
    sharding.make_mesh(3)
  with pytest.raises(UserError, match=r"mesh\.rules '\^c' splits dimension 0 of c"):
    sharding.state_sharding({"c": np.zeros(3)}, sharding.make_mesh(2), (("^c", 0),))
  with pytest.raises(UserError, match=r"train\.batch_size=12 must be a positive multiple"):
    sharding.check_batch(12, sharding.make_mesh(), "train.batch_size")
