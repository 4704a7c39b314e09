"""The masked (absorbing) process on token grids: ratios, masks, initial tokens, decoding orders.

Sources: MaskGIT (arXiv:2202.04200), Di[M]O (arXiv:2503.15457), MAGE (arXiv:2211.09117), the
Halton scheduler (arXiv:2503.17076).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

from dimo_jax.types import Array, Bool, Float, Int, Key, UserError, choose

# MAGE draws its ratios from a normal(0.55, 0.25) truncated to [0.5, 1].
_MAGE_MEAN, _MAGE_STD, _MAGE_LOW, _MAGE_HIGH = 0.55, 0.25, 0.5, 1.0


def _mage(u: Float[Array, "..."]) -> Float[Array, "..."]:
  low, high = (ndtr((bound - _MAGE_MEAN) / _MAGE_STD) for bound in (_MAGE_LOW, _MAGE_HIGH))
  ratio = _MAGE_MEAN + _MAGE_STD * ndtri(low + u * (high - low))
  return jnp.clip(ratio, _MAGE_LOW, _MAGE_HIGH)


MASK_SCHEDULES: dict[str, Callable[[Float[Array, "..."]], Float[Array, "..."]]] = {
  "linear": lambda u: u,
  "square": jnp.square,
  "cosine": lambda u: jnp.cos(u * (np.pi / 2)),
  "arccos": lambda u: jnp.arccos(u) / (np.pi / 2),
  "mage": _mage,
}


def mask_ratio(u: Float[Array, "..."], schedule: str) -> Float[Array, "..."]:
  """Mask ratio in [0, 1] for `u` uniform on [0, 1), by the name of a schedule."""
  return choose(MASK_SCHEDULES, schedule, "mask_schedule")(u)


def num_masked(ratio: Float[Array, "..."], length: int) -> Int[Array, "..."]:
  """Tokens masked out of `length`: `max(1, round(length * ratio))`, half to even."""
  return jnp.maximum(1, jnp.round(length * ratio)).astype(jnp.int32)


def exact_mask(order: Float[Array, "b l"], num: Int[Array, "..."]) -> Bool[Array, "b l"]:
  """Masks exactly `num` positions a row, uniformly chosen by `order`, uniform on [0, 1).

  `num` is one count per row, or a scalar. The comparison is on the argsort itself (a random
  permutation, as good as its inverse), as the Di[M]O release does.
  """
  return jnp.argsort(order, axis=-1) < jnp.asarray(num)[..., None]


def corrupt(
  tokens: Int[Array, "b l"], mask: Bool[Array, "b l"], replacement: int | Int[Array, "b l"]
) -> Int[Array, "b l"]:
  """Replaces masked positions by the mask id, or (second form) by given random codes."""
  return jnp.where(mask, replacement, tokens)


def decoding_schedule(num_steps: int, num_tokens: int, schedule: str) -> np.ndarray:
  """How many tokens each MaskGIT step reveals: int [num_steps], non-negative, summing to the whole.

  The published rule (shares by schedule, rounded, zeros raised to one, the last entry absorbing the
  rest) asks for a zero or negative last entry when many steps meet a small grid, and divides zero
  by zero for one step. Here a step never reveals more than what is left, and one step reveals all.
  """
  shapes = {
    "root": lambda r: 1 - np.sqrt(r),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "cosine": lambda r: np.cos(r * np.float32(np.pi * 0.5)),
    "arccos": lambda r: np.arccos(r) / np.float32(np.pi * 0.5),
    "uniform": None,
  }
  shape = choose(shapes, schedule, "teacher.decoding.schedule")
  if shape is None:
    return np.diff(np.arange(num_steps + 1) * num_tokens // max(num_steps, 1))
  if num_steps < 1:
    raise UserError(f"decoding steps {num_steps} are too few; use 1 or more")
  if num_steps == 1:
    return np.array([num_tokens])
  weight = shape(np.linspace(1, 0, num_steps, dtype=np.float32)).astype(np.float32)
  counts = np.maximum(np.round(weight / weight.sum() * num_tokens), 1).astype(int)
  counts[-1] += num_tokens - counts.sum()
  left = num_tokens - np.concatenate([[0], np.cumsum(np.maximum(counts, 0))[:-1]])
  counts = np.clip(counts, 0, np.maximum(left, 0))
  return counts


def halton_order(height: int, width: int) -> np.ndarray:
  """A low-discrepancy order of the grid's positions, row-major indices: int [height * width].

  Rows by the van der Corput sequence in base 2, columns in base 3, first occurrences kept; points
  are drawn until the grid is full (10,000 fill the published 16x16 and 32x32 grids).
  Source: Besnier et al., arXiv:2503.17076.
  """

  def van_der_corput(index: np.ndarray, base: int) -> np.ndarray:
    value, scale, index = np.zeros(len(index)), 1.0, index.copy()
    while index.any():
      scale /= base
      value += scale * (index % base)
      index //= base
    return value

  num_points = 10_000
  while True:
    index = np.arange(1, num_points + 1)
    rows = np.floor(van_der_corput(index, 2) * height).astype(int)
    columns = np.floor(van_der_corput(index, 3) * width).astype(int)
    cells, first = np.unique(rows * width + columns, return_index=True)
    if len(cells) == height * width:
      return cells[np.argsort(first)]
    num_points *= 4


def halton_schedule(num_steps: int, num_tokens: int) -> np.ndarray:
  """How many tokens each step of Halton decoding reveals: int [num_steps], summing to the whole.

  The published cumulative count after step i is `max(i + 1, floor(L (1 - arccos((i+1)/T)/(pi/2))))`
  """
  if num_steps < 1:
    raise UserError(f"decoding steps {num_steps} are too few; use 1 or more")
  step = np.arange(1, num_steps + 1)
  share = 1 - np.arccos(step / num_steps) / (np.pi / 2)
  cumulative = np.minimum(np.maximum(step, np.floor(num_tokens * share)), num_tokens)
  cumulative[-1] = num_tokens
  return np.diff(cumulative, prepend=0).astype(int)


NOISE_SCHEDULES: dict[str, Callable[[Float[Array, ""], float], Float[Array, ""]]] = {
  "linear": lambda k, num: jnp.minimum(1.0, k / num),
  "exponential": lambda k, num: 1 - jnp.exp(-k / num),
  "cosine": lambda k, num: (1 - jnp.cos(jnp.pi * jnp.minimum(1.0, k / num))) / 2,
}


def embedding_sigma(
  clock: Int[Array, ""], schedule: str, sigma: float, num_warmup: int
) -> Float[Array, ""]:
  """Strength of the embedding perturbation at a fake-score update.

  `fixed` returns `sigma`; every warm-up rises from 0 to 1 (there is no other target) on the scale
  of `num_warmup` fake-score updates, as in the Di[M]O release.
  """
  if schedule == "fixed":
    return jnp.full((), sigma, jnp.float32)
  k = jnp.asarray(clock, jnp.float32)
  return choose(NOISE_SCHEDULES, schedule, "sigma_schedule")(k, float(num_warmup))


def perturb(
  embedding: Float[Array, "b l d"], noise: Float[Array, "b l d"], sigma: Float[Array, ""] | float
) -> Float[Array, "b l d"]:
  """Variance-preserving perturbation of token embeddings: `sigma n + sqrt(1 - sigma^2) e`."""
  sigma = jnp.asarray(sigma, embedding.dtype)
  return sigma * noise + jnp.sqrt(1 - sigma**2) * embedding


def filter_logits(
  logits: Float[Array, "b l v"], top_k: int = 0, top_p: float = 0.0
) -> Float[Array, "b l v"]:
  """Keeps the `top_k` largest logits, then the nucleus of mass `top_p`; others become -inf.

  0 turns a filter off. Ties with the k-th logit are kept, and so is the token that crosses `top_p`.
  """
  if top_k > 0:
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p > 0:
    order = jnp.argsort(-logits, axis=-1)
    probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    removed = jnp.cumsum(probability, axis=-1) > top_p
    removed = jnp.concatenate([jnp.zeros_like(removed[..., :1]), removed[..., :-1]], axis=-1)
    removed = jnp.take_along_axis(removed, jnp.argsort(order, axis=-1), axis=-1)
    logits = jnp.where(removed, -jnp.inf, logits)
  return logits


def tempered_logits(
  logits: Float[Array, "b l v"],
  *,
  temperature: float | Float[Array, ""] = 1.0,
  top_k: int = 0,
  top_p: float = 0.0,
  forbidden_token: int | None = None,
) -> Float[Array, "b l v"]:
  """The logits that tokens are drawn from: float32, tempered, filtered, without `forbidden_token`.

  The Di[M]O release lets a generator emit the mask id; `forbidden_token` rules that out.
  """
  logits = logits.astype(jnp.float32)
  if forbidden_token is not None and forbidden_token < logits.shape[-1]:
    logits = logits.at[..., forbidden_token].set(-jnp.inf)
  return filter_logits(logits / temperature, top_k, top_p)


def draw_tokens(draw: Key | Int[Array, "b l"], logits: Float[Array, "b l v"]) -> Int[Array, "b l"]:
  """Tokens from softmax(logits) by a key, or the given tokens themselves (for a replay).

  By inverting the cumulative distribution: one random number a token, not one for each output. An
  output of logit -inf is never drawn.
  """
  if not jnp.issubdtype(draw.dtype, jax.dtypes.prng_key):
    return draw
  cumulative = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
  total = cumulative[..., -1]
  level = jax.random.uniform(draw, total.shape) * total
  level = jnp.minimum(level, jnp.nextafter(total, jnp.zeros_like(total)))  # it may round up
  return jnp.sum(cumulative <= level[..., None], axis=-1, dtype=jnp.int32)
