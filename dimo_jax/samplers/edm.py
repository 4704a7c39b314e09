"""Samplers of continuous diffusion: Heun's method for teachers, a few plain steps for students.

Both return images (or latents) [b, h, w, c] in float32, not clipped. Networks are denoisers:
`network.predict(Noised(xt, sigma), condition) -> x0`.

Sources: EDM, arXiv:2206.00364, algorithm 2; DMD2, arXiv:2405.14867, section 4.4.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dimo_jax.processes.gaussian import GaussianProcess, Noised, add_noise, karras_sigmas
from dimo_jax.processes.guidance import guided
from dimo_jax.state import NetworkState
from dimo_jax.types import Array, Condition, Float, Int, Key, UserError

_MAX_GAMMA = 2**0.5 - 1  # the churn of one step never exceeds a factor sqrt(2) (EDM)


class HeunDraws(struct.PyTreeNode):
  """Every random number of one sampling; `churn` holds keys, or in a replay the noise itself."""

  start: Float[Array, "b h w c"]
  churn: Key | Float[Array, "s b h w c"]


@dataclasses.dataclass(frozen=True)
class Heun:
  """EDM's second-order sampler; fields as in `configs/base.py` under `teacher.sampling`.

  Attributes:
    num_steps: noise levels; the network is called `2 num_steps - 1` times.
    s_churn: fresh noise over the whole trajectory; 0 makes it deterministic.
    s_min, s_max: levels between which noise is added.
    s_noise: standard deviation of the added noise.
    guidance_scale: 1 is none.
  """

  image_shape: tuple[int, int, int]
  num_steps: int
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  s_churn: float = 0.0
  s_min: float = 0.0
  s_max: float = 1e6
  s_noise: float = 1.0
  guidance_scale: float = 1.0

  @property
  def name(self) -> str:
    """What a table calls it."""
    return "Heun, stochastic" if self.s_churn else "Heun"

  def at(self, clock: int) -> "Heun":
    """Itself: nothing warms up."""
    del clock
    return self

  def __post_init__(self):
    def require(ok: bool, name: str, wanted: str):
      if not ok:
        raise UserError(f"teacher.sampling.{name}={getattr(self, name)!r} must {wanted}")

    require(self.num_steps >= 1, "num_steps", "be 1 or more")
    require(self.sigma_min > 0, "sigma_min", "be positive")
    require(self.sigma_max > self.sigma_min, "sigma_max", f"lie above sigma_min={self.sigma_min}")
    require(self.rho > 0, "rho", "be positive")
    for name in ("s_churn", "s_min", "s_noise", "guidance_scale"):
      require(getattr(self, name) >= 0, name, "not be negative")
    require(self.s_max >= self.s_min, "s_max", f"not lie below s_min={self.s_min}")

  def levels(self) -> np.ndarray:
    """The levels visited, large first, without the final 0: float32 [num_steps]."""
    return karras_sigmas(self.num_steps, self.sigma_min, self.sigma_max, self.rho)[::-1].copy()

  def gammas(self) -> np.ndarray:
    """Relative rise of the level by churn at each step: float32 [num_steps]."""
    levels = self.levels()
    gamma = min(self.s_churn / self.num_steps, _MAX_GAMMA)
    inside = (levels >= self.s_min) & (levels <= self.s_max)
    return np.where(inside, gamma, 0).astype(np.float32)

  def draw(self, key: Key, batch_size: int) -> HeunDraws:
    """Draws for one batch."""
    start_key, churn_key = jax.random.split(key)
    start = jax.random.normal(start_key, (batch_size, *self.image_shape))
    return HeunDraws(start, jax.random.split(churn_key, self.num_steps))

  def sample(
    self, network: NetworkState, condition: Condition, key: Key
  ) -> Float[Array, "b h w c"]:
    """Images for a batch of conditions."""
    b = jax.tree.leaves(condition)[0].shape[0]
    return self.integrate(network, condition, self.draw(key, b))

  def integrate(
    self, network: NetworkState, condition: Condition, draws: HeunDraws
  ) -> Float[Array, "b h w c"]:
    """Follows the probability-flow ODE from noise to images; deterministic given the draws."""
    null_condition = network.null_fn(condition)

    def slope(xt, sigma):
      inputs = Noised(xt, jnp.full(len(xt), sigma))
      x0 = guided(network.predict, inputs, condition, null_condition, self.guidance_scale)
      return (xt - x0) / sigma

    def churned(xt, sigma, gamma, draw):
      if self.s_churn == 0:
        return xt, sigma
      added = self.s_noise * sigma * jnp.sqrt(gamma * (2 + gamma))  # of the rise in variance
      return xt + added * _normal(draw, xt.shape), sigma * (1 + gamma)

    def step(xt, inputs):
      sigma, following, gamma, draw = inputs
      xt, sigma = churned(xt, sigma, gamma, draw)
      first = slope(xt, sigma)
      second = slope(xt + (following - sigma) * first, following)
      return xt + (following - sigma) * (first + second) / 2, None

    levels, gammas = jnp.asarray(self.levels()), jnp.asarray(self.gammas())
    inputs = (levels[:-1], levels[1:], gammas[:-1], draws.churn[:-1])
    xt, _ = jax.lax.scan(step, levels[0] * draws.start, inputs)
    xt, sigma = churned(xt, levels[-1], gammas[-1], draws.churn[-1])
    return xt - sigma * slope(xt, sigma)


def _normal(draw: Key | Float[Array, "b h w c"], shape: tuple[int, ...]) -> Float[Array, "b h w c"]:
  if jnp.issubdtype(draw.dtype, jax.dtypes.prng_key):
    return jax.random.normal(draw, shape)
  return draw


@dataclasses.dataclass(frozen=True)
class FewStep:
  """DMD2's student: an image at every step, noised anew to the level of the next.

  The same code makes the samples of the training and those of the test.

  Attributes:
    sigmas: the levels of the steps, large first; one level is the one-step student.
    guidance_scale: 1 is none, as students are trained.
  """

  process: GaussianProcess
  image_shape: tuple[int, int, int]
  sigmas: tuple[float, ...] = (80.0,)
  guidance_scale: float = 1.0

  def __post_init__(self):
    sigmas = self.sigmas
    text = f"dmd2.student_sigmas={sigmas!r} must"
    if not sigmas or min(sigmas) <= 0:
      raise UserError(f"{text} be one or more positive noise levels")
    if any(a <= b for a, b in itertools.pairwise(sigmas)):
      raise UserError(f"{text} fall from step to step")
    largest = float(self.process.sigmas()[-1])
    if len(sigmas) > 1 and sigmas[0] < 0.999 * largest:
      raise UserError(f"{text} start at the noise end, {largest:.6g} or above")
    if self.guidance_scale < 0:
      raise UserError(f"sampling.guidance_scale={self.guidance_scale} must not be negative")

  @property
  def name(self) -> str:
    """What a table calls it."""
    return "one step" if self.num_steps == 1 else "few steps"

  @property
  def num_steps(self) -> int:
    """Network calls a sample."""
    return len(self.sigmas)

  def at(self, clock: int) -> "FewStep":
    """The sampler of a training's `clock`: always this one."""
    del clock
    return self

  def draw(self, key: Key, shape: tuple[int, ...]) -> Float[Array, "*a s b h w c"]:
    """Unit noise for every step: the start, then each re-noising; `shape` is (..., batch)."""
    return jax.random.normal(key, (*shape[:-1], self.num_steps, shape[-1], *self.image_shape))

  def sample(
    self, network: NetworkState, condition: Condition, key: Key
  ) -> Float[Array, "b h w c"]:
    """Images for a batch of conditions."""
    b = jax.tree.leaves(condition)[0].shape[0]
    inputs = self.simulate(network, condition, self.draw(key, (b,)), self.num_steps - 1)
    return self.predict(network, condition, inputs)

  def predict(
    self, network: NetworkState, condition: Condition, inputs: Noised
  ) -> Float[Array, "b h w c"]:
    """One step's image."""
    null_condition = network.null_fn(condition)
    return guided(network.predict, inputs, condition, null_condition, self.guidance_scale)

  def simulate(
    self,
    network: NetworkState,
    condition: Condition,
    noise: Float[Array, "s b h w c"],
    index: int | Int[Array, ""],
  ) -> Noised:
    """The input of step `index`, by the steps before it from pure noise (backward simulation)."""
    b, sigmas = noise.shape[1], jnp.asarray(self.sigmas, jnp.float32)
    start = self.process.start(noise[0], jnp.full(b, sigmas[0]))
    if self.num_steps == 1:
      return start

    def step(j, inputs):
      x0 = self.predict(network, condition, inputs)
      return add_noise(x0, noise[j + 1], jnp.full(b, sigmas[j + 1]))

    return jax.lax.fori_loop(0, index, step, start)
