"""A distillation goes on where it was, on another number of devices and with another split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug
from dimo_jax import prepare, train
from dimo_jax.build import build
from dimo_jax.checkpoint import Checkpoints
from dimo_jax.sharding import make_mesh
from dimo_jax.start import distill_batches
from tests import commands

MESHES = ((8, 4), (4, 2), (1, 1))  # (devices, fsdp), one after the other
STEPS = 2  # on each


def config(variant, num_steps):
  """The debug config with a constant schedule, so that it may grow, and nothing but training."""
  fields = debug.get_config(variant)
  fields.teacher.path = "random"
  fields.train.num_steps = num_steps
  fields.evaluation.protocol = "none"
  fields.log.update(every_steps=1, pictures_every_steps=0, keep_checkpoints=9)
  for name in ("generator", "fake_score"):
    fields.optim[name].update(schedule="constant", num_warmup=0)
  return fields


def on_mesh(variant, num_steps, devices, fsdp):
  """The experiment on the first devices."""
  experiment = build(config(variant, num_steps))
  return dataclasses.replace(experiment, mesh=make_mesh(fsdp, jax.devices()[:devices]))


def distill(experiment, workdir):
  """The state after a distillation without evaluation."""
  teacher = prepare.random_teacher(experiment)
  images, _ = prepare.load_arrays(experiment.source("train"))
  tokenizer = jax.tree.map(jnp.asarray, experiment.tokenizer.fit(images, 0))
  return train.distill(experiment, workdir, teacher, tokenizer, None)


@pytest.fixture(
  scope="module",
  params=[pytest.param("dimo", marks=pytest.mark.ci), pytest.param("dmd2", marks=pytest.mark.slow)],
)
def runs(request, tmp_path_factory):
  """(variant, moving workdir, states at each move, workdir and state of one device)."""
  moved, stayed = (tmp_path_factory.mktemp(request.param) / name for name in ("moved", "stayed"))
  states = [
    distill(on_mesh(request.param, STEPS * (i + 1), *mesh), moved) for i, mesh in enumerate(MESHES)
  ]
  state = distill(on_mesh(request.param, STEPS * len(MESHES), 1, 1), stayed)
  return request.param, moved, states, stayed, state


def test_parameters_are_restored_bit_by_bit(runs):
  variant, workdir, states, _, _ = runs
  for i, state in enumerate(states):
    abstract = jax.eval_shape(lambda s=state: s)
    for mesh in (make_mesh(4), make_mesh(2, jax.devices()[:4]), make_mesh(1, jax.devices()[:1])):
      checkpoints = Checkpoints(workdir / "distill" / "checkpoints", read_only=True)
      restored, step = checkpoints.restore(abstract, mesh, (), STEPS * (i + 1))
      checkpoints.close()
      assert step == STEPS * (i + 1)
      for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=variant)
      assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)} == {mesh.size}


def test_what_follows_is_what_one_device_does(runs):
  """Up to the order of sums, which an Adam step may turn round where a gradient is nearly 0."""
  _, moved, states, stayed, state = runs
  got, wanted = (commands.rows(workdir / "distill") for workdir in (moved, stayed))
  assert [row["step"] for row in got] == list(range(1, STEPS * len(MESHES) + 1))
  for one, other in zip(got, wanted, strict=True):
    for name, value in other.items():
      np.testing.assert_allclose(one[name], value, rtol=2e-3, atol=1e-4, err_msg=name)
  worst = max(
    np.abs(np.asarray(one) - np.asarray(other)).max()
    for one, other in zip(jax.tree.leaves(states[-1].ema), jax.tree.leaves(state.ema), strict=True)
  )
  assert worst < 1e-3, worst


@pytest.mark.parametrize("variant", ["dimo", "dmd2"])
def test_the_data_stream_is_the_same_on_every_mesh(variant):
  streams = [
    list(distill_batches(on_mesh(variant, 6, *mesh), start, 6 - start))
    for mesh, start in zip(MESHES, (0, 2, 4), strict=True)
  ]
  for start, stream in ((2, streams[1]), (4, streams[2])):
    for one, other in zip(streams[0][start:], stream, strict=True):
      assert jax.tree.structure(one) == jax.tree.structure(other)
      jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_first_stage_may_come_from_another_mesh(runs):
  """`train.start_from` reads a checkpoint whole, whatever devices it was made on."""
  _, moved, states, _, _ = runs
  checkpoints = Checkpoints(moved / "distill" / "checkpoints", read_only=True)
  tree = checkpoints.read(STEPS)
  checkpoints.close()
  for one, other in zip(jax.tree.leaves(tree["ema"]), jax.tree.leaves(states[0].ema), strict=True):
    assert isinstance(one, np.ndarray)
    np.testing.assert_array_equal(one, other)
