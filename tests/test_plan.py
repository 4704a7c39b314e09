"""The plan: exact bytes of the state, what the estimate counts, advice that is true."""

import importlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from configs import debug
from dimo_jax import plan, sharding
from dimo_jax.build import build
from dimo_jax.plan import Layout, Planner
from dimo_jax.start import initial_state, place, teacher_state
from dimo_jax.types import UserError


def small(variant="dimo", **sections):
  config = debug.get_config(variant)
  for section, fields in sections.items():
    config[section].update(fields)
  return config


def bytes_on(device, tree):
  """What a device really holds."""
  return sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
    if shard.device == device
  )


@pytest.mark.parametrize("variant", ["dimo", "dmd2"])
@pytest.mark.parametrize("fsdp", [1, 2])
def test_state_bytes_are_those_of_a_real_state(variant, fsdp):
  config = small(variant, mesh={"fsdp": fsdp}, precision={"teacher_dtype": "bfloat16"})
  planned = Planner(config, jax.device_count()).memory(
    Layout(fsdp, config.train.batch_size, config.train.accumulation)
  )
  experiment = build(config)
  params = experiment.teacher.init(jax.random.key(0))
  state = place(initial_state(experiment, params)(), experiment.mesh, config.mesh.rules)
  codebook = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), experiment.tokenizer.shapes())
  teacher = teacher_state(experiment, params, codebook)
  parts = plan.state_parts(state, teacher)
  assert parts.keys() == planned.state.keys()
  for device in jax.devices():
    assert {name: bytes_on(device, tree) for name, tree in parts.items()} == planned.state
    assert sum(planned.state.values()) == bytes_on(device, (state, teacher))


def test_sharding_halves_what_it_splits():
  one, two = (Planner(small(), 8).memory(Layout(fsdp, 64, 1)) for fsdp in (1, 2))
  assert 0.5 < two.state["generator optimiser"] / one.state["generator optimiser"] < 0.51
  assert two.activations == one.activations


def test_an_abstract_mesh_is_the_real_one_without_devices():
  tree = {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.float32), "odd": np.zeros(3, np.float32)}
  real, abstract = sharding.make_mesh(2), sharding.abstract_mesh(8, 2)
  assert isinstance(abstract, AbstractMesh)
  assert (real.shape, real.axis_types) == (abstract.shape, abstract.axis_types)
  assert sharding.bytes_per_device(tree, abstract) == 4 * (4 * 3 + 3)
  assert sharding.bytes_per_device(tree, abstract, (("kernel", None),)) == 4 * (24 + 3)
  with pytest.raises(UserError, match=r"mesh\.fsdp=3 must divide the number of devices, 8"):
    sharding.abstract_mesh(8, 3)


def kept_bytes(network, num, *arguments, **sections):
  """What so many samples keep on one device."""
  experiment = build(plan.without_files(small(*arguments, **sections)))
  teacher, state = plan.shapes(experiment)
  fixed, per_sample = plan.residual_bytes(experiment, state, teacher, network)
  return fixed + num * per_sample


@pytest.mark.parametrize("network", ["generator", "fake_score"])
def test_activations_do_not_depend_on_how_many_samples_are_traced(network, monkeypatch):
  one = kept_bytes(network, 3, "dmd2")
  monkeypatch.setattr(plan, "_NUM_TRACED", 20_011)
  assert kept_bytes(network, 3, "dmd2") == one


@pytest.mark.parametrize("network", ["generator", "fake_score"])
def test_a_deeper_network_keeps_the_inputs_of_its_blocks(network):
  """Counted by hand: float32 [samples, tokens and class, width] for each further block."""
  config = small()
  model = {"remat": "full", "scan_layers": True}
  shallow, deep = (kept_bytes(network, 5, model=model | {"num_layers": n}) for n in (4, 7))
  num_tokens = config.tokenizer.grid_size**2 + 1
  assert deep - shallow == 3 * 5 * num_tokens * config.model.hidden_dim * 4


def test_the_largest_batch_fits_and_the_next_does_not():
  planner = Planner(small(), 8)
  limit = 2 * planner.memory(planner.layout).total
  largest = planner.largest_batch(planner.layout, limit)
  assert largest > planner.layout.batch_size and largest % 8 == 0
  sizes = [planner.memory(Layout(1, size, 1)).total for size in (largest, largest + 8)]
  assert sizes[0] <= limit < sizes[1]
  assert planner.largest_batch(planner.layout, 10) == 0


def test_advice_names_what_fits():
  planner = Planner(small(train={"batch_size": 512}), 8)
  memory = planner.memory(planner.layout)
  state = sum(memory.state.values())
  assert memory.activations > state / 4
  limits = {
    "accumulate": memory.total - memory.activations // 4,
    "shard": memory.total - state // 8,
    "rematerialise": memory.total - memory.activations // 4,
    "shard and accumulate": int(0.9 * state),
  }
  for kind, limit in limits.items():
    found = planner.remedies(limit)
    assert kind in found
    for name, layout in found.items():
      assert planner.memory(layout).total <= limit
      assert layout.batch_size * layout.accumulation == 512
      assert (layout.remat == "full") is name.startswith("rematerialise")
  assert set(found) == {"shard and accumulate", "rematerialise and more"}
  assert planner.remedies(state // 100) == {}
  flags = "--config.mesh.fsdp=1 --config.train.batch_size=512 --config.train.accumulation=1"
  assert planner.flags(planner.layout) == flags
  both = planner.flags(Layout(1, 512, 1, "full"))
  assert both == flags + " --config.model.remat=full"


def test_a_sharding_that_a_rule_forbids_is_not_advised():
  config = small(mesh={"rules": (("attention_qkv/kernel", 0),)}, model={"hidden_dim": 18})
  planner = Planner(config, 8)  # 18 is divided by 2, not by 4
  memory = planner.memory(planner.layout)
  state, rest = sum(memory.state.values()), memory.total - sum(memory.state.values())
  assert planner.remedies(int(0.6 * state + rest))["shard"].fsdp == 2
  assert "shard" not in planner.remedies(int(0.4 * state + rest))


@pytest.mark.parametrize("preset", ["digits", "digits_dmd2", "imagenet256", "imagenet256_teacher"])
def test_a_preset_is_planned_without_its_files(preset, capsys):
  config = importlib.import_module(f"configs.{preset}").get_config()
  result = plan.plan(config, 8, 16.0)
  assert result["layout"]["batch_size"] == config.train.batch_size
  *lines, last = capsys.readouterr().out.splitlines()
  assert json.loads(last) == result
  assert config.teacher.path == "" and config.data.name != "noise"  # as it was given
  assert result["total_bytes"] == (
    sum(result["state_bytes"].values())
    + result["gradient_bytes_estimate"]
    + result["activation_bytes_estimate"]
    + result["batch_bytes"]
  )
  assert result["fits"] and "it fits" in lines[-1]
  if preset == "imagenet256":
    assert round(result["num_parameters"]["generator"] / 1e6, 1) == 174.2
    passes = result["model_flops"]["teacher"] / result["model_flops"]["generator"]
    assert passes == 2 / 4
    assert math.isclose(result["state_bytes"]["average"], 4 * 171.9e6, rel_tol=1e-3)


@pytest.mark.slow
def test_imagenet64_is_planned_without_its_files(capsys):
  result = plan.plan(importlib.import_module("configs.imagenet64").get_config(), 8, 16.0)
  assert not result["fits"] and result["remedies"]
  assert "it does not fit; accumulate: --config.mesh.fsdp=1" in capsys.readouterr().out


def test_data_that_is_named_is_not_read_where_its_size_is_known():
  config = importlib.import_module("configs.imagenet256_teacher").get_config()
  for size in (0, 256):
    config.data.update(path="/nowhere", image_size=size)
    found = plan.without_files(config)
    assert (found.data.name, found.data.path, found.data.image_size) == ("noise", "", 256)
  build(found)


@pytest.mark.parametrize(
  ("devices", "memory", "sections", "text"),
  [
    (0, 16.0, {}, "--devices=0 must be 1 or more"),
    (8, -1.0, {}, "--device_memory_gib=-1.0 must be positive"),
    (3, 16.0, {}, "train.batch_size=64 must be a positive multiple of .* devices, 3, such as 63"),
    (8, 16.0, {"mesh": {"fsdp": 3}}, "mesh.fsdp=3 must divide the number of devices, 8"),
    (8, 16.0, {"data": {"name": "folder"}}, "data.image_size=0 must be the side of the images"),
  ],
)
def test_what_cannot_be_planned_is_refused(devices, memory, sections, text):
  config = small(train={"batch_size": 64})
  for section, fields in sections.items():
    config[section].update(fields)
  with pytest.raises(UserError, match=text) as error:
    plan.plan(config, devices, memory)
  assert "\n" not in str(error.value)
