"""What a block keeps for its backward pass, by name: less memory for more compute."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

# To what `jax.checkpoint` may keep of a block besides its inputs; the rest is computed again.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots_saveable": jax.checkpoint_policies.dots_saveable,
  "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
REMAT = ("none", *REMAT_POLICIES)


def rematerialised(
  block: type[nn.Module], remat: str, static_argnum: int, *, in_scan: bool = False
) -> type[nn.Module]:
  """The block under a policy of REMAT; "none" keeps what the derivative asks for.

  Args:
    static_argnum: which of `__call__`'s arguments is no array, `self` being 0.
    in_scan: whether it is the body of a loop, in which XLA cannot undo the policy.
  """
  if remat == "none":
    return block
  options: dict[str, Any] = {"prevent_cse": not in_scan, "static_argnums": (static_argnum,)}
  return nn.remat(block, policy=REMAT_POLICIES[remat], **options)
