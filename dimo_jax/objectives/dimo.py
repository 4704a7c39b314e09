"""Di[M]O: a one-step generator from a masked discrete teacher (arXiv:2503.15457, ICCV 2025).

The generator turns a half-masked, half-random grid into tokens at once. Its own tokens are masked
again; teacher and fake score say what they see there, and the difference of their distributions is
the gradient on the generator's logits. The fake score is kept fitted to the generator's samples.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dimo_jax.objectives.denoising import cross_entropy, masked_mean, soft_cross_entropy
from dimo_jax.objectives.divergences import divergence_fn, logit_gradient
from dimo_jax.processes import masking
from dimo_jax.processes.guidance import drop_condition, guided
from dimo_jax.samplers.maskgit import MaskGit
from dimo_jax.samplers.one_step import OneStep, OneStepDraws
from dimo_jax.state import Nets, NetworkState, copy_tree
from dimo_jax.types import (
  Array,
  Batch,
  Bool,
  Condition,
  Float,
  Int,
  Key,
  Metrics,
  Params,
  UserError,
  choose,
)

_WEIGHT_FLOOR = 1e-5  # of the optional gradient weight (Di[M]O, arXiv:2503.15457)


class DimoDraws(struct.PyTreeNode):
  """Every random number of one update; leading axis: micro-batches."""

  generation: OneStepDraws
  mask_u: Float[Array, "*a b"]  # uniform on [0, 1): mask ratio of the generated tokens
  mask_order: Float[Array, "*a b l"]  # uniform on [0, 1): which of them are masked
  drop_u: Float[Array, "*a b"]  # uniform on [0, 1): who loses the condition (fake score)
  dropout_key: Key


class Samples(struct.PyTreeNode):
  """What the generator made of one micro-batch."""

  output: Int[Array, "b l"]
  logits: Float[Array, "b l v"]
  condition: Condition


@dataclasses.dataclass(frozen=True)
class Dimo:
  """The Di[M]O objective; the fields are described in `configs/base.py` under `dimo`."""

  num_tokens: int
  codebook_size: int
  mask_token_id: int
  r_init: float
  r_init_high: float
  sigma_schedule: str
  sigma: float
  sigma_num_warmup: int
  divergence: str
  jeffreys_beta: float
  weighting: str
  reduction: str
  matching_weight: float
  mask_schedule: str
  fake_mask_schedule: str
  teacher_guidance: float
  adaptive_guidance: bool
  fake_guidance: float
  fake_train_guidance: float
  fake_condition_drop: float
  generator_temperature: float
  teacher_temperature: float
  fake_temperature: float
  top_k: int
  top_p: float
  allow_mask_token: bool
  label_smoothing: float
  soft_target_weight: float
  soft_temperature: float
  fake_rounds: int
  reuse_samples: bool
  dropout: bool

  teacher_kind = "masked"
  uses_images = False
  uses_pairs = False

  def __post_init__(self):
    def require(ok: bool, name: str, wanted: str):
      if not ok:
        raise UserError(f"dimo.{name}={getattr(self, name)!r} must {wanted}")

    divergence_fn(self.divergence, self.jeffreys_beta)
    for name in ("mask_schedule", "fake_mask_schedule"):
      choose(masking.MASK_SCHEDULES, getattr(self, name), f"dimo.{name}")
    require(self.weighting in ("none", "teacher_gap"), "weighting", "be 'none' or 'teacher_gap'")
    require(self.reduction in ("sum", "mean"), "reduction", "be 'sum' or 'mean'")
    for name in (
      "generator_temperature", "teacher_temperature", "fake_temperature", "soft_temperature"
    ):  # fmt: skip
      require(getattr(self, name) > 0, name, "be positive")
    for name in ("label_smoothing", "fake_condition_drop", "soft_target_weight"):
      require(0 <= getattr(self, name) <= 1, name, "lie in [0, 1]")
    for name in ("teacher_guidance", "fake_guidance", "fake_train_guidance", "matching_weight"):
      require(getattr(self, name) >= 0, name, "not be negative")
    require(self.fake_rounds >= 1, "fake_rounds", "be 1 or more")
    _ = self.one_step  # checks what concerns the generator's input and output

  @property
  def one_step(self) -> OneStep:
    """How the generator is called in training."""
    return OneStep(
      num_tokens=self.num_tokens,
      codebook_size=self.codebook_size,
      mask_token_id=self.mask_token_id,
      r_init=self.r_init,
      r_init_high=self.r_init_high,
      sigma_schedule=self.sigma_schedule,
      sigma=self.sigma,
      sigma_num_warmup=self.sigma_num_warmup,
      temperature=self.generator_temperature,
      top_k=self.top_k,
      top_p=self.top_p,
      allow_mask_token=self.allow_mask_token,
    )

  def sampler(self, options: Mapping[str, Any]) -> OneStep:
    """One step as in training, but for the filters of `config.sampling`."""
    filters = {name: options[name] for name in ("temperature", "top_k", "top_p")}
    return dataclasses.replace(self.one_step, section="sampling", **filters)

  def fake_score_params(self, key: Key, teacher: NetworkState) -> Params:
    """A copy of the teacher's."""
    del key
    return copy_tree(teacher.all_params)

  def score_params(self, fake_score_params: Params) -> Params:
    """All of them."""
    return fake_score_params

  def init_extra(self) -> tuple[()]:
    """Nothing."""
    return ()

  def target(self, decoding: MaskGit) -> MaskGit:
    """What Di[M]O really distils: random order, one token a step, guidance and temperature as in
    the training.
    """
    return dataclasses.replace(
      decoding,
      num_steps=self.num_tokens,
      schedule="uniform",
      order="random",
      temperature=self.teacher_temperature,
      top_k=0,
      top_p=0.0,
      guidance_scale=self.teacher_guidance,
      guidance_ramp=False,
      rewrite_revealed=False,
    )

  @property
  def forward_equivalents(self) -> dict[str, int]:
    """Forward passes a sample costs in one iteration, by network; a backward pass counts two."""
    guided_teacher = 1 if self.teacher_guidance == 1 and not self.adaptive_guidance else 2
    guided_fake = 1 if self.fake_guidance == 1 else 2
    trained_fake = 1 if self.fake_train_guidance == 1 else 2
    return {
      "generator": 3 + self.fake_rounds - self.reuse_samples,
      "teacher": guided_teacher,
      "fake_score": guided_fake + 3 * trained_fake * self.fake_rounds,
    }

  def draw_generator(self, key: Key, batch: Batch, clock: Int[Array, ""]) -> DimoDraws:
    """Draws for a generator update; `batch` leaves are [accumulation, b, ...].

    It shares `r_init` and `sigma` with the first fake round: same key, same clock.
    """
    return self._draw(key, 1, batch, clock)

  def draw_fake(self, key: Key, batch: Batch, clock: Int[Array, ""]) -> DimoDraws:
    """Draws for one fake-score round; `batch` leaves are [accumulation, b, ...]."""
    return self._draw(key, 2, batch, clock)

  def _draw(self, key: Key, stream: int, batch: Batch, clock: Int[Array, ""]) -> DimoDraws:
    a, b = batch["class_id"].shape
    keys = jax.random.split(jax.random.fold_in(key, stream), 5)
    return DimoDraws(
      generation=self.one_step.draw(keys[0], jax.random.fold_in(key, 0), (a, b), clock),
      mask_u=jax.random.uniform(keys[1], (a, b)),
      mask_order=jax.random.uniform(keys[2], (a, b, self.num_tokens)),
      drop_u=jax.random.uniform(keys[3], (a, b)),
      dropout_key=jax.random.split(keys[4], a),
    )

  def generate(
    self, generator_params: Params, nets: Nets, batch: Batch, draws: DimoDraws
  ) -> Samples:
    """One conditional forward pass from half-masked, half-random tokens; never label-dropped."""
    condition = {"class_id": batch["class_id"]}
    generator = nets.generator.replace(params=generator_params)
    tokens, logits = self.one_step.generate(
      generator, condition, draws.generation, self._dropout(draws, 0)
    )
    return Samples(tokens, logits, condition)

  def generator_loss(
    self, generator_params: Params, nets: Nets, batch: Batch, draws: DimoDraws, extra: Any
  ) -> tuple[Float[Array, ""], tuple[Samples, Metrics, Any]]:
    """A loss whose gradient on the generator's logits is the divergence's, over the batch size."""
    samples = self.generate(generator_params, nets, batch, draws)
    masked, mask, ratio = self._mask(samples.output, draws, self.mask_schedule)
    scale = 1 + (self.teacher_guidance - 1) * ratio if self.adaptive_guidance else None
    teacher_logits = (
      self._guided(
        nets.teacher,
        masked,
        samples.condition,
        self.teacher_guidance if scale is None else scale,
        self._dropout(draws, 1),
      )
      / self.teacher_temperature
    )
    fake_logits = (
      self._guided(
        nets.fake_score, masked, samples.condition, self.fake_guidance, self._dropout(draws, 2)
      )
      / self.fake_temperature
    )
    teacher_logits, fake_logits = jax.lax.stop_gradient((teacher_logits, fake_logits))

    divergence = divergence_fn(self.divergence, self.jeffreys_beta)
    gradient = logit_gradient(divergence, fake_logits, teacher_logits)
    gradient = jnp.where(mask[..., None], gradient, 0.0)
    if self.weighting == "teacher_gap":
      gap = jnp.abs(
        jax.nn.softmax(samples.logits.astype(jnp.float32) / self.generator_temperature)
        - jax.nn.softmax(teacher_logits)
      ).mean(axis=(1, 2), keepdims=True)
      gradient = gradient / jnp.maximum(jax.lax.stop_gradient(gap), _WEIGHT_FLOOR)
    gradient = jax.lax.stop_gradient(jnp.nan_to_num(gradient))
    logits = samples.logits.astype(jnp.float32)
    loss = 0.5 * jnp.sum(jnp.square(logits - jax.lax.stop_gradient(logits - gradient)))
    loss = (
      self.matching_weight * loss / (logits.shape[0] if self.reduction == "sum" else logits.size)
    )

    teacher_probability = jax.nn.softmax(teacher_logits)
    gap = 0.5 * jnp.abs(jax.nn.softmax(fake_logits) - teacher_probability).sum(axis=-1)
    metrics = {
      "generator/loss": loss,
      "generator/entropy": jnp.mean(_entropy(jax.lax.stop_gradient(logits))),
      "teacher/entropy": masked_mean(_entropy(teacher_logits), mask),
      "fake_score/entropy": masked_mean(_entropy(fake_logits), mask),
      "distill/disagreement": masked_mean(gap, mask),
    }
    return loss, (samples, metrics, extra)

  def fake_score_loss(
    self,
    fake_params: Params,
    nets: Nets,
    samples: Samples,
    batch: Batch,
    draws: DimoDraws,
    extra: Any,
  ) -> tuple[Float[Array, ""], tuple[Metrics, Any]]:
    """Masked cross-entropy on the generator's samples, hard and (optionally) soft targets mixed."""
    del batch  # the samples carry their condition
    masked, mask, _ = self._mask(samples.output, draws, self.fake_mask_schedule)
    fake_score = nets.fake_score.replace(params=fake_params)
    condition = samples.condition
    if self.fake_train_guidance != 1:
      condition = drop_condition(
        condition, fake_score.null_fn(condition), draws.drop_u, self.fake_condition_drop
      )
    logits = self._guided(
      fake_score, masked, condition, self.fake_train_guidance, self._dropout(draws, 3)
    )
    loss = masked_mean(cross_entropy(logits, samples.output, self.label_smoothing), mask)
    if self.soft_target_weight:
      soft = soft_cross_entropy(
        logits, jax.lax.stop_gradient(samples.logits), self.soft_temperature
      )
      loss = (1 - self.soft_target_weight) * loss
      loss += self.soft_target_weight * masked_mean(soft, mask)
    return loss, ({"fake_score/loss": loss}, extra)

  def _mask(
    self, tokens: Int[Array, "b l"], draws: DimoDraws, schedule: str
  ) -> tuple[Int[Array, "b l"], Bool[Array, "b l"], Float[Array, " b"]]:
    ratio = masking.mask_ratio(draws.mask_u, schedule)
    mask = masking.exact_mask(draws.mask_order, masking.num_masked(ratio, self.num_tokens))
    return masking.corrupt(tokens, mask, self.mask_token_id), mask, ratio

  def _guided(
    self,
    network: NetworkState,
    tokens: Int[Array, "b l"],
    condition: Condition,
    scale: float | Float[Array, " b"],
    dropout: dict[str, Key],
  ) -> Float[Array, "b l v"]:
    return guided(
      lambda x, c: network.predict(x, c, **dropout),
      tokens,
      condition,
      network.null_fn(condition),
      scale,
    )

  def _dropout(self, draws: DimoDraws, stream: int) -> dict[str, Key]:
    return {"dropout_key": jax.random.fold_in(draws.dropout_key, stream)} if self.dropout else {}


def _entropy(logits: Float[Array, "b l v"]) -> Float[Array, "b l"]:
  log_probability = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.sum(jnp.exp(log_probability) * log_probability, axis=-1)
