"""The GAN head of DMD2: one logit from a denoiser's bottleneck features."""

import flax.linen as nn
import jax.numpy as jnp

from dimo_jax.types import Array, Float, UserError

_FINAL_SIZE = 4  # features are halved until they are no larger, then taken in at once
_NORM_EPSILON = 1e-5


class Critic(nn.Module):
  """Halving 4x4 convolutions down to 4x4, one over all that is left, one logit; in float32.

  On an 8x8 bottleneck this is the published head of ImageNet-64 and SD 1.5, on 32x32 that of SDXL.
  Large logits say "real". Source: DMD2, arXiv:2405.14867, and its release.

  Attributes:
    num_groups: of the group norms; must divide the channels.
  """

  num_groups: int = 32

  @nn.compact
  def __call__(self, features: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """Logits of a batch."""
    channels = features.shape[-1]
    if self.num_groups < 1 or channels % self.num_groups:
      raise UserError(
        f"dmd2.critic_groups={self.num_groups} must divide the {channels} channels of the features"
      )
    x = features.astype(jnp.float32)
    layer = 0
    while True:
      last = max(x.shape[1:3]) <= _FINAL_SIZE
      name = f"conv_{layer}"
      if last:
        x = nn.Conv(channels, x.shape[1:3], padding="VALID", name=name)(x)
      else:
        x = nn.Conv(channels, (4, 4), 2, padding=1, name=name)(x)
      x = nn.GroupNorm(self.num_groups, epsilon=_NORM_EPSILON, name=f"norm_{layer}")(x)
      x = nn.silu(x)
      layer += 1
      if last:
        return nn.Conv(1, (1, 1), name="logit")(x)[:, 0, 0, 0]
