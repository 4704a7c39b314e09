"""Two tokens that are always equal: the smallest problem that one step from all masks cannot solve.

The teacher knows the answer exactly, every network is a table, so only the method is on trial.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimo_jax.objectives.dimo import Dimo
from dimo_jax.optim import OptimizerSpec
from dimo_jax.state import DistillState, NetworkState, copy_tree
from dimo_jax.step import distill_step
from tests.helpers import dimo_fields

NUM_CODES = 4
MASK = NUM_CODES
NUM_UPDATES, BATCH, NUM_SAMPLES = 400, 128, 20_000


def table_apply(params, tokens, condition, **draws):
  """Logits [b, 2, NUM_CODES + 1] from a table over both tokens."""
  del condition, draws
  return params["table"][tokens[:, 0], tokens[:, 1]]


def teacher_table():
  """Equal, uniform codes: a revealed token decides the other; of two masks each is uniform."""
  table = np.zeros((NUM_CODES + 1, NUM_CODES + 1, 2, NUM_CODES + 1), np.float32)
  for code in range(NUM_CODES):
    table[MASK, code, 0, code] = 8.0
    table[code, MASK, 1, code] = 8.0
  table[..., MASK] = -8.0
  return {"table": jnp.asarray(table)}


@functools.partial(jax.jit, static_argnames="objective")
def train(objective, state, teacher, key):
  label = jnp.zeros((1, BATCH), jnp.int32)
  batch = {"generator": {"class_id": label}, "fake_score": {"class_id": label[None]}}

  def step(state, _):
    state, _ = distill_step(objective, 0.9, 1, state, teacher, batch, key)
    return state, None

  return jax.lax.scan(step, state, None, length=NUM_UPDATES)[0]


def distilled_joint(r_init):
  """The student's joint distribution of both tokens, [NUM_CODES, NUM_CODES]."""
  objective = Dimo(
    **dimo_fields(
      num_tokens=2,
      codebook_size=NUM_CODES,
      mask_token_id=MASK,
      r_init=r_init,
      r_init_high=r_init,
      sigma=0.0,
      jeffreys_beta=0.5,
      teacher_guidance=1.0,
      label_smoothing=0.0,
    )
  )
  params = teacher_table()
  networks = []
  for learning_rate in (0.03, 0.1):
    spec = OptimizerSpec("adam", learning_rate, 0.0, 0.99, 1e-8, 0.0, 1.0, "constant", 0, 1.0)
    networks.append(
      NetworkState.create(
        apply_fn=table_apply, params=copy_tree(params), tx=spec.build(NUM_UPDATES)
      )
    )
  teacher = NetworkState.create(apply_fn=table_apply, params=params, tx=networks[0].tx)
  state = DistillState(*networks, copy_tree(params), jnp.zeros((), jnp.int32), ())
  state = train(objective, state, teacher, jax.random.key(0))
  student = teacher.replace(params=state.ema)
  condition = {"class_id": jnp.zeros(NUM_SAMPLES, jnp.int32)}
  tokens = np.asarray(objective.one_step.sample(student, condition, jax.random.key(1)))
  joint = np.zeros((NUM_CODES, NUM_CODES))
  np.add.at(joint, (tokens[:, 0], tokens[:, 1]), 1 / NUM_SAMPLES)
  return joint


def total_variation(joint):
  return 0.5 * np.abs(joint - np.eye(NUM_CODES) / NUM_CODES).sum()


def test_token_initialisation_finds_the_joint():
  assert total_variation(distilled_joint(r_init=0.5)) < 0.1


@pytest.mark.parametrize("r_init", [1.0])
def test_from_all_masks_it_cannot(r_init):
  joint = distilled_joint(r_init)
  assert total_variation(joint) > 0.5
