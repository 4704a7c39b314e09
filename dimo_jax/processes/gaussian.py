"""The Gaussian process: noise levels, preconditioning, loss weights, predictions.

One coordinate system serves every family: `xt = x0 + sigma n`, sigma being noise over signal. A
variance-preserving network sees `xt / sqrt(1 + sigma^2)`, a flow network `xt / (1 + sigma)`; in
sigma nothing cancels at either end, as `1 - alphas_cumprod` does in float32.

Sources: EDM (arXiv:2206.00364); DDPM (arXiv:2006.11239); v-prediction (arXiv:2202.00512).
"""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import struct

from dimo_jax.types import Array, Float, UserError, suggest

PREDICTIONS = ("x0", "epsilon", "v", "flow")
VP_SCHEDULES = ("linear", "scaled_linear", "cosine")
_COSINE_OFFSET, _COSINE_MAX_BETA = 0.008, 0.999  # arXiv:2102.09672


class Noised(struct.PyTreeNode):
  """What a denoiser sees: `xt = x0 + sigma n`."""

  xt: Float[Array, "b h w c"]
  sigma: Float[Array, " b"]


def per_sample(values: Float[Array, " b"], like: Float[Array, " b *d"]) -> Float[Array, " b *ones"]:
  """One number per sample, in a shape that broadcasts over `like`."""
  return values.reshape(values.shape + (1,) * (like.ndim - 1))


def add_noise(
  x0: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], sigma: Float[Array, " b"]
) -> Noised:
  """`x0 + sigma noise`, with its level."""
  return Noised(x0 + per_sample(sigma, x0) * noise, sigma)


class Preconditioning(NamedTuple):
  """EDM's constants at each level: `D = c_skip xt + c_out F(c_in xt, c_noise)`."""

  c_skip: Float[Array, "*b"]
  c_out: Float[Array, "*b"]
  c_in: Float[Array, "*b"]
  c_noise: Float[Array, "*b"]


def preconditioning(sigma: Float[Array, "*b"], sigma_data: float = 0.5) -> Preconditioning:
  """Skip, output and input scales and the noise input of an EDM network (its table 1)."""
  total = jnp.square(sigma) + sigma_data**2
  return Preconditioning(
    c_skip=sigma_data**2 / total,
    c_out=sigma * sigma_data / jnp.sqrt(total),
    c_in=1 / jnp.sqrt(total),
    c_noise=jnp.log(sigma) / 4,
  )


def log_normal_sigma(
  normal: Float[Array, "*b"], mean: float = -1.2, std: float = 1.2
) -> Float[Array, "*b"]:
  """EDM's pre-training noise: `ln sigma ~ N(mean, std^2)` from a standard normal."""
  return jnp.exp(mean + std * normal)


def karras_sigmas(num: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
  """Levels evenly spaced in `sigma^(1/rho)`, small first: float32 [num]; a single one is the max.

  Source: EDM, equation 5, as DMD2 tabulates it.
  """
  ramp = np.linspace(0, 1, num) if num > 1 else np.ones(1)
  low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
  return ((low + ramp * (high - low)) ** rho).astype(np.float32)


def alphas_cumprod(num: int, schedule: str, beta_start: float, beta_end: float) -> np.ndarray:
  """Signal power of a variance-preserving table, least noise first: float64 [num].

  "cosine" ignores the betas. Sources: DDPM (linear), latent diffusion (scaled_linear), improved
  DDPM (cosine).
  """
  if schedule == "linear":
    betas = np.linspace(beta_start, beta_end, num)
  elif schedule == "scaled_linear":
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num) ** 2
  else:
    t = np.arange(num + 1) / num
    power = np.cos((t + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * np.pi / 2) ** 2
    betas = np.minimum(1 - power[1:] / power[:-1], _COSINE_MAX_BETA)
  return np.cumprod(1 - betas)


class X0AndNoise(NamedTuple):
  """The two ends of a prediction."""

  x0: Float[Array, "b h w c"]
  noise: Float[Array, "b h w c"]


def x0_and_noise(output: Float[Array, "b h w c"], inputs: Noised, prediction: str) -> X0AndNoise:
  """Image and noise that a network's output stands for, in float32, each by its shortest way.

  Args:
    output: x0; epsilon, the noise; v = alpha noise - sigma alpha x0, alpha = 1/sqrt(1 + sigma^2);
      or flow = noise - x0, whatever the path.
    prediction: one of PREDICTIONS.
  """
  xt, output = inputs.xt.astype(jnp.float32), output.astype(jnp.float32)
  sigma = per_sample(inputs.sigma.astype(jnp.float32), xt)
  if prediction == "x0":
    return X0AndNoise(output, (xt - output) / sigma)
  if prediction == "epsilon":
    return X0AndNoise(xt - sigma * output, output)
  if prediction == "v":
    alpha = 1 / jnp.sqrt(1 + jnp.square(sigma))
    x0 = alpha * (alpha * xt - sigma * output)
    return X0AndNoise(x0, alpha * (sigma * alpha * xt + output))
  if prediction == "flow":
    return X0AndNoise((xt - sigma * output) / (1 + sigma), (xt + output) / (1 + sigma))
  raise UserError(f"prediction={prediction!r} is unknown{suggest(prediction, PREDICTIONS)}")


def as_prediction(
  ends: X0AndNoise, sigma: Float[Array, " b"], prediction: str
) -> Float[Array, "b h w c"]:
  """The output a network of that kind gives for this image and noise: undoes `x0_and_noise`."""
  if prediction == "x0":
    return ends.x0
  if prediction == "epsilon":
    return ends.noise
  if prediction == "v":
    sigma = per_sample(sigma, ends.x0)
    return (ends.noise - sigma * ends.x0) / jnp.sqrt(1 + jnp.square(sigma))
  if prediction == "flow":
    return ends.noise - ends.x0
  raise UserError(f"prediction={prediction!r} is unknown{suggest(prediction, PREDICTIONS)}")


@runtime_checkable
class GaussianProcess(Protocol):
  """A table of noise levels and what its networks were trained with."""

  @property
  def num_levels(self) -> int:
    """Length of the table."""
    ...

  def sigmas(self) -> np.ndarray:
    """The levels, small first, float32 [num_levels]."""
    ...

  def start(self, noise: Float[Array, "b h w c"], sigma: Float[Array, " b"]) -> Noised:
    """Unit noise as the input of the first step, at level sigma: no image in it."""
    ...

  def loss_weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
    """Weight of the squared error of x0 in the denoising loss of the family."""
    ...

  def position(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
    """Where a level lies in the range, 0 to 1, for statistics by noise level."""
    ...


@dataclasses.dataclass(frozen=True)
class Edm:
  """EDM's process over the Karras table; fields as in `configs/base.py` under `process`."""

  num_levels: int = 1000
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  sigma_data: float = 0.5

  def __post_init__(self):
    def require(ok: bool, name: str, wanted: str):
      if not ok:
        raise UserError(f"process.{name}={getattr(self, name)!r} must {wanted}")

    require(self.num_levels >= 2, "num_levels", "be 2 or more")
    require(self.sigma_min > 0, "sigma_min", "be positive")
    require(self.sigma_max > self.sigma_min, "sigma_max", f"lie above sigma_min={self.sigma_min}")
    require(self.rho > 0, "rho", "be positive")
    require(self.sigma_data > 0, "sigma_data", "be positive")

  def sigmas(self) -> np.ndarray:
    """The Karras table, small first."""
    return karras_sigmas(self.num_levels, self.sigma_min, self.sigma_max, self.rho)

  def start(self, noise: Float[Array, "b h w c"], sigma: Float[Array, " b"]) -> Noised:
    """`sigma noise`."""
    return Noised(per_sample(sigma, noise) * noise, sigma)

  def loss_weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
    """`1/sigma^2 + 1/sigma_data^2`, which is `1 / c_out^2`."""
    return 1 / jnp.square(sigma) + 1 / self.sigma_data**2

  def position(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
    """Linear in sigma, as f-distill bins it."""
    return (sigma - self.sigma_min) / (self.sigma_max - self.sigma_min)


@dataclasses.dataclass(frozen=True)
class VariancePreserving:
  """A DDPM table with its prediction type; fields as in `configs/base.py` under `process`."""

  num_levels: int = 1000
  schedule: str = "scaled_linear"
  beta_start: float = 0.00085
  beta_end: float = 0.012
  prediction: str = "epsilon"

  def __post_init__(self):
    for name, known in (("schedule", VP_SCHEDULES), ("prediction", PREDICTIONS)):
      if getattr(self, name) not in known:
        value = getattr(self, name)
        raise UserError(f"process.{name}={value!r} is unknown{suggest(value, known)}")
    if self.num_levels < 2:
      raise UserError(f"process.num_levels={self.num_levels} must be 2 or more")
    if not 0 < self.beta_start < 1:
      raise UserError(f"process.beta_start={self.beta_start} must lie in (0, 1)")
    if not self.beta_start <= self.beta_end < 1:
      raise UserError(f"process.beta_end={self.beta_end} must lie in [beta_start, 1)")

  def sigmas(self) -> np.ndarray:
    """`sqrt((1 - abar) / abar)`, least noise first."""
    power = alphas_cumprod(self.num_levels, self.schedule, self.beta_start, self.beta_end)
    return np.sqrt((1 - power) / power).astype(np.float32)

  def start(self, noise: Float[Array, "b h w c"], sigma: Float[Array, " b"]) -> Noised:
    """`sqrt(1 + sigma^2) noise`: the network sees unit noise at whatever level."""
    return Noised(per_sample(jnp.sqrt(1 + jnp.square(sigma)), noise) * noise, sigma)

  def loss_weight(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
    """What makes the weighted error of x0 the plain squared error of the predicted quantity."""
    weights = {
      "x0": lambda: jnp.ones_like(sigma),
      "epsilon": lambda: 1 / jnp.square(sigma),
      "v": lambda: 1 + 1 / jnp.square(sigma),
      "flow": lambda: jnp.square(1 + 1 / sigma),
    }
    return weights[self.prediction]()

  def position(self, sigma: Float[Array, " b"]) -> Float[Array, " b"]:
    """Linear in the timestep."""
    index = jnp.searchsorted(jnp.asarray(self.sigmas()), sigma)
    return index.astype(jnp.float32) / (self.num_levels - 1)


PROCESSES: dict[str, type[Edm] | type[VariancePreserving]] = {
  "edm": Edm,
  "variance_preserving": VariancePreserving,
}
