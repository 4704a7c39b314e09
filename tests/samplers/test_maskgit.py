import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimo_jax.convert import maskgit
from dimo_jax.models.mask_transformer import MaskTransformer
from dimo_jax.processes import masking
from dimo_jax.samplers.maskgit import ORDERS, DecodingDraws, MaskGit
from dimo_jax.samplers.one_step import OneStep, OneStepDraws
from dimo_jax.types import UserError
from tests.helpers import state_dict, teacher, toy_state

# What the reference calls `randomize`, and the name of its draws.
RECORDED_ORDERS = {
  "linear": ("confidence", "gumbel"),
  "random": ("random", "rand"),
  "warm_up": ("warm_up", "rand"),
}


@pytest.fixture(scope="module")
def recorded(golden):
  return golden("06_val_sample")


@pytest.fixture(scope="module")
def network():
  """The network of golden item 01, whose decodings are recorded."""
  model = MaskTransformer(
    num_tokens=16,
    codebook_size=32,
    num_classes=10,
    hidden_dim=64,
    num_layers=3,
    num_heads=4,
    mlp_dim=128,
    scan_layers=True,
  )
  published = state_dict("01_masktransformer")
  return teacher(model, jax.device_put(maskgit.from_published(published, scan_layers=True)))


def sampler(**options):
  fields = {
    "grid": (4, 4),
    "codebook_size": 32,
    "mask_token_id": 32,
    "num_steps": 8,
    "schedule": "arccos",
    "order": "confidence",
    "order_temperature": 4.5,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 0.0,
    "allow_mask_token": True,
    "guidance_scale": 4.0,
    "guidance_ramp": True,
  }
  return MaskGit(**fields | options)


@dataclasses.dataclass(frozen=True)
class CustomSchedule(MaskGit):
  """Decoding with counts that no schedule gives."""

  custom: tuple[int, ...] = ()

  def counts(self):
    return np.array(self.custom)


def case_of(recorded, name):
  cases = {case["name"]: case for case in recorded["config"]["cases"]}
  return types.SimpleNamespace(**cases[name])


@pytest.mark.parametrize("index", range(7))
def test_recorded_decodings(recorded, network, index):
  case = case_of(recorded, f"case{index}")
  arrays = {k.split("/")[1]: v for k, v in recorded.items() if k.startswith(f"case{index}/")}
  order, draw_name = RECORDED_ORDERS[case.randomize]
  method = sampler(
    num_steps=case.step,
    schedule="arccos" if case.sched_mode == "custom" else case.sched_mode,
    order=order,
    order_temperature=case.r_temp,
    temperature=1 / case.sm_temp,
    guidance_scale=case.w + 1,
  )
  if case.sched_mode == "custom":
    counts = tuple(int(n) for n in arrays["scheduler"])
    method = CustomSchedule(**vars(method), custom=counts)
  elif (arrays["scheduler"] > 0).all():
    np.testing.assert_array_equal(method.counts(), arrays["scheduler"])
  scales = 1 + case.w * method.progress()
  np.testing.assert_allclose(scales[: case.n_forward], arrays["cfg_per_step"], rtol=1e-6)

  def pad(values):  # the reference stops when the grid is full; ours goes on, revealing nothing
    extra = [(0, case.step - len(values))] + [(0, 0)] * 2
    return np.pad(values.reshape(len(values), 4, 16), extra)

  draws = DecodingDraws(
    jnp.asarray(pad(arrays["categorical"]), jnp.int32),
    jnp.asarray(pad(arrays[draw_name]), jnp.float32),
  )
  start = arrays.get("init_code")
  start = None if start is None else jnp.asarray(start.reshape(4, 16), jnp.int32)
  condition = {"class_id": jnp.asarray(recorded["labels"], jnp.int32)}
  codes = jax.jit(method.decode)(network, condition, draws, start)
  np.testing.assert_array_equal(codes, arrays["final_code"].reshape(4, 16))


@pytest.mark.parametrize("index", range(4))
def test_recorded_one_step_generation(recorded, network, index):
  case = case_of(recorded, f"onestep{index}")
  arrays = {k.split("/")[1]: v for k, v in recorded.items() if k.startswith(f"onestep{index}/")}
  sigma = case.noise_emb_perturb
  assert ("noise_full" in arrays) == (sigma > 0)
  method = OneStep(
    num_tokens=16,
    codebook_size=32,
    mask_token_id=32,
    r_init=case.fixed_ratio,
    r_init_high=case.fixed_ratio,
    sigma_schedule="fixed",
    sigma=sigma,
    sigma_num_warmup=1,
    temperature=case.gen_temp,
    top_k=case.top_k,
    top_p=case.top_p,
    allow_mask_token=True,
  )
  noise = arrays.get("noise_full", np.zeros((4, 17, 64), np.float32))[:, :16]
  draws = OneStepDraws(
    r_init=jnp.float32(case.fixed_ratio),
    sigma=jnp.float32(sigma),
    initial_tokens=jnp.asarray(arrays["init_tokens"].reshape(4, 16), jnp.int32),
    initial_order=jnp.asarray(arrays["perm_uniform"]),
    noise=jnp.asarray(noise),
    tokens=jnp.asarray(arrays["pred_code"].reshape(4, 16), jnp.int32),
  )
  condition = {"class_id": jnp.asarray(recorded["labels"], jnp.int32)}
  codes, logits = method.generate(network, condition, draws)
  np.testing.assert_allclose(logits, arrays["pred_logit"], rtol=0, atol=5e-5)
  tempered = masking.tempered_logits(
    logits, temperature=case.gen_temp, top_k=case.top_k, top_p=case.top_p
  )
  np.testing.assert_allclose(jax.nn.softmax(tempered), arrays["probs"], rtol=0, atol=1e-5)
  np.testing.assert_array_equal(codes, arrays["pred_code"].reshape(4, 16))


# Our own loop against a plain one, on a toy network: 3 x 3 tokens of 5 codes.

LABELS = {"class_id": jnp.asarray([0, 1, 2, 0], jnp.int32)}
VARIANTS = {
  **{order: {"order": order} for order in ORDERS},
  "one step": {"num_steps": 1},
  "more steps than tokens": {"num_steps": 20},
  "no guidance": {"guidance_scale": 1.0},
  "constant guidance": {"guidance_ramp": False},
  "temperature and filters": {"temperature": 1.7, "top_k": 4, "top_p": 0.9},
  "no mask token": {"allow_mask_token": False},
  "halton, roll": {"order": "halton", "halton_roll": True},
  "halton, rewrite": {"order": "halton", "rewrite_revealed": True},
  "halton, both": {"order": "halton", "rewrite_revealed": True, "halton_roll": True},
  "halton, more steps than tokens": {"order": "halton", "num_steps": 20},
}


def toy_sampler(**options):
  toy = {"grid": (3, 3), "codebook_size": 5, "mask_token_id": 5, "num_steps": 5}
  return sampler(**toy | options)


def plain_scores(method, i, order, log_probability):
  """Which positions of one sample to keep first at step i: higher first."""
  if method.order == "confidence":
    progress = i / (method.num_steps - 1) if method.num_steps > 1 else 1.0
    return log_probability + method.order_temperature * (1 - progress) * order[i]
  if method.order == "random" or (method.order == "warm_up" and i < 2):
    return order[i]
  if method.order in ("warm_up", "greedy"):
    return log_probability
  sequence = masking.halton_order(*method.grid).tolist()
  if method.halton_roll:
    offset = int(order[0, 0] * len(sequence))
    sequence = np.roll(sequence, -((len(sequence) - offset) % len(sequence))).tolist()
  return [-sequence.index(position) for position in range(method.num_tokens)]


def plain_decode(method, network, condition, draws, start):
  """Decoding by loops over steps and samples; the grid after every step."""
  tokens, history, order = np.array(start), [np.array(start)], np.asarray(draws.order)
  left = [set(np.flatnonzero(row == method.mask_token_id)) for row in tokens]
  for i, count in enumerate(method.counts()):
    scale = method.guidance_scale
    if method.guidance_ramp:
      scale = 1 + (scale - 1) * (i / (method.num_steps - 1) if method.num_steps > 1 else 1.0)
    conditional = network.predict(jnp.asarray(tokens), condition)
    unconditional = network.predict(jnp.asarray(tokens), network.null_fn(condition))
    logits = masking.tempered_logits(
      unconditional + scale * (conditional - unconditional),
      temperature=method.temperature,
      top_k=method.top_k,
      top_p=method.top_p,
      forbidden_token=None if method.allow_mask_token else method.mask_token_id,
    )
    drawn = np.asarray(masking.draw_tokens(draws.tokens[i], logits))
    log_probability = np.asarray(jax.nn.log_softmax(logits))
    for b, row in enumerate(tokens):
      own = log_probability[b, np.arange(method.num_tokens), drawn[b]]
      score = plain_scores(method, i, order[:, b], own)
      chosen = sorted(left[b], key=lambda position, score=score: -score[position])[:count]
      if method.rewrite_revealed:
        chosen += set(range(method.num_tokens)) - left[b]
      row[chosen] = drawn[b, chosen]
      left[b] -= set(chosen)
    history.append(tokens.copy())
  assert not any(left)
  return np.stack(history)


@functools.cache
def sampled(**options):
  """Codes by the jitted sampler, at a fixed key."""
  return np.asarray(jax.jit(toy_sampler(**options).sample)(toy_state(0), LABELS, jax.random.key(1)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_sampling_equals_a_plain_loop(variant):
  method = toy_sampler(**VARIANTS[variant])
  draws = method.draw(jax.random.key(1), 4)
  history = plain_decode(method, toy_state(0), LABELS, draws, np.full((4, 9), 5))
  np.testing.assert_array_equal(sampled(**VARIANTS[variant]), np.minimum(history[-1], 4))


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_given_codes_are_kept_with_every_standard_schedule(order):
  """A start code with a standard schedule crashes the reference."""
  method, network = toy_sampler(order=order), toy_state(0)
  start = np.full((4, 9), 5)
  start[:, [0, 4, 7]] = [1, 2, 3]
  start[0] = np.arange(9) % 5  # nothing to fill
  draws = method.draw(jax.random.key(2), 4)
  codes = jax.jit(method.decode)(network, LABELS, draws, jnp.asarray(start))
  given = start != 5
  np.testing.assert_array_equal(codes[given], start[given])
  history = plain_decode(method, network, LABELS, draws, start)
  np.testing.assert_array_equal(codes, np.minimum(history[-1], 4))
  was = history[:-1] != 5
  np.testing.assert_array_equal(history[1:][was], history[:-1][was])


@pytest.mark.parametrize(
  "options",
  [
    {"num_steps": 1},
    {"num_steps": 64, "schedule": "cosine"},
    {"order": "greedy"},
  ],
)
def test_what_crashes_the_reference_works_on_its_network(recorded, network, options):
  method = sampler(**options)
  condition = {"class_id": jnp.asarray(recorded["labels"], jnp.int32)}
  codes = jax.jit(method.sample)(network, condition, jax.random.key(0))
  assert codes.shape == (4, 16)
  assert codes.min() >= 0 and codes.max() < 32
  assert len(np.unique(codes)) > 1


@pytest.mark.parametrize("allowed", [False, True])
def test_no_mask_id_in_the_output(allowed):
  """A network that wants nothing but the mask id: it is forbidden, or cut to the last code."""

  def apply_fn(params, tokens, condition, **_):
    return jnp.zeros((*tokens.shape, 6)).at[..., 5].set(20.0)

  network = toy_state(0, apply_fn=apply_fn)
  method = toy_sampler(allow_mask_token=allowed)
  codes = method.sample(network, LABELS, jax.random.key(0))
  assert codes.max() <= 4
  assert (codes == 4).all() == allowed


def test_the_halton_roll_differs_by_sample():
  method, network = toy_sampler(order="halton", halton_roll=True, num_steps=1), toy_state(0)
  method = CustomSchedule(**vars(method), custom=(3,))
  draws = method.draw(jax.random.key(0), 4)
  # An incomplete schedule shows where each sample starts: the rest is masked, and cut to code 4.
  order = draws.order.at[0, :, 0].set(jnp.asarray([0.0, 0.12, 0.5, 0.99]))
  draws = draws.replace(tokens=jnp.zeros((1, 4, 9), jnp.int32), order=order)
  codes = np.asarray(method.decode(network, LABELS, draws))
  assert ((codes == 0).sum(axis=1) == 3).all()
  assert len({tuple(row) for row in codes}) == 4


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"order": "confidense"}, "order='confidense'"),
    ({"temperature": 0.0}, "temperature=0.0"),
    ({"order_temperature": -1.0}, "order_temperature=-1.0"),
    ({"rewrite_revealed": True}, "rewrite_revealed=True"),
    ({"schedule": "cosin"}, "schedule='cosin'"),
    ({"num_steps": 0}, "steps 0"),
    ({"num_steps": 0, "order": "halton"}, "steps 0"),
    ({"top_k": -1}, "top_k=-1"),
    ({"top_p": 1.5}, "top_p=1.5"),
    ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
  ],
)
def test_impossible_values_are_refused_in_one_line(options, field):
  with pytest.raises(UserError) as error:
    sampler(**options)
  assert field in str(error.value) and "\n" not in str(error.value)


# Option: (another value, the setting in which it matters).
FLIPS = {
  "grid": ((1, 9), {"order": "halton"}),
  "codebook_size": (3, {}),
  "mask_token_id": (0, {}),
  "num_steps": (1, {}),
  "schedule": ("root", {}),
  "order": ("greedy", {}),
  "order_temperature": (0.0, {}),
  "temperature": (3.0, {}),
  "top_k": (1, {}),
  "top_p": (0.1, {}),
  "allow_mask_token": (False, {}),
  "guidance_scale": (1.0, {}),
  "guidance_ramp": (False, {}),
  "halton_roll": (True, {"order": "halton"}),
  "rewrite_revealed": (True, {"order": "halton"}),
}


def test_every_option_is_covered():
  assert set(FLIPS) == {field.name for field in dataclasses.fields(MaskGit)}


@pytest.mark.parametrize("name", FLIPS)
def test_an_option_changes_a_sample(name):
  value, setting = FLIPS[name]
  base = sampled(**setting)
  assert (sampled(**setting | {name: value}) != base).any()
