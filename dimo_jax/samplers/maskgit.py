"""MaskGIT decoding: many network calls, a few tokens revealed at each. One jitted loop.

Sources: MaskGIT (arXiv:2202.04200) in the form of Besnier and Chen (arXiv:2310.14400); the Halton
order (arXiv:2503.17076).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dimo_jax.processes import masking
from dimo_jax.processes.guidance import guided
from dimo_jax.state import NetworkState
from dimo_jax.types import Array, Condition, Float, Int, Key, UserError, suggest

ORDERS = ("confidence", "random", "warm_up", "greedy", "halton")
_NUM_RANDOM_STEPS = 2  # of the "warm_up" order, before plain confidence


class DecodingDraws(struct.PyTreeNode):
  """Every random number of one decoding; leading axis: steps.

  `tokens` are keys, or recorded codes of all positions. `order` is Gumbel noise ("confidence") or
  uniform on [0, 1) ("random", "warm_up"); the other orders ignore it.
  """

  tokens: Key | Int[Array, "s b l"]
  order: Float[Array, "s b l"]


@dataclasses.dataclass(frozen=True)
class MaskGit:
  """Several-step decoding; fields as in `configs/base.py` under `teacher.decoding`.

  Attributes:
    grid: (height, width) in tokens.
    num_steps: network calls; once the grid is full they change nothing.
    order: which tokens are kept at each step: "confidence" (log-probability plus Gumbel noise that
      fades over the steps), "random", "warm_up" (two random steps, then plain confidence), "greedy"
      (plain confidence), "halton" (a fixed low-discrepancy order).
    order_temperature: scale of the Gumbel noise.
    guidance_scale: 1 is none; with `guidance_ramp` the scale rises linearly from 1 to it.
    halton_roll: rotate the Halton order by a random offset per sample.
    rewrite_revealed: with "halton", draw already revealed positions anew at every step, as the
      original does; unsafe for teachers that are trained on masked positions only.
  """

  grid: tuple[int, int]
  codebook_size: int
  mask_token_id: int
  num_steps: int
  schedule: str
  order: str
  order_temperature: float
  temperature: float
  top_k: int
  top_p: float
  allow_mask_token: bool
  guidance_scale: float
  guidance_ramp: bool
  halton_roll: bool = False
  rewrite_revealed: bool = False

  def __post_init__(self):
    if self.order not in ORDERS:
      raise UserError(
        f"teacher.decoding.order={self.order!r} is unknown{suggest(self.order, ORDERS)}"
      )
    if self.temperature <= 0:
      raise UserError(f"teacher.decoding.temperature={self.temperature} must be positive")
    if self.order_temperature < 0:
      raise UserError(
        f"teacher.decoding.order_temperature={self.order_temperature} must not be negative"
      )
    if not 0 <= self.top_k <= self.codebook_size + 1:
      raise UserError(
        f"teacher.decoding.top_k={self.top_k} must lie in 0 .. {self.codebook_size + 1}; 0 is off"
      )
    if not 0 <= self.top_p < 1:
      raise UserError(f"teacher.decoding.top_p={self.top_p} must lie in [0, 1); 0 is off")
    if self.guidance_scale < 0:
      raise UserError(f"teacher.decoding.guidance_scale={self.guidance_scale} must not be negative")
    if self.rewrite_revealed and self.order != "halton":
      raise UserError(
        "teacher.decoding.rewrite_revealed=True needs teacher.decoding.order='halton'"
      )
    self.counts()

  @property
  def name(self) -> str:
    """What a table calls it."""
    return f"maskgit {self.order} order"

  def at(self, clock: int) -> "MaskGit":
    """Itself: nothing warms up."""
    del clock
    return self

  @property
  def num_tokens(self) -> int:
    """Tokens of the grid."""
    return self.grid[0] * self.grid[1]

  def counts(self) -> np.ndarray:
    """Tokens revealed at each step, int [num_steps]."""
    if self.order == "halton":
      return masking.halton_schedule(self.num_steps, self.num_tokens)
    return masking.decoding_schedule(self.num_steps, self.num_tokens, self.schedule)

  def progress(self) -> np.ndarray:
    """0 at the first step, 1 at the last, float32 [num_steps]; a single step is the last."""
    return np.linspace(0, 1, self.num_steps, dtype=np.float32) if self.num_steps > 1 else np.ones(1)

  def draw(self, key: Key, batch_size: int) -> DecodingDraws:
    """Draws for one decoding of `batch_size` samples."""
    tokens_key, order_key = jax.random.split(key)
    shape = (self.num_steps, batch_size, self.num_tokens)
    draw_order = jax.random.gumbel if self.order == "confidence" else jax.random.uniform
    return DecodingDraws(jax.random.split(tokens_key, self.num_steps), draw_order(order_key, shape))

  def sample(self, network: NetworkState, condition: Condition, key: Key) -> Int[Array, "b l"]:
    """Codes for a batch of conditions, decoded from all masks."""
    b = jax.tree.leaves(condition)[0].shape[0]
    return self.decode(network, condition, self.draw(key, b))

  def decode(
    self,
    network: NetworkState,
    condition: Condition,
    draws: DecodingDraws,
    initial_tokens: Int[Array, "b l"] | None = None,
  ) -> Int[Array, "b l"]:
    """Fills the masked positions of `initial_tokens` (all masked if None); codes are kept, unless
    `rewrite_revealed`.

    A start with fewer masks than the grid finishes early: a step reveals what is left at most.
    """
    b = jax.tree.leaves(condition)[0].shape[0]
    if initial_tokens is None:
      initial_tokens = jnp.full((b, self.num_tokens), self.mask_token_id, jnp.int32)
    null_condition = network.null_fn(condition)
    progress = jnp.asarray(self.progress(), jnp.float32)

    def step(carry, inputs):
      tokens, mask = carry
      index, count, progress, draw, order = inputs
      scale = self.guidance_scale
      if self.guidance_ramp and scale != 1:
        scale = 1 + (scale - 1) * progress
      logits = guided(network.predict, tokens, condition, null_condition, scale)
      logits = masking.tempered_logits(
        logits,
        temperature=self.temperature,
        top_k=self.top_k,
        top_p=self.top_p,
        forbidden_token=None if self.allow_mask_token else self.mask_token_id,
      )
      drawn = masking.draw_tokens(draw, logits)
      log_probability = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)[
        ..., 0
      ]
      if self.order == "confidence":
        score = log_probability + self.order_temperature * (1 - progress) * order
      elif self.order == "random":
        score = order
      elif self.order == "warm_up":
        score = jnp.where(index < _NUM_RANDOM_STEPS, order, jnp.exp(log_probability))
      elif self.order == "greedy":
        score = log_probability
      else:
        score = -self._halton_rank(draws).astype(jnp.float32)
      # The `count` best masked positions; masked ones always rank before revealed ones.
      score = jnp.where(mask, score, -jnp.inf)
      place = jnp.argsort(jnp.argsort(-score, axis=-1), axis=-1)
      chosen = mask & (place < count)
      written = chosen | ~mask if self.rewrite_revealed else chosen
      return (jnp.where(written, drawn, tokens), mask & ~chosen), None

    steps = (
      jnp.arange(self.num_steps),
      jnp.asarray(self.counts(), jnp.int32),
      progress,
      draws.tokens,
      draws.order,
    )
    mask = initial_tokens == self.mask_token_id
    (tokens, _), _ = jax.lax.scan(step, (initial_tokens, mask), steps)
    return jnp.minimum(tokens, self.codebook_size - 1)

  def _halton_rank(self, draws: DecodingDraws) -> Int[Array, "b l"]:
    order = masking.halton_order(*self.grid)
    rank = jnp.asarray(np.argsort(order))
    b = draws.order.shape[1]
    if not self.halton_roll:
      return jnp.broadcast_to(rank, (b, self.num_tokens))
    offset = jnp.floor(draws.order[0, :, :1] * self.num_tokens).astype(jnp.int32)
    return (rank + offset) % self.num_tokens
