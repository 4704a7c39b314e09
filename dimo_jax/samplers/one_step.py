"""One network call from half-masked, half-random tokens: the Di[M]O generator.

The same code makes the samples of the training and those of the test.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from dimo_jax.processes import masking
from dimo_jax.state import NetworkState
from dimo_jax.types import Array, Condition, Float, Int, Key, UserError, choose


class OneStepDraws(struct.PyTreeNode):
  """Every random number of one generation.

  `noise` and `tokens` are keys, and in a replay the recorded values themselves.
  """

  r_init: Float[Array, "*a"]  # mask ratio of the initial tokens, one for the whole batch
  sigma: Float[Array, "*a"]  # embedding perturbation, likewise
  initial_tokens: Int[Array, "*a b l"]
  initial_order: Float[Array, "*a b l"]  # uniform on [0, 1): which initial tokens are masked
  noise: Key | Float[Array, "*a b l d"]
  tokens: Key | Int[Array, "*a b l"]


@dataclasses.dataclass(frozen=True)
class OneStep:
  """The generator's input and output; fields as in `configs/base.py` under `dimo`, `sampling`."""

  num_tokens: int
  codebook_size: int
  mask_token_id: int
  r_init: float
  r_init_high: float
  sigma_schedule: str
  sigma: float
  sigma_num_warmup: int
  temperature: float
  top_k: int
  top_p: float
  allow_mask_token: bool
  section: str = "dimo"  # of the config, for error messages

  name = "one step"
  num_steps = 1

  def __post_init__(self):
    def require(ok: bool, name: str, wanted: str):
      if not ok:
        raise UserError(f"{self.section}.{name}={getattr(self, name)!r} must {wanted}")

    for name in ("r_init", "r_init_high", "sigma"):
      require(0 <= getattr(self, name) <= 1, name, "lie in [0, 1]")
    require(
      self.r_init_high == 0 or self.r_init_high >= self.r_init,
      "r_init_high",
      f"be 0 or not lie below r_init={self.r_init}",
    )
    if self.sigma_schedule != "fixed":
      choose(masking.NOISE_SCHEDULES, self.sigma_schedule, "dimo.sigma_schedule")
      require(self.sigma_num_warmup > 0, "sigma_num_warmup", "be positive with a warm-up")
    require(self.temperature > 0, "temperature", "be positive")
    num_outputs = self.codebook_size + 1
    require(0 <= self.top_k <= num_outputs, "top_k", f"lie in 0 .. {num_outputs}; 0 is off")
    require(0 <= self.top_p < 1, "top_p", "lie in [0, 1); 0 is off")

  def draw(
    self, key: Key, ratio_key: Key, shape: tuple[int, int], clock: Int[Array, ""] | int
  ) -> OneStepDraws:
    """Draws for `shape` = (micro-batches, batch); the noise warm-ups follow `clock`.

    `ratio_key` decides `r_init` alone, so that two updates can share it.
    """
    keys = jax.random.split(key, 4)
    r_init = jax.random.uniform(
      ratio_key, minval=self.r_init, maxval=max(self.r_init, self.r_init_high)
    )
    sigma = masking.embedding_sigma(
      jnp.asarray(clock), self.sigma_schedule, self.sigma, self.sigma_num_warmup
    )
    return OneStepDraws(
      r_init=jnp.full(shape[0], r_init),
      sigma=jnp.full(shape[0], sigma),
      initial_tokens=jax.random.randint(keys[0], (*shape, self.num_tokens), 0, self.codebook_size),
      initial_order=jax.random.uniform(keys[1], (*shape, self.num_tokens)),
      noise=jax.random.split(keys[2], shape[0]),
      tokens=jax.random.split(keys[3], shape[0]),
    )

  def generate(
    self,
    network: NetworkState,
    condition: Condition,
    draws: OneStepDraws,
    dropout: dict[str, Key] | None = None,
  ) -> tuple[Int[Array, "b l"], Float[Array, "b l v"]]:
    """Tokens and the logits they were drawn from (before temperature and filters).

    `draws` is one micro-batch's, without the leading axis.
    """
    mask = masking.exact_mask(
      draws.initial_order, masking.num_masked(draws.r_init, self.num_tokens)
    )
    initial = masking.corrupt(draws.initial_tokens, mask, self.mask_token_id)
    noise = {}
    if self.sigma_schedule != "fixed" or self.sigma > 0:
      noise = {"noise": draws.noise, "sigma": draws.sigma}
    logits = network.predict(initial, condition, **noise, **(dropout or {}))
    tempered = masking.tempered_logits(
      jax.lax.stop_gradient(logits),
      temperature=self.temperature,
      top_k=self.top_k,
      top_p=self.top_p,
      forbidden_token=None if self.allow_mask_token else self.mask_token_id,
    )
    return masking.draw_tokens(draws.tokens, tempered), logits

  def at(self, clock: int) -> "OneStep":
    """The sampler of a training's `clock`: a noise warm-up is fixed at what it has reached."""
    sigma = masking.embedding_sigma(
      jnp.asarray(clock), self.sigma_schedule, self.sigma, self.sigma_num_warmup
    )
    return dataclasses.replace(self, sigma_schedule="fixed", sigma=float(sigma))

  def sample(self, network: NetworkState, condition: Condition, key: Key) -> Int[Array, "b l"]:
    """Codes for a batch of conditions, with fresh noise."""
    if self.sigma_schedule != "fixed":
      raise ValueError("take the sampler of a clock first: OneStep.at(clock)")
    b = jax.tree.leaves(condition)[0].shape[0]
    key, ratio_key = jax.random.split(key)
    draws = self.draw(key, ratio_key, (1, b), 0)
    tokens, _ = self.generate(network, condition, jax.tree.map(lambda x: x[0], draws))
    return jnp.minimum(tokens, self.codebook_size - 1)
