"""Two recorded trainings of the released code, replayed through the jitted step of `train.py`.

`a` has a critic with diffusion-GAN noising and two rounds, and stops inside an iteration; `b` has
no critic, one round, a warm-up, active clipping and another table and conditioning. Before them,
the adversarial terms on fixed inputs. The network is the ADM U-Net; generator, fake score and
critic are rebuilt from the rules by which they were made.
"""

import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimo_jax import sharding, state
from dimo_jax.convert import critic, edm
from dimo_jax.models.edm import EDMPrecond
from dimo_jax.models.unet import ADM
from dimo_jax.objectives.dmd2 import (
  Dmd2,
  FakeScoreDraws,
  GenerationDraws,
  GeneratorDraws,
  NoiseDraws,
  Samples,
)
from dimo_jax.optim import OptimizerSpec
from dimo_jax.processes.gaussian import Edm, add_noise
from dimo_jax.state import Nets, NetworkState
from dimo_jax.step import distill_step
from tests.helpers import (
  NO_GAN,
  check_parameters,
  dmd2_fields,
  head_tensors,
  keep_history,
  perturbed,
  state_dict,
  with_prefix,
)

IMAGE_SHAPE = (16, 16, 3)
HEAD = "cls_pred_branch."  # before the critic's published names
NETWORK = EDMPrecond(
  ADM(
    img_resolution=16,
    label_dim=10,
    model_channels=32,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(8,),
    dropout=0.0,
  )
)


def nhwc(array):
  return jnp.asarray(np.moveaxis(array, -3, -1), jnp.float32)


def labels(one_hot):
  return jnp.asarray(np.argmax(one_hot, axis=-1), jnp.int32)


# The networks.


def table_row(key, tensor):
  """What the tables hold of a tensor, in float64."""
  w = np.asarray(tensor, np.float64)
  random = np.random.RandomState(zlib.crc32(f"dot/{key}".encode()))
  return [
    np.sqrt((w**2).sum()),
    w.sum(),
    abs(w).max(),
    (w * random.standard_normal(w.shape)).sum(),
  ]


def check_table(arrays, name, tensors, rtol):
  """Every row of a table; sums and products to the same share of what they are sums of."""
  names = [str(key) for key in arrays[name[0]]]
  assert set(names) <= set(tensors)
  for key, wanted in zip(names, arrays[name[1]], strict=True):
    l2, total, largest, dot = table_row(key, tensors[key])
    size = tensors[key].size ** 0.5 * wanted[0] + 1e-9
    assert abs(l2 - wanted[0]) <= rtol * wanted[0] + 1e-9, (key, l2, wanted[0])
    assert abs(largest - wanted[2]) <= rtol * wanted[2] + 1e-9, (key, largest, wanted[2])
    assert abs(total - wanted[1]) <= rtol * size, (key, total, wanted[1])
    assert abs(dot - wanted[3]) <= rtol * size, (key, dot, wanted[3])


def apply_fn(params, inputs, condition, *, output="x0"):
  return NETWORK.apply(
    {"params": params}, inputs.xt, inputs.sigma, condition["class_id"], output=output
  )


def network_state(params, tx=None):
  tx = optax.set_to_zero() if tx is None else tx
  return NetworkState.create(
    apply_fn=apply_fn,
    params=params,
    tx=tx,
    null_fn=lambda c: {"class_id": jnp.full_like(c["class_id"], 10)},
  )


@functools.cache
def initial_params(name):
  """Parameters of "teacher", "generator" or "score"."""
  tensors = state_dict("07_edm_dhariwal")
  if name != "teacher":
    tensors = perturbed(tensors, {"score": "fake_unet"}.get(name, name))
  return jax.device_put(edm.from_published(tensors, NETWORK))


def initial_fake_params(has_critic):
  params = {"score": initial_params("score")}
  if has_critic:
    params["critic"] = jax.tree.map(jnp.asarray, critic.from_published(head_tensors()))
  return params


def published(params):
  """Tensors under the names of the recording, of a generator or a fake score."""
  params = jax.device_get(params)
  if "score" not in params:
    return edm.to_published(params, NETWORK)
  tensors = edm.to_published(params["score"], NETWORK)
  tensors = {f"fake_unet.{key}": value for key, value in tensors.items()}
  if "critic" in params:
    head = critic.to_published(params["critic"])
    tensors |= {HEAD + key: value for key, value in head.items()}
  return tensors


def test_the_weights_are_rebuilt(golden):
  recorded = golden("08_dmd2_edm_math")
  for name, tensors in (
    ("fake", perturbed(state_dict("07_edm_dhariwal"), "fake_unet")),
    ("cls", head_tensors()),
  ):
    table = (f"{name}_weight_table_names", f"{name}_weight_table_l2_sum_absmax_dot")
    prefix = HEAD if name == "cls" else ""
    check_rebuilt(recorded, table, tensors, prefix)


def check_rebuilt(recorded, table, tensors, prefix):
  for key, wanted in zip(recorded[table[0]], recorded[table[1]], strict=True):
    # The head's products were recorded under one of its two names.
    rows = [table_row(k, tensors[str(key)]) for k in (str(key), prefix + str(key))]
    assert any(np.allclose(row, wanted, rtol=1e-6, atol=1e-6) for row in rows), key


# Adversarial terms on fixed inputs.


@pytest.fixture(scope="module")
def math(golden):
  return golden("08_dmd2_edm_math")


@pytest.fixture(scope="module", params=["gan_diffusion", "gan_clean"])
def adversarial_terms(request, math):
  """Generator's and critic's terms with their slopes, through the objective's losses."""
  kind = request.param
  generator_weight, critic_weight = 1.0, 1e3  # the critic's is divided out again
  objective = Dmd2(
    **dmd2_fields(
      image_shape=IMAGE_SHAPE,
      num_classes=10,
      matching_weight=0.0,
      gan_generator_weight=generator_weight,
      gan_critic_weight=critic_weight,
      gan_num_levels=1000 if kind == "gan_diffusion" else 0,
      critic_groups=8,
    )
  )
  image, condition = nhwc(math["image"]), {"class_id": labels(math["labels"])}
  sigmas = jnp.asarray(objective.process.sigmas())

  def noise(name):
    if kind == "gan_clean":
      return NoiseDraws(jnp.full(4, sigmas[0]), jnp.zeros((4, *IMAGE_SHAPE)))
    timesteps = math[f"{kind}/{name}_timesteps"]
    return NoiseDraws(sigmas[timesteps], nhwc(math[f"{kind}/{name}_noise"]))

  # A generator that answers with the recorded image, whatever its input.
  generator = network_state({"image": image}).replace(apply_fn=lambda p, *_, **__: p["image"])
  fake_score = network_state(initial_fake_params(True))
  nets = Nets(generator, fake_score, network_state(initial_params("teacher")))
  generation = GenerationDraws(
    condition["class_id"], jnp.zeros((), jnp.int32), jnp.zeros((1, 4, *IMAGE_SHAPE))
  )
  batch = {"image": nhwc(math["real_image"]), "class_id": labels(math["real_labels"])}

  def generator_loss(params):
    draws = GeneratorDraws(generation, noise("gen_cls"), noise("gen_cls"))
    return objective.generator_loss(params, nets, batch, draws, ())[0]

  def critic_loss(params):
    zero = jnp.zeros((4, *IMAGE_SHAPE))
    silent = NoiseDraws(jnp.full(4, sigmas[-1]), zero)
    draws = FakeScoreDraws(generation, silent, noise("cls_fake"), noise("cls_real"), zero)
    samples = Samples(image, condition)
    loss, (metrics, _) = objective.fake_score_loss(params, nets, samples, batch, draws, ())
    return critic_weight * metrics["critic/loss"] + 0 * loss, metrics

  def logits(params):
    given = noise("gen_cls")
    inputs = add_noise(image, given.noise, given.sigma)
    return objective._logits(params, nets, inputs, condition)

  options = {"xla_backend_optimization_level": 0}
  generator_part = jax.jit(jax.value_and_grad(generator_loss)).lower(generator.params)
  critic_part = jax.jit(jax.value_and_grad(critic_loss, has_aux=True)).lower(fake_score.params)
  loss, slope = generator_part.compile(options)(generator.params)
  (_, metrics), critic_slope = critic_part.compile(options)(fake_score.params)
  gradient = jax.tree.map(lambda g: g / critic_weight, critic_slope)
  return kind, loss, slope["image"], metrics, gradient, jax.jit(logits)(fake_score.params)


def test_adversarial_losses(adversarial_terms, math):
  kind, loss, _, metrics, _, logits = adversarial_terms
  np.testing.assert_allclose(loss, math[f"{kind}/gen_cls_loss"], rtol=1e-5)
  np.testing.assert_allclose(metrics["critic/loss"], math[f"{kind}/guidance_cls_loss"], rtol=1e-5)
  for name in ("real", "fake"):
    wanted = math[f"{kind}/prob_{name}"].mean()
    np.testing.assert_allclose(metrics[f"critic/{name}_probability"], wanted, rtol=1e-5)
  if kind == "gan_clean":
    wanted = math["gan_clean/logits"][:, 0]
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(jax.nn.sigmoid(logits), math["gan_clean/prob_fake"], rtol=1e-5)


def test_adversarial_gradients(adversarial_terms, math):
  kind, _, slope, _, gradient, _ = adversarial_terms
  wanted = math[f"{kind}/gen_cls_dimage"]
  np.testing.assert_allclose(slope, nhwc(wanted), rtol=0, atol=5e-5 * abs(wanted).max())
  tensors = published(gradient)
  assert np.abs(tensors["fake_unet.model.out_conv.weight"]).max() == 0  # the decoder is not run
  table = (f"{kind}/grad_table_names", f"{kind}/grad_table_l2_sum_absmax_dot")
  short = {key.removeprefix("fake_unet."): value for key, value in tensors.items()}
  check_table(math, table, tensors | short, rtol=1e-4)


# The recorded trainings.


class Recording:
  """The arrays of one recorded training, and its options."""

  def __init__(self, arrays):
    self.arrays, self.args = arrays, arrays["config"]["args"]
    self.has_critic = self.args["gan_classifier"]
    self.rounds = self.args["dfake_gen_update_ratio"]
    self.num_fake = self.args["train_iters"]
    self.num_generator = sum(key.startswith("lr/generator/") for key in arrays)

  @property
  def process(self):
    names = {"num_train_timesteps": "num_levels", "sigma_min": "sigma_min"}
    names |= {name: name for name in ("sigma_max", "rho", "sigma_data")}
    return Edm(**{ours: self.args[theirs] for theirs, ours in names.items()})

  def objective(self, cls):
    gan = NO_GAN
    if self.has_critic:
      gan = {
        "gan_generator_weight": self.args["gen_cls_loss_weight"],
        "gan_critic_weight": self.args["cls_loss_weight"],
        "gan_num_levels": self.args["diffusion_gan_max_timestep"],
      }
    return cls(
      **dmd2_fields(
        process=self.process,
        image_shape=IMAGE_SHAPE,
        num_classes=self.args["label_dim"],
        student_sigmas=(self.args["conditioning_sigma"],),
        min_level=self.args["min_step_percent"],
        max_level=self.args["max_step_percent"],
        critic_groups=self.arrays["config"]["init"]["cls_groupnorm_groups"],
        fake_rounds=self.rounds,
        **gan | ({} if self.has_critic else {"gan_num_levels": 0}),
      )
    )

  def draws(self):
    """The recorded draws in call order, cut into updates: {clock: generator's}, [fake score's]."""
    calls = sorted(key for key in self.arrays if key.startswith("draw/"))
    calls = iter([(key.split("/")[2], self.arrays[key]) for key in calls])
    sigmas, b = self.process.sigmas(), self.args["batch_size"]

    def draw(kind):
      drawn, value = next(calls)
      assert drawn == kind
      return value

    def noise(timesteps, values):
      return NoiseDraws(sigmas[timesteps.ravel()], np.asarray(nhwc(values)))

    def levels_first():
      timesteps = draw("randint")
      return noise(timesteps, draw("randn_like"))

    def noise_first():
      values = draw("randn_like")
      return noise(draw("randint"), values)

    silent = NoiseDraws(np.full(b, sigmas[0]), np.zeros((b, *IMAGE_SHAPE), np.float32))
    generator, fake_score = {}, []
    for clock in range(self.num_fake):
      start = np.asarray(nhwc(draw("randn")))[None]
      class_id = draw("randint").astype(np.int32)
      generation = GenerationDraws(class_id, np.zeros((), np.int32), start)
      if clock % self.rounds == 0:
        matching = levels_first()
        generator[clock] = GeneratorDraws(
          generation, matching, levels_first() if self.has_critic else silent
        )
      denoising, real, fake = noise_first(), silent, silent
      if self.has_critic:
        real, fake = levels_first(), levels_first()
      fake_score.append(FakeScoreDraws(generation, denoising, fake, real, silent.noise))
    assert next(calls, None) is None
    return generator, fake_score

  def real_batch(self, clock):
    """{"image": [1, b, h, w, c], "class_id": [1, b]}."""
    turn = f"turn/generator/{clock}/"
    image, label = self.arrays[f"{turn}real_image"], self.arrays[f"{turn}real_label"]
    return {"image": nhwc(image)[None], "class_id": labels(label)[None]}

  def optimizer(self, network, num_updates):
    """The optimiser of the training, behind a transform that keeps what it is given."""
    name = {"generator": "generator_lr", "guidance": "guidance_lr"}[network]
    spec = OptimizerSpec(
      name="adamw",
      learning_rate=self.args[name],
      b1=0.9,
      b2=0.999,
      eps=1e-8,
      weight_decay=0.01,
      clip_norm=float(self.args["max_grad_norm"]),
      schedule="constant",
      num_warmup=self.args["warmup_step"],
      final_fraction=1.0,
    )
    return spec, optax.chain(keep_history(num_updates), spec.build(self.num_fake))


class ReplayedDmd2(Dmd2):
  """Dmd2, but the draws of an update are looked up by the clock."""

  def replay(self, generator, fake_score):
    """Sets the recorded draws (the dataclass is frozen)."""
    object.__setattr__(self, "_recorded", (generator, fake_score))
    return self

  def _look_up(self, which, clock):
    return jax.tree.map(lambda leaf: leaf[clock][None], self._recorded[which])

  def draw_generator(self, key, batch, clock):
    return self._look_up(0, clock)

  def draw_fake(self, key, batch, clock):
    return self._look_up(1, clock)


Tensors = dict[str, np.ndarray]  # by their published names


class Replay(NamedTuple):
  recording: Recording
  specs: dict[str, OptimizerSpec]
  metrics: list[dict[str, Any]]  # of each iteration
  gradients: dict[str, list[Tensors]]  # of each update, clipped, by network
  parameters: dict[str, list[Tensors]]  # after each update


@pytest.fixture(scope="module", params=[pytest.param("a", marks=pytest.mark.ci), "b"])
def replay(request, golden):
  recording = Recording(golden(f"08_dmd2_edm_train_{request.param}"))
  specs, txs = {}, {}
  for net, num in (("generator", recording.num_generator), ("guidance", recording.num_fake)):
    specs[net], txs[net] = recording.optimizer(net, num)
  generator = network_state(state.copy_tree(initial_params("generator")), txs["generator"])
  fake_params = state.copy_tree(initial_fake_params(recording.has_critic))
  fake_score = network_state(fake_params, txs["guidance"])
  teacher = network_state(initial_params("teacher"))

  generator_draws, fake_draws = recording.draws()
  unused = jax.tree.map(np.zeros_like, generator_draws[0])
  generator_draws = [generator_draws.get(clock, unused) for clock in range(recording.num_fake)]
  stacked = [
    jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *d) for d in (generator_draws, fake_draws)
  ]
  objective = recording.objective(ReplayedDmd2).replay(*stacked)
  train_state = state.DistillState(
    generator, fake_score, state.copy_tree(generator.params), jnp.zeros((), jnp.int32),
    objective.init_extra(),
  )  # fmt: skip
  mesh = sharding.make_mesh(1, jax.devices()[:1])
  train_state, teacher = (
    jax.device_put(tree, sharding.state_sharding(tree, mesh)) for tree in (train_state, teacher)
  )
  key = jax.random.key(0)

  @functools.cache
  def compiled(num_rounds):
    step_fn = functools.partial(distill_step, objective, 0.0, 1, num_rounds=num_rounds, unroll=True)
    step = sharding.jit_step(step_fn, mesh, train_state, teacher)
    # Fast compilation matters more here than fast code.
    options = {"xla_backend_optimization_level": 0}
    return step.lower(train_state, teacher, batch, key).compile(options)

  metrics = []
  for begin in range(0, recording.num_fake, recording.rounds):
    end = min(begin + recording.rounds, recording.num_fake)  # a stops in the middle of one
    rounds = [recording.real_batch(clock) for clock in range(begin, end)]
    batch = {
      "generator": rounds[0],
      "fake_score": jax.tree.map(lambda *x: jnp.stack(x), *rounds),
    }
    train_state, now = compiled(end - begin)(train_state, teacher, batch, key)
    metrics.append(jax.device_get(now))
  assert train_state.clock == recording.num_fake

  gradients, parameters = {}, {}
  for name, net in (("generator", train_state.generator), ("guidance", train_state.fake_score)):
    history = jax.device_get(net.opt_state[0])
    num = {"generator": recording.num_generator, "guidance": recording.num_fake}[name]
    assert history["count"] == net.step == num

    def at(kind, i, history=history):
      return jax.tree.map(lambda kept: kept[i], history[kind])

    clip = optax.clip_by_global_norm(specs[name].clip_norm)
    gradients[name] = [published(clip.update(at("gradients", i), ())[0]) for i in range(num)]
    # What an update is given is what the one before it made.
    given = [at("parameters", i) for i in range(1, num)] + [net.params]
    parameters[name] = [published(params) for params in given]
  return Replay(recording, specs, metrics, gradients, parameters)


def recorded(replay, prefix):
  return with_prefix(replay.recording.arrays, prefix)


def test_losses(replay):
  arrays, recording = replay.recording.arrays, replay.recording
  for i, metrics in enumerate(replay.metrics):
    begin = i * recording.rounds
    clocks = range(begin, min(begin + recording.rounds, recording.num_fake))
    pairs = [("generator/matching_loss", [arrays[f"turn/generator/{begin}/loss/loss_dm"]])]
    pairs += [
      (
        "fake_score/denoising_loss",
        [arrays[f"turn/guidance/{k}/loss/loss_fake_mean"] for k in clocks],
      )
    ]
    if recording.has_critic:
      pairs += [
        ("generator/gan_loss", [arrays[f"turn/generator/{begin}/loss/gen_cls_loss"]]),
        ("critic/loss", [arrays[f"turn/guidance/{k}/loss/guidance_cls_loss"] for k in clocks]),
      ]
      for side in ("real", "fake"):
        values = [arrays[f"turn/guidance/{k}/log/pred_realism_on_{side}"] for k in clocks]
        pairs.append((f"critic/{side}_probability", values))
    for name, wanted in pairs:
      np.testing.assert_allclose(metrics[name], np.mean(wanted), rtol=1e-5, err_msg=name)


def test_gradient_norms(replay):
  """Before clipping; the recording lists them in the order of the events."""
  arrays, recording = replay.recording.arrays, replay.recording
  events = [e for e in arrays["config"]["event_order"] if e.startswith("grad:")]
  norms = {"grad:generator": [], "grad:guidance": []}
  for k, event in enumerate(events):
    norms[event].append(arrays[f"clip_norm/{k}"])
  for i, metrics in enumerate(replay.metrics):
    np.testing.assert_allclose(
      metrics["generator/grad_norm"], norms["grad:generator"][i], rtol=1e-5
    )
    rounds = norms["grad:guidance"][i * recording.rounds : (i + 1) * recording.rounds]
    np.testing.assert_allclose(metrics["fake_score/grad_norm"], np.mean(rounds), rtol=1e-5)


def test_learning_rates(replay):
  for network, spec in replay.specs.items():
    rate_fn = spec.learning_rate_fn(replay.recording.num_fake)
    stride = replay.recording.rounds if network == "generator" else 1  # both follow the clock
    wanted = recorded(replay, f"lr/{network}/")
    ours = [rate_fn(int(i) * stride) for i in wanted]
    np.testing.assert_allclose(ours, list(wanted.values()), rtol=1e-6)


def key_bias(name, tensor):
  """Every third of a qkv.bias, from the second on: the published order of channels."""
  return np.arange(len(tensor)) % 3 == 1 if name.endswith("qkv.bias") else None


@pytest.mark.parametrize("network", ["generator", "guidance"])
def test_gradients_of_every_update(replay, network):
  for i, gradients in enumerate(replay.gradients[network]):
    wanted = recorded(replay, f"grad/{network}/{i}/")
    assert len(wanted) >= 15
    for key, value in wanted.items():
      error = abs(gradients[key] - value)
      marked = key_bias(key, error)
      error = error.max() if marked is None else error[~marked].max()
      assert error <= 5e-5 * abs(value).max(), (i, key, error / abs(value).max())
    names = (f"grad_table/{network}/names", f"grad_table/{network}/{i}")
    check_table(replay.recording.arrays, names, gradients, rtol=1e-4)


@pytest.mark.parametrize("network", ["generator", "guidance"])
def test_parameters_after_every_update(replay, network):
  """Whole tensors where they were recorded, and the norms of all of them."""
  learning_rate = replay.specs[network].learning_rate
  for i, ours in enumerate(replay.parameters[network]):
    wanted = recorded(replay, f"param/{network}/{i}/")
    assert len(wanted) >= 15
    check_parameters(ours, wanted, learning_rate * (i + 1), key_bias)
    arrays = replay.recording.arrays
    rows = arrays[f"param_table/{network}/{i}"]
    for key, row in zip(arrays[f"param_table/{network}/names"], rows, strict=True):
      l2 = np.sqrt((ours[str(key)].astype(np.float64) ** 2).sum())
      np.testing.assert_allclose(l2, row[0], rtol=1e-5, err_msg=str(key))


def test_options_not_replayed(replay):
  """The options that the replay does not set are those it assumes."""
  args = replay.recording.args
  assert args["diffusion_gan"] == args["gan_classifier"] == replay.recording.has_critic
  assert not args["use_fp16"] and args["initialie_generator"]
