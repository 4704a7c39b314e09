"""Denoisers: a network between the input and output scalings of EDM's table 1.

Source: arXiv:2206.00364, section 5 and table 1.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from dimo_jax.processes.gaussian import Preconditioning, preconditioning
from dimo_jax.types import Array, Float, Int

Output = Literal["x0", "bottleneck", "both"]

# The variance-preserving process that VPPrecond's networks were trained on.
_BETA_RANGE, _BETA_MIN = 19.9, 0.1
_NUM_TIMESTEPS = 1000


def vp_sigma(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
  """Noise level of the variance-preserving process at time t in [0, 1]."""
  return jnp.sqrt(jnp.expm1(0.5 * _BETA_RANGE * t**2 + _BETA_MIN * t))


def vp_time(sigma: Float[Array, "*n"]) -> Float[Array, "*n"]:
  """The inverse of `vp_sigma`."""
  # (sqrt(b^2 + y) - b) / r, without the difference of two nearly equal numbers
  y = 2 * _BETA_RANGE * jnp.log1p(sigma**2)
  return y / (_BETA_RANGE * (jnp.sqrt(_BETA_MIN**2 + y) + _BETA_MIN))


class _Precond(nn.Module):
  """What both denoisers share.

  Attributes:
    model: an unbound network, `ADM`, `SongUNet` or `DenoisingMLP`.
  """

  model: nn.Module

  def scalings(self, sigma: Float[Array, " b"]) -> Preconditioning:
    """The scales at each noise level."""
    raise NotImplementedError

  @nn.compact
  def __call__(
    self,
    xt: Float[Array, "b h w c"],
    sigma: Float[Array, " b"],
    class_labels: Int[Array, " b"] | Float[Array, "b k"] | None = None,
    augment_labels: Float[Array, "b a"] | None = None,
    *,
    output: Output = "x0",
    deterministic: bool = True,
  ) -> Array | tuple[Array, Array]:
    """Denoises.

    Args:
      xt: image plus sigma times standard normal noise.
      sigma: noise level of each image.
      class_labels: class ids, `label_dim` standing for no class; or one-hot rows, zeros for no
        class; or None for no class.
      augment_labels: what was done to each image; None for nothing.
      output: "x0", "bottleneck" (the decoder is not run and needs no parameters), or "both".
      deterministic: dropout off.

    Returns:
      The denoised images [b, h, w, c], the encoder's output [b, h2, w2, c2] as the network has it
      (not preconditioned), or both; float32.
    """
    c_skip, c_out, c_in, c_noise = self.scalings(sigma.astype(jnp.float32))
    num_classes = self.model.label_dim
    if class_labels is None:
      class_labels = jnp.zeros((len(xt), num_classes))
    elif class_labels.ndim == 1:
      class_labels = jax.nn.one_hot(class_labels, num_classes)  # zeros for the id `num_classes`
    xt = xt.astype(jnp.float32)
    prediction, bottleneck = self.model(
      (c_in[:, None, None, None] * xt).astype(self.model.dtype),
      c_noise,
      class_labels,
      augment_labels,
      decode=output != "bottleneck",
      deterministic=deterministic,
    )
    bottleneck = bottleneck.astype(jnp.float32)
    if output == "bottleneck":
      return bottleneck
    x0 = c_skip[:, None, None, None] * xt + c_out[:, None, None, None] * prediction.astype(
      jnp.float32
    )
    return (x0, bottleneck) if output == "both" else x0


class EDMPrecond(_Precond):
  """EDM's own scaling: unit variance of the network's input and target.

  Attributes:
    sigma_data: standard deviation of the images.
  """

  sigma_data: float = 0.5

  def scalings(self, sigma: Float[Array, " b"]) -> Preconditioning:
    """The scales at each noise level."""
    return preconditioning(sigma, self.sigma_data)


class VPPrecond(_Precond):
  """The scaling of the variance-preserving networks: they predict noise, at times 0 to 999."""

  def scalings(self, sigma: Float[Array, " b"]) -> Preconditioning:
    """The scales at each noise level."""
    c_in = 1 / jnp.sqrt(sigma**2 + 1)
    return Preconditioning(
      jnp.ones_like(sigma), -sigma, c_in, (_NUM_TIMESTEPS - 1) * vp_time(sigma)
    )
