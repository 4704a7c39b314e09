"""The masked discrete teacher: a MaskTransformer over the tokens of a tokenizer."""

import dataclasses
from typing import cast

from dimo_jax.models.mask_transformer import MaskTransformer
from dimo_jax.models.remat import REMAT
from dimo_jax.teachers.network import MaskedNetwork
from dimo_jax.types import Array, Condition, Float, Int, Key, Params, UserError, choose


@dataclasses.dataclass(frozen=True)
class MaskedTeacher(MaskedNetwork):
  """Network and process constants of a masked teacher; parameters live in train states."""

  network: MaskTransformer

  def __post_init__(self):
    net = self.network
    if net.num_heads < 1 or net.hidden_dim % net.num_heads:
      raise UserError(
        f"model.num_heads={net.num_heads} must divide model.hidden_dim={net.hidden_dim}"
      )
    for name in ("num_layers", "hidden_dim", "mlp_dim"):
      if getattr(net, name) < 1:
        raise UserError(f"model.{name}={getattr(net, name)} must be 1 or more")
    choose(dict.fromkeys(REMAT), net.remat, "model.remat")
    if not 0 <= net.dropout < 1:
      raise UserError(f"model.dropout={net.dropout} must lie in [0, 1)")

  @property
  def forward_flops(self) -> float:
    """Floating-point operations of one sample's forward pass, scanned layers counted."""
    return float(self.network.forward_flops)

  @property
  def num_tokens(self) -> int:
    """Tokens of a grid."""
    return self.network.num_tokens

  @property
  def codebook_size(self) -> int:
    """Number of codes."""
    return self.network.codebook_size

  @property
  def null_class(self) -> int:
    """The class id that stands for none: the first after the classes."""
    return self.network.num_classes

  def apply(
    self,
    params: Params,
    tokens: Int[Array, "b l"],
    condition: Condition,
    *,
    noise: Key | Float[Array, "b l d"] | None = None,
    sigma: Float[Array, ""] | float = 0.0,
    dropout_key: Key | None = None,
  ) -> Float[Array, "b l v"]:
    """Logits of a token grid; dropout is active where its key is given."""
    logits = self.network.apply(
      {"params": params},
      tokens,
      condition["class_id"],
      noise=noise,
      sigma=sigma,
      deterministic=dropout_key is None,
      rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return cast(Array, logits)  # not (logits, state): nothing is mutable
