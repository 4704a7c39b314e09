"""DMD2: a one-step or few-step generator from a continuous teacher (arXiv:2405.14867).

The generator turns noise into an image. The image is noised; teacher and fake score say what they
see, and the difference of their answers is the gradient on the image. Between two generator updates
the fake score is fitted to the generator's images several times, and a critic on its features tells
them from real ones.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dimo_jax.models.critic import Critic
from dimo_jax.objectives import adversarial
from dimo_jax.objectives.denoising import weighted_error
from dimo_jax.processes.gaussian import GaussianProcess, Noised, add_noise, per_sample
from dimo_jax.processes.guidance import guided
from dimo_jax.samplers.edm import FewStep
from dimo_jax.state import Nets, NetworkState, copy_tree
from dimo_jax.types import (
  Array,
  Batch,
  Condition,
  Float,
  Int,
  Key,
  Metrics,
  Params,
  UserError,
  choose,
)


class GenerationDraws(struct.PyTreeNode):
  """Random numbers of one generation."""

  class_id: Int[Array, "*a b"]
  index: Int[Array, "*a"]  # the student's step that is trained, one for the global batch
  noise: Float[Array, "*a s b h w c"]  # unit noise: the start, then each re-noising


class NoiseDraws(struct.PyTreeNode):
  """Random numbers of one noising."""

  sigma: Float[Array, "*a b"]
  noise: Float[Array, "*a b h w c"]


class GeneratorDraws(struct.PyTreeNode):
  """Every random number of one generator update; leading axis: micro-batches."""

  generation: GenerationDraws
  matching: NoiseDraws
  critic: NoiseDraws


class FakeScoreDraws(struct.PyTreeNode):
  """Every random number of one fake-score round; leading axis: micro-batches."""

  generation: GenerationDraws
  denoising: NoiseDraws
  critic_fake: NoiseDraws
  critic_real: NoiseDraws
  r1_noise: Float[Array, "*a b h w c"]


class Samples(struct.PyTreeNode):
  """What the generator made of one micro-batch."""

  output: Float[Array, "b h w c"]
  condition: Condition


@dataclasses.dataclass(frozen=True)
class Dmd2:
  """The DMD2 objective; the fields are described in `configs/base.py` under `dmd2`.

  Batches are {"image": [b, h, w, c], "class_id": [b]} of real data, the generator's being the first
  round's; "image" may be absent where neither the critic nor `student_inputs` looks at it. With
  regression a generator's batch also holds "pairs": {"noise", "image": [b, h, w, c], "class_id"}.
  `fake_score.params` are {"score": ..., "critic": ...}, the latter with a critic only.
  """

  process: GaussianProcess
  image_shape: tuple[int, int, int]
  num_classes: int
  student_sigmas: tuple[float, ...]
  student_inputs: str
  matching_weight: float
  min_level: float
  max_level: float
  teacher_guidance: float
  fake_guidance: float
  gan_generator_weight: float
  gan_critic_weight: float
  gan_num_levels: int
  critic_features: str
  critic_groups: int
  r1_weight: float
  r1_alpha: float
  divergence: str
  ratio_normalization: bool
  ratio_rate: float
  regression_weight: float
  fake_rounds: int
  reuse_samples: bool

  teacher_kind = "gaussian"

  def __post_init__(self):
    def require(ok: bool, name: str, wanted: str):
      if not ok:
        raise UserError(f"dmd2.{name}={getattr(self, name)!r} must {wanted}")

    _ = self.student  # checks the student's steps
    choose(adversarial.F_DIVERGENCES, self.divergence, "dmd2.divergence", extensible=True)
    if self.num_classes < 1:
      raise UserError(f"data.num_classes={self.num_classes} must be 1 or more")
    require(
      self.student_inputs in ("simulated", "real"), "student_inputs", "be 'simulated' or 'real'"
    )
    for name in (
      "matching_weight",
      "teacher_guidance",
      "fake_guidance",
      "gan_generator_weight",
      "gan_critic_weight",
      "r1_weight",
      "regression_weight",
    ):
      require(getattr(self, name) >= 0, name, "not be negative")
    require(
      self.matching_weight + self.gan_generator_weight + self.regression_weight > 0,
      "matching_weight",
      "be positive, or gan_generator_weight or regression_weight: nothing trains the generator",
    )
    require(0 <= self.min_level < 1, "min_level", "lie in [0, 1)")
    require(
      self.min_level < self.max_level <= 1,
      "max_level",
      f"lie in (min_level, 1], min_level={self.min_level}",
    )
    require(
      0 <= self.gan_num_levels <= self.process.num_levels,
      "gan_num_levels",
      f"lie in [0, {self.process.num_levels}]; 0 shows the critic clean images",
    )
    require(
      self.critic_features in ("fake_score", "teacher"),
      "critic_features",
      "be 'fake_score' or 'teacher'",
    )
    require(self.critic_groups >= 1, "critic_groups", "be 1 or more")
    require(self.r1_alpha > 0, "r1_alpha", "be positive")
    require(0 <= self.ratio_rate < 1, "ratio_rate", "lie in [0, 1)")
    require(self.fake_rounds >= 1, "fake_rounds", "be 1 or more")
    if not self.has_critic:
      needs = "needs the critic: set dmd2.gan_critic_weight above 0"
      for name in ("gan_generator_weight", "r1_weight"):
        if getattr(self, name):
          raise UserError(f"dmd2.{name}={getattr(self, name)!r} {needs}")
      if self.divergence != "reverse_kl":
        raise UserError(f"dmd2.divergence={self.divergence!r} {needs}")

  @property
  def student(self) -> FewStep:
    """How the generator is called in training."""
    return FewStep(self.process, self.image_shape, self.student_sigmas)

  @property
  def has_critic(self) -> bool:
    """Whether `fake_score.params` holds a critic."""
    return self.gan_critic_weight > 0

  @property
  def critic(self) -> Critic:
    """The GAN head."""
    return Critic(self.critic_groups)

  @property
  def uses_pairs(self) -> bool:
    """Whether there is a regression."""
    return self.regression_weight > 0

  @property
  def uses_images(self) -> bool:
    """Whether a loss looks at real images."""
    several = len(self.student_sigmas) > 1
    return self.has_critic or (several and self.student_inputs == "real")

  @property
  def forward_equivalents(self) -> dict[str, float]:
    """Forward passes a sample costs in one iteration, by network; a backward pass counts two.

    A pass to the bottleneck counts a half, and so does its backward pass to the input.
    """
    generations = (len(self.student_sigmas) - 1) / 2 if self.student_inputs == "simulated" else 0
    matching = bool(self.matching_weight)
    on_generator = 1.0 * bool(self.gan_generator_weight)  # to the bottleneck and back
    on_generator += 0.5 * (matching and self.divergence != "reverse_kl")
    trains_score = self.critic_features == "fake_score"
    on_critic = (2 * 1.5 if trains_score else 2 * 0.5) * self.has_critic
    on_critic += (1.5 if trains_score else 0.5) * bool(self.r1_weight)
    critic = on_generator + on_critic * self.fake_rounds
    teacher = (1 if self.teacher_guidance == 1 else 2) * matching
    fake_score = (1 if self.fake_guidance == 1 else 2) * matching + 3 * self.fake_rounds
    passes = {
      "generator": 2 + (1 + self.fake_rounds - self.reuse_samples) * (1 + generations),
      "teacher": teacher + (0 if trains_score else critic),
      "fake_score": fake_score + (critic if trains_score else 0),
    }
    return {name: float(number) for name, number in passes.items()}

  def init_critic(self, key: Key, teacher: NetworkState) -> Params:
    """Random parameters of a critic for the bottleneck of networks like the teacher."""
    inputs = Noised(jnp.zeros((1, *self.image_shape)), jnp.ones(1))
    condition = {"class_id": jnp.zeros(1, jnp.int32)}
    features = jax.eval_shape(
      lambda: teacher.predict(inputs, condition, output="bottleneck").astype(jnp.float32)
    )
    return self.critic.init(key, jnp.zeros(features.shape))["params"]

  def fake_score_params(self, key: Key, teacher: NetworkState) -> Params:
    """Initial `fake_score.params`: a copy of the teacher, and a fresh critic where there is one."""
    params = {"score": copy_tree(teacher.all_params)}
    return params | ({"critic": self.init_critic(key, teacher)} if self.has_critic else {})

  def score_params(self, fake_score_params: Params) -> Params:
    """The network without the critic."""
    return fake_score_params["score"]

  def sampler(self, options: Mapping[str, Any]) -> FewStep:
    """The steps of the training, with the guidance of `config.sampling`."""
    return dataclasses.replace(self.student, guidance_scale=options["guidance_scale"])

  def target(self, decoding: Any) -> None:
    """None: the student is trained to match what the teacher's best sampling makes."""
    del decoding

  def init_extra(self) -> Any:
    """Initial `extra`: the density ratio's running means, where they are used."""
    return {"ratio_bins": adversarial.initial_ratio_bins()} if self._keeps_bins else ()

  @property
  def _keeps_bins(self) -> bool:
    return self.divergence != "reverse_kl" and self.ratio_normalization

  def draw_generator(self, key: Key, batch: Batch, clock: Int[Array, ""]) -> GeneratorDraws:
    """Draws for a generator update; `batch` leaves are [accumulation, b, ...]."""
    del clock
    shape = batch["class_id"].shape
    keys = jax.random.split(jax.random.fold_in(key, 1), 3)
    first = int(self.min_level * self.process.num_levels)
    last = int(self.max_level * self.process.num_levels)
    return GeneratorDraws(
      generation=self._draw_generation(keys[0], shape),
      matching=self._draw_noise(keys[1], shape, first, last + 1),
      critic=self._draw_noise(keys[2], shape, 0, self.gan_num_levels),
    )

  def draw_fake(self, key: Key, batch: Batch, clock: Int[Array, ""]) -> FakeScoreDraws:
    """Draws for one fake-score round; `batch` leaves are [accumulation, b, ...]."""
    del clock
    shape = batch["class_id"].shape
    keys = jax.random.split(jax.random.fold_in(key, 2), 5)
    return FakeScoreDraws(
      generation=self._draw_generation(keys[0], shape),
      denoising=self._draw_noise(keys[1], shape, 0, self.process.num_levels),
      critic_fake=self._draw_noise(keys[2], shape, 0, self.gan_num_levels),
      critic_real=self._draw_noise(keys[3], shape, 0, self.gan_num_levels),
      r1_noise=jax.random.normal(keys[4], (*shape, *self.image_shape)),
    )

  def _draw_generation(self, key: Key, shape: tuple[int, ...]) -> GenerationDraws:
    label_key, index_key, noise_key = jax.random.split(key, 3)
    index = jax.random.randint(index_key, (), 0, len(self.student_sigmas))
    return GenerationDraws(
      class_id=jax.random.randint(label_key, shape, 0, self.num_classes),
      index=jnp.full(shape[:-1], index),
      noise=self.student.draw(noise_key, shape),
    )

  def _draw_noise(self, key: Key, shape: tuple[int, ...], low: int, high: int) -> NoiseDraws:
    """Levels uniform on [low, high); without any, the smallest level and no noise at all."""
    sigmas = jnp.asarray(self.process.sigmas())
    if high == 0:
      return NoiseDraws(jnp.full(shape, sigmas[0]), jnp.zeros((*shape, *self.image_shape)))
    level_key, noise_key = jax.random.split(key)
    index = jax.random.randint(level_key, shape, low, min(high, self.process.num_levels))
    noise = jax.random.normal(noise_key, (*shape, *self.image_shape))
    return NoiseDraws(sigmas[index], noise)

  def generate(
    self,
    generator_params: Params,
    nets: Nets,
    batch: Batch,
    draws: GeneratorDraws | FakeScoreDraws,
  ) -> Samples:
    """The image of one step of the student; no gradient passes through the steps before it."""
    given = draws.generation
    condition = {"class_id": given.class_id}
    generator = nets.generator.replace(params=generator_params)
    student = self.student
    if self.student_inputs == "real" and student.num_steps > 1:
      # The mismatch that backward simulation removes: real images, with their labels, noised.
      condition = {"class_id": batch["class_id"]}
      images = _images(batch, "dmd2.student_inputs='real'")
      start = student.simulate(generator, condition, given.noise, 0)
      sigma = jnp.full(len(images), jnp.asarray(self.student_sigmas, jnp.float32)[given.index])
      noised = add_noise(images, given.noise[given.index], sigma)
      inputs = jax.tree.map(lambda a, b: jnp.where(given.index == 0, a, b), start, noised)
    else:
      frozen = generator.replace(params=jax.lax.stop_gradient(generator_params))
      inputs = student.simulate(frozen, condition, given.noise, given.index)
    return Samples(student.predict(generator, condition, inputs), condition)

  def generator_loss(
    self, generator_params: Params, nets: Nets, batch: Batch, draws: GeneratorDraws, extra: Any
  ) -> tuple[Float[Array, ""], tuple[Samples, Metrics, Any]]:
    """Distribution matching, adversarial and regression terms."""
    samples = self.generate(generator_params, nets, batch, draws)
    x0 = samples.output
    still = jax.lax.stop_gradient(x0)
    loss = jnp.zeros(())
    metrics = {"generator/mean": jnp.mean(still), "generator/std": jnp.std(still)}
    if self.matching_weight:
      gradient, extra = self._matching_gradient(still, nets, samples.condition, draws, extra)
      matching = 0.5 * jnp.mean(jnp.square(x0 - (still - gradient)))
      loss += self.matching_weight * matching
      metrics |= {
        "generator/matching_loss": matching,
        "distill/gradient": jnp.mean(jnp.abs(gradient)),
      }
    if self.gan_generator_weight:
      inputs = add_noise(x0, draws.critic.noise, draws.critic.sigma)
      logits = self._logits(nets.fake_score.all_params, nets, inputs, samples.condition)
      gan = adversarial.generator_loss(logits)
      loss += self.gan_generator_weight * gan
      metrics["generator/gan_loss"] = gan
    if self.regression_weight:
      regression = self._regression(generator_params, nets, batch)
      loss += self.regression_weight * regression
      metrics["generator/regression_loss"] = regression
    return loss, (samples, metrics | {"generator/loss": loss}, extra)

  def _matching_gradient(
    self,
    x0: Float[Array, "b h w c"],
    nets: Nets,
    condition: Condition,
    draws: GeneratorDraws,
    extra: Any,
  ) -> tuple[Float[Array, "b h w c"], Any]:
    """`h (mu_fake - mu_teacher) / mean |x0 - mu_teacher|` per sample, and the ratio's bins."""
    sigma = draws.matching.sigma
    inputs = add_noise(x0, draws.matching.noise, sigma)
    fake_score = score_network(nets.fake_score)
    teacher_x0, fake_x0 = (
      guided(net.predict, inputs, condition, net.null_fn(condition), scale)
      for net, scale in (
        (nets.teacher, self.teacher_guidance),
        (fake_score, self.fake_guidance),
      )
    )
    error = jnp.mean(jnp.abs(x0 - teacher_x0), axis=(1, 2, 3))
    gradient = (fake_x0 - teacher_x0) / per_sample(error, x0)
    gradient = jnp.nan_to_num(gradient, posinf=0.0, neginf=0.0)
    if self.divergence != "reverse_kl":
      logits = self._logits(nets.fake_score.all_params, nets, inputs, condition)
      bins = extra["ratio_bins"] if self._keeps_bins else adversarial.initial_ratio_bins()
      weights, bins = adversarial.divergence_weights(
        self.divergence,
        logits,
        self.process.position(sigma),
        bins,
        normalize=self.ratio_normalization,
        rate=self.ratio_rate,
      )
      gradient = per_sample(weights, gradient) * gradient
      extra = {"ratio_bins": bins} if self._keeps_bins else extra
    return jax.lax.stop_gradient(gradient), extra

  def _regression(self, generator_params: Params, nets: Nets, batch: Batch) -> Float[Array, ""]:
    """Mean squared distance to the teacher's own images of the same noise (DMD)."""
    if "pairs" not in batch:
      raise UserError(
        f"dmd2.regression_weight={self.regression_weight} needs noise-image pairs: make them with"
        " --mode=pairs and name their file, or set it to 0"
      )
    pairs = batch["pairs"]
    condition = {"class_id": pairs["class_id"]}
    sigma = jnp.full(len(pairs["noise"]), self.student_sigmas[0])
    inputs = self.process.start(pairs["noise"], sigma)
    generator = nets.generator.replace(params=generator_params)
    x0 = self.student.predict(generator, condition, inputs)
    return jnp.mean(jnp.square(x0 - pairs["image"]))

  def fake_score_loss(
    self,
    fake_params: Params,
    nets: Nets,
    samples: Samples,
    batch: Batch,
    draws: FakeScoreDraws,
    extra: Any,
  ) -> tuple[Float[Array, ""], tuple[Metrics, Any]]:
    """Denoising of the generator's samples, and the critic's terms; one set of parameters."""
    x0, condition = jax.lax.stop_gradient(samples.output), samples.condition
    fake_score = nets.fake_score.replace(params=fake_params)
    inputs = add_noise(x0, draws.denoising.noise, draws.denoising.sigma)
    prediction = score_network(fake_score).predict(inputs, condition)
    loss = weighted_error(prediction, x0, self.process.loss_weight(draws.denoising.sigma))
    metrics = {"fake_score/denoising_loss": loss}
    if self.has_critic:
      images = _images(batch, f"dmd2.gan_critic_weight={self.gan_critic_weight}")
      real_condition = {"class_id": batch["class_id"]}
      fake = add_noise(x0, draws.critic_fake.noise, draws.critic_fake.sigma)
      real = add_noise(images, draws.critic_real.noise, draws.critic_real.sigma)
      seen = [(fake, condition), (real, real_condition)]
      if self.r1_weight:
        perturbed = real.replace(xt=real.xt + self.r1_alpha * draws.r1_noise)
        seen.append((perturbed, real_condition))
      together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen)  # one pass for all
      logits = self._logits(fake_score.all_params, nets, *together)
      fake_logits, real_logits, *others = jnp.split(logits, len(seen))
      critic = adversarial.critic_loss(real_logits, fake_logits)
      loss += self.gan_critic_weight * critic
      metrics |= {
        "critic/loss": critic,
        "critic/real_probability": jnp.mean(jax.nn.sigmoid(real_logits)),
        "critic/fake_probability": jnp.mean(jax.nn.sigmoid(fake_logits)),
      }
      if self.r1_weight:
        r1 = adversarial.approximate_r1(real_logits, *others)
        loss += self.r1_weight * r1
        metrics["critic/r1_loss"] = r1
    return loss, (metrics | {"fake_score/loss": loss}, extra)

  def _logits(
    self, fake_params: Params, nets: Nets, inputs: Noised, condition: Condition
  ) -> Float[Array, " b"]:
    """The critic's logits of noised images."""
    if self.critic_features == "teacher":
      features = nets.teacher.predict(inputs, condition, output="bottleneck")
    else:
      features = nets.fake_score.apply_fn(
        fake_params["score"], inputs, condition, output="bottleneck"
      )
    return jnp.asarray(self.critic.apply({"params": fake_params["critic"]}, features))


def score_network(fake_score: NetworkState) -> NetworkState:
  """The fake score without its critic, as a network of the teacher's kind."""
  return fake_score.replace(params=fake_score.all_params["score"], frozen={})


def _images(batch: Batch, field: str) -> Float[Array, "b h w c"]:
  if "image" not in batch:
    raise UserError(f"{field} needs real images, and data.name has none; name a source with images")
  return batch["image"]
