"""Adversarial terms on a denoiser's features, and the f-divergence weights that a critic allows.

The critic's logit is the log density ratio of real and generated data at a noise level. Sources:
DMD2 (arXiv:2405.14867), diffusion-GAN (arXiv:2206.02262), f-distill (arXiv:2502.15681), the
approximate R1 penalty of arXiv:2501.08316.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dimo_jax.types import Array, Float

_MAX_LOGIT = 10.0  # before the exponential (f-distill)
_MIN_RATIO, _MAX_RATIO = 0.1, 20.0  # of the density ratio (f-distill)
NUM_RATIO_BINS = 10  # of the noise level (f-distill)
_FLOOR = 1e-6  # of what a mean is divided by

# Weight h(r) of the matching gradient, by the divergence it makes of reverse KL; r is the density
# of real over generated data (f-distill, table 1).
F_DIVERGENCES: dict[str, Callable[[Float[Array, " b"]], Float[Array, " b"]]] = {
  "reverse_kl": jnp.ones_like,
  "forward_kl": lambda r: r,
  "jensen_shannon": lambda r: r / (1 + r),
  "squared_hellinger": jnp.sqrt,
  "jeffreys": lambda r: 1 + r,
  "softened_reverse_kl": lambda r: 1 / (1 + r),
  "neyman": lambda r: 1 / r,
}


def generator_loss(fake_logits: Float[Array, " b"]) -> Float[Array, ""]:
  """`softplus(-D(fake))`, mean: the non-saturating loss."""
  return jnp.mean(jax.nn.softplus(-fake_logits))


def critic_loss(
  real_logits: Float[Array, " b"], fake_logits: Float[Array, " b"]
) -> Float[Array, ""]:
  """`softplus(D(fake)) + softplus(-D(real))`, mean."""
  return jnp.mean(jax.nn.softplus(fake_logits)) + jnp.mean(jax.nn.softplus(-real_logits))


def approximate_r1(
  logits: Float[Array, " b"], perturbed_logits: Float[Array, " b"]
) -> Float[Array, ""]:
  """Mean squared change of the logit under a small perturbation of its input.

  With a perturbation alpha n, n standard normal, its mean tends to alpha^2 times the squared norm
  of the gradient: R1 without second derivatives.
  """
  return jnp.mean(jnp.square(logits - perturbed_logits))


def initial_ratio_bins() -> Float[Array, " k"]:
  """Running means of the density ratio by noise level, before any was seen."""
  return jnp.ones(NUM_RATIO_BINS, jnp.float32)


def divergence_weights(
  divergence: str,
  logits: Float[Array, " b"],
  position: Float[Array, " b"],
  bins: Float[Array, " k"],
  *,
  normalize: bool,
  rate: float,
) -> tuple[Float[Array, " b"], Float[Array, " k"]]:
  """Weights of the matching gradient, of mean one over the batch, and the bins after this batch.

  Args:
    divergence: a key of F_DIVERGENCES.
    logits: of the critic, at the noised samples that the gradient is taken at.
    position: of their noise levels in the range, 0 to 1.
    bins: running mean of the ratio in equal bins of the position.
    normalize: divide the ratio by its bin's mean, updated first.
    rate: of the running mean, the weight of what was; 0 is this batch's mean.
  """
  logits = jax.lax.stop_gradient(logits.astype(jnp.float32))
  ratio = jnp.exp(jnp.clip(logits, -_MAX_LOGIT, _MAX_LOGIT))
  ratio = jnp.clip(ratio, _MIN_RATIO, _MAX_RATIO)
  if normalize:
    num = len(bins)
    index = jnp.clip(jnp.floor(position * num), 0, num - 1).astype(jnp.int32)
    member = jax.nn.one_hot(index, num)
    count = member.sum(axis=0)
    mean = ratio @ member / jnp.maximum(count, 1)
    bins = jnp.where(count > 0, rate * bins + (1 - rate) * mean, bins)
    ratio = ratio / jnp.maximum(bins[index], _FLOOR)
  weights = F_DIVERGENCES[divergence](ratio)
  return weights / jnp.maximum(jnp.mean(weights), _FLOOR), bins
