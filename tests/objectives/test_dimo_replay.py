"""Two recorded trainings of the released code, replayed through the jitted step of `train.py`.

`a` is the plain method; `b` flips nearly every option: two rounds, accumulation, warm-up, random
r_init, noise warm-up, guidance of both kinds, soft targets, temperatures, top-k.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimo_jax import sharding, state
from dimo_jax.convert import maskgit
from dimo_jax.models.mask_transformer import MaskTransformer
from dimo_jax.objectives.dimo import Dimo, DimoDraws
from dimo_jax.optim import OptimizerSpec
from dimo_jax.samplers.one_step import OneStepDraws
from dimo_jax.step import distill_step
from dimo_jax.teachers.maskgit import MaskedTeacher
from tests.helpers import dimo_fields, state_dict

NUM_TOKENS = 16
EXACT = 2e-6  # of a parameter after an update, for 99.9 % of the elements
FROZEN = ("^token_embedding$", "^position_embedding$", "^output_bias$")


class Recording:
  """The arrays of one recorded training, and its options."""

  def __init__(self, arrays, name):
    self.arrays, self.name = arrays, name
    self.train, self.model = arrays["config"]["train"], arrays["config"]["model"]
    self.rounds = self.train["fake_rounds"]
    self.accumulation = self.train["gradient_accumulation_steps"]
    self.num_generator = self.count("lr/generator/")
    self.num_fake = self.count("lr/fake/")

  def count(self, prefix):
    return sum(key.startswith(prefix) for key in self.arrays)

  def draws(self):
    """The recorded draws in call order, cut into updates: {clock: generator's}, [fake score's]."""
    keys = sorted(key for key in self.arrays if key.startswith("draw/"))
    # The ratio's draws are in generate/<i>/fixed_ratio too, where they are used.
    calls = iter([(k.split("/")[2], self.arrays[k]) for k in keys if "np_uniform" not in k])
    generations = iter(range(self.count("generate/")))

    def draw(kind):
      drawn, value = next(calls)
      assert drawn == kind
      return value

    def micro_batch(fake):
      index = next(generations)
      sigma = self.arrays[f"generate/{index}/noise_emb_perturb"]
      labels = draw("randint")
      b = len(labels)
      initial, order = draw("randint_like").reshape(b, -1), draw("rand")
      noise = np.zeros((b, NUM_TOKENS + 1, self.model["hidden_dim"]), np.float32)
      if sigma > 0:
        noise = draw("randn_like")
      tokens = draw("categorical")
      drop_u = draw("uniform_") if fake else np.zeros(b, np.float32)
      generation = {
        "r_init": np.float32(self.arrays[f"generate/{index}/fixed_ratio"]),
        "sigma": np.float32(sigma),
        "initial_tokens": initial.astype(np.int32),
        "initial_order": order,
        "noise": noise[:, :NUM_TOKENS],  # the last is the class position's, discarded there
        "tokens": tokens.astype(np.int32),
      }
      own = {"mask_u": draw("rand"), "mask_order": draw("rand"), "drop_u": drop_u}
      return {"labels": labels.astype(np.int32), "generation": generation} | own

    def update(fake):
      micro_batches = [micro_batch(fake) for _ in range(self.accumulation)]
      return jax.tree.map(lambda *leaves: np.stack(leaves), *micro_batches)

    generator, fake_score = {}, []
    for clock in range(self.num_fake):
      if clock % self.rounds == 0:
        generator[clock] = update(fake=False)
      fake_score.append(update(fake=True))
    assert next(calls, None) is None
    return generator, fake_score

  def objective(self, cls, **replayed):
    options = self.train
    low, high = options["fixed_ratio"].split("_")[1], options["fixed_ratio"].split("_")[-1]
    warm_up = "fix" not in options["noise_emb_perturb"]
    fields = dimo_fields(
      num_tokens=NUM_TOKENS,
      codebook_size=self.model["codebook_size"],
      mask_token_id=options["mask_value"],
      r_init=float(low),
      r_init_high=float(high),
      sigma_schedule="linear" if warm_up else "fixed",
      sigma=0.1,
      sigma_num_warmup=4,
      divergence="jeffreys",
      jeffreys_beta=float(options["distil_loss_type"].split("_")[1]),
      reduction=options["loss_reduction"],
      matching_weight=options["dm_loss_weight"],
      mask_schedule=options["ratio_mode"],
      fake_mask_schedule=options["ratio_mode_fake"],
      teacher_guidance=options["true_cfg"],
      adaptive_guidance=options["adaptive_cfg"],
      fake_guidance=options["fake_cfg_eval"],
      fake_train_guidance=options["fake_cfg_train"],
      fake_condition_drop=options["fake_cfg_drop_ratio"],
      generator_temperature=options["gen_temp"],
      teacher_temperature=options["true_temp"],
      fake_temperature=options["fake_temp"],
      top_k=options["top_k"],
      top_p=options["top_p"],
      allow_mask_token=True,
      soft_target_weight=options["alpha_fake"],
      soft_temperature=options["temperature_fake"],
      fake_rounds=self.rounds,
    )
    return cls(**fields, **replayed)

  def optimizer(self, network, num_updates):
    """The optimiser of the training, behind a transform that keeps what it is given."""
    spec = OptimizerSpec(
      name="adam",
      learning_rate=self.train[f"{network}_lr"],
      b1=self.train["adam_beta1"],
      b2=self.train["adam_beta2"],
      eps=self.arrays["config"]["adam_eps"],
      weight_decay=0.0,
      clip_norm=0.0,  # the release clips in 16-bit runs only
      schedule="constant",
      num_warmup=self.train["lr_warmup_steps"],
      final_fraction=1.0,
    )
    return spec, optax.chain(keep_history(num_updates), spec.build(self.num_fake))


def keep_history(num_updates):
  """Hands gradients on, and keeps them and the parameters of every update."""

  def init(params):
    empty = jax.tree.map(lambda p: jnp.zeros((num_updates, *p.shape)), params)
    return {
      "count": jnp.zeros((), jnp.int32),
      "gradients": empty,
      "parameters": state.copy_tree(empty),
    }

  def update(grads, old, params=None, **_):
    def keep(kept, now):
      return jax.tree.map(lambda k, n: k.at[old["count"]].set(n), kept, now)

    return grads, {
      "count": old["count"] + 1,
      "gradients": keep(old["gradients"], grads),
      "parameters": keep(old["parameters"], params),
    }

  return optax.GradientTransformationExtraArgs(init, update)


class ReplayedDimo(Dimo):
  """Dimo, but the draws of an update are looked up by the clock."""

  def replay(self, generator, fake_score, accumulation):
    """Sets the recorded draws (the dataclass is frozen)."""
    object.__setattr__(self, "_recorded", (generator, fake_score, accumulation))
    return self

  def _look_up(self, which, key, clock):
    recorded = jax.tree.map(lambda leaf: leaf[clock], self._recorded[which])
    return DimoDraws(
      generation=OneStepDraws(**recorded["generation"]),
      mask_u=recorded["mask_u"],
      mask_order=recorded["mask_order"],
      drop_u=recorded["drop_u"],
      dropout_key=jax.random.split(key, self._recorded[2]),
    )

  def draw_generator(self, key, batch, clock):
    return self._look_up(0, key, clock)

  def draw_fake(self, key, batch, clock):
    return self._look_up(1, key, clock)


Tensors = dict[str, np.ndarray]  # by their published names


class Replay(NamedTuple):
  recording: Recording
  specs: dict[str, OptimizerSpec]
  metrics: list[dict[str, Any]]  # of each iteration
  gradients: dict[str, list[Tensors]]  # of each update, by network
  parameters: dict[str, list[Tensors]]  # after each update
  ema: list[Tensors]  # after each iteration


@pytest.fixture(scope="module", params=["a", "b"])
def replay(request, golden):
  name = f"05_dimo_train_{request.param}"
  recording = Recording(golden(name), request.param)
  model = recording.model
  network = MaskTransformer(
    num_tokens=NUM_TOKENS,
    codebook_size=model["codebook_size"],
    num_classes=model["nclass"],
    hidden_dim=model["hidden_dim"],
    num_layers=model["depth"],
    num_heads=model["heads"],
    mlp_dim=model["mlp_dim"],
  )
  teacher_kind = MaskedTeacher(network)
  frozen = FROZEN if recording.train["fix_emb_layer"] else ()
  specs, nets = {}, {}
  for net, num in (("generator", recording.num_generator), ("fake", recording.num_fake)):
    specs[net], tx = recording.optimizer(net, num)
    params = jax.device_put(maskgit.from_published(state_dict(f"{name}_init", f"{net}/")))
    nets[net] = teacher_kind.trained_state(params, tx, frozen)
  teacher_params = maskgit.from_published(state_dict(f"{name}_init", "teacher/"))
  teacher = teacher_kind.frozen_state(jax.device_put(teacher_params), {})

  generator_draws, fake_draws = recording.draws()
  unused = jax.tree.map(np.zeros_like, generator_draws[0])
  generator_draws = [generator_draws.get(clock, unused) for clock in range(recording.num_fake)]
  objective = recording.objective(ReplayedDimo).replay(
    *(jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *d) for d in (generator_draws, fake_draws)),
    recording.accumulation,
  )
  train_state = state.DistillState(
    nets["generator"], nets["fake"], state.copy_tree(nets["generator"].params),
    jnp.zeros((), jnp.int32), (),
  )  # fmt: skip
  mesh = sharding.make_mesh(1, jax.devices()[:1])
  train_state, teacher = (
    jax.device_put(tree, sharding.state_sharding(tree, mesh)) for tree in (train_state, teacher)
  )

  key = jax.random.key(0)

  @functools.cache
  def compiled(num_rounds):
    step_fn = functools.partial(
      distill_step,
      objective,
      recording.train["ema_decay"],
      recording.train["ema_freq"],
      num_rounds=num_rounds,
    )
    step = sharding.jit_step(step_fn, mesh, train_state, teacher)
    # Fast compilation matters more here than fast code.
    options = {"xla_backend_optimization_level": 0}
    return step.lower(train_state, teacher, batch, key).compile(options)

  def published(params, net):
    return maskgit.to_published(state.merge(params, net.frozen))

  metrics, ema = [], []
  for first in range(0, recording.num_fake, recording.rounds):
    last = min(first + recording.rounds, recording.num_fake)  # b stops in the middle of one
    batch = {
      "generator": {"class_id": generator_draws[first]["labels"]},
      "fake_score": {"class_id": np.stack([d["labels"] for d in fake_draws[first:last]])},
    }
    train_state, now = compiled(last - first)(train_state, teacher, batch, key)
    metrics.append(jax.device_get(now))
    ema.append(published(train_state.ema, train_state.generator))
  assert train_state.clock == recording.num_fake

  gradients, parameters = {}, {}
  for name, net in (("generator", train_state.generator), ("fake", train_state.fake_score)):
    history = jax.device_get(net.opt_state[0])
    num = recording.count(f"lr/{name}/")
    assert history["count"] == net.step == num

    def at(kind, i, net=net, history=history):
      return published(jax.tree.map(lambda kept: kept[i], history[kind]), net)

    gradients[name] = [at("gradients", i) for i in range(num)]
    # What an update is given is what the one before it made.
    parameters[name] = [at("parameters", i) for i in range(1, num)] + [published(net.params, net)]
  return Replay(recording, specs, metrics, gradients, parameters, ema)


def recorded(replay, prefix):
  arrays = replay.recording.arrays
  return {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}


def test_losses_and_norms(replay):
  arrays = replay.recording.arrays
  for i, metrics in enumerate(replay.metrics):
    np.testing.assert_allclose(
      metrics["generator/loss"], arrays[f"log/{2 * i + 1}/loss_dm"], rtol=1e-4
    )
    np.testing.assert_allclose(
      metrics["generator/grad_norm"], arrays[f"log/{2 * i}/total_gen_grad_norm"], rtol=1e-4
    )
  # The release logs after the first round of an iteration, and then the sum of the rounds since
  # the log before, over their number in an iteration.
  rounds, num_fake = replay.recording.rounds, replay.recording.num_fake
  done = [min(rounds, num_fake - rounds * i) for i in range(len(replay.metrics))]
  ours = sum(m["fake_score/loss"] * n for m, n in zip(replay.metrics, done, strict=True))
  theirs = sum(arrays[f"log/{2 * i + 1}/loss_fake"] for i in range(len(replay.metrics))) * rounds
  np.testing.assert_allclose(ours, theirs, rtol=2e-5)
  if rounds == 1:
    for i, metrics in enumerate(replay.metrics):
      np.testing.assert_allclose(
        metrics["fake_score/loss"], arrays[f"log/{2 * i + 1}/loss_fake"], rtol=2e-5
      )


def test_learning_rates(replay):
  for network, spec in replay.specs.items():
    rate_fn = spec.learning_rate_fn(replay.recording.num_fake)
    stride = replay.recording.rounds if network == "generator" else 1  # both follow the clock
    wanted = recorded(replay, f"lr/{network}/")
    ours = [rate_fn(int(i) * stride) for i in wanted]
    np.testing.assert_allclose(ours, list(wanted.values()), rtol=1e-6)


@pytest.mark.parametrize("network", ["generator", "fake"])
def test_gradients_of_every_update(replay, network):
  num_tensors = len(replay.ema[0]) - len(FROZEN) * replay.recording.train["fix_emb_layer"]
  for i, gradients in enumerate(replay.gradients[network]):
    wanted = recorded(replay, f"grad/{network}/{i}/")
    assert len(wanted) == num_tensors
    for key, value in wanted.items():
      error = abs(gradients[key] - value).max()
      assert error <= 5e-5 * abs(value).max(), (i, key, error / abs(value).max())


def check_parameters(ours, wanted, largest):
  """99.9 % of the elements within 2e-6, all within `largest`.

  Left out: the key third of every in_proj_bias. Its gradient is zero in exact arithmetic, and Adam
  turns rounding noise into moves of the size of the learning rate, on both sides.
  """
  assert ours.keys() == wanted.keys()
  errors = []
  for key, value in wanted.items():
    error = abs(ours[key] - value)
    if key.endswith("in_proj_bias"):
      query_error, key_error, value_error = np.split(error, 3)
      assert key_error.max() <= 2 * largest, key
      error = np.concatenate([query_error, value_error])
    assert error.max() <= largest, (key, error.max())
    errors.append(error.ravel())
  errors = np.concatenate(errors)
  assert (errors > EXACT).mean() <= 1e-3, np.sort(errors)[-10:]


@pytest.mark.parametrize("network", ["generator", "fake"])
def test_parameters_after_every_update(replay, network):
  learning_rate = replay.recording.train[f"{network}_lr"]
  for i, ours in enumerate(replay.parameters[network]):
    check_parameters(ours, recorded(replay, f"param/{network}/{i}/"), learning_rate * (i + 1))


def test_moving_average(replay):
  for i, ours in enumerate(replay.ema):
    largest = replay.recording.train["generator_lr"] * (i + 1)
    check_parameters(ours, recorded(replay, f"ema/{i}/"), largest)
