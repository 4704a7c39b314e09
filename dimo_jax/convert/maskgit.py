"""MaskGIT and Di[M]O transformers: the published PyTorch key names to and from our linen tree."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dimo_jax.types import Params, UserError

# (published, ours, transposed) outside the blocks; torch keeps linear weights [out, in].
_STEM = (
  ("tok_emb.weight", "token_embedding", False),
  ("pos_emb", "position_embedding", False),
  ("bias", "output_bias", False),
  ("first_layer.0.weight", "first_norm_1/scale", False),
  ("first_layer.0.bias", "first_norm_1/bias", False),
  ("first_layer.2.weight", "first_dense_1/kernel", True),
  ("first_layer.2.bias", "first_dense_1/bias", False),
  ("first_layer.4.weight", "first_norm_2/scale", False),
  ("first_layer.4.bias", "first_norm_2/bias", False),
  ("first_layer.6.weight", "first_dense_2/kernel", True),
  ("first_layer.6.bias", "first_dense_2/bias", False),
  ("last_layer.0.weight", "last_norm_1/scale", False),
  ("last_layer.0.bias", "last_norm_1/bias", False),
  ("last_layer.2.weight", "last_dense/kernel", True),
  ("last_layer.2.bias", "last_dense/bias", False),
  ("last_layer.4.weight", "last_norm_2/scale", False),
  ("last_layer.4.bias", "last_norm_2/bias", False),
)
_BLOCK = (
  ("0.norm.weight", "attention_norm/scale", False),
  ("0.norm.bias", "attention_norm/bias", False),
  ("0.fn.mha.in_proj_weight", "attention_qkv/kernel", True),
  ("0.fn.mha.in_proj_bias", "attention_qkv/bias", False),
  ("0.fn.mha.out_proj.weight", "attention_out/kernel", True),
  ("0.fn.mha.out_proj.bias", "attention_out/bias", False),
  ("1.norm.weight", "mlp_norm/scale", False),
  ("1.norm.bias", "mlp_norm/bias", False),
  ("1.fn.net.0.weight", "mlp_in/kernel", True),
  ("1.fn.net.0.bias", "mlp_in/bias", False),
  ("1.fn.net.3.weight", "mlp_out/kernel", True),
  ("1.fn.net.3.bias", "mlp_out/bias", False),
)


def _rows(num_layers: int):
  yield from _STEM
  for i in range(num_layers):
    for theirs, ours, transposed in _BLOCK:
      yield f"transformer.layers.{i}.{theirs}", f"block_{i}/{ours}", transposed


def stack_blocks(params: Params, num_layers: int) -> Params:
  """The tree with `block_0 .. block_{n-1}` stacked under `blocks`, as `scan_layers` wants it."""
  rest = {k: v for k, v in params.items() if not k.startswith("block_")}
  blocks = [traverse_util.flatten_dict(params[f"block_{i}"]) for i in range(num_layers)]
  stacked = {k: jnp.stack([block[k] for block in blocks]) for k in blocks[0]}
  return rest | {"blocks": traverse_util.unflatten_dict(stacked)}


def unstack_blocks(params: Params) -> Params:
  """The inverse of `stack_blocks`."""
  rest = {k: v for k, v in params.items() if k != "blocks"}
  flat = traverse_util.flatten_dict(params["blocks"])
  num_layers = len(next(iter(flat.values())))
  for i in range(num_layers):
    rest[f"block_{i}"] = traverse_util.unflatten_dict({k: v[i] for k, v in flat.items()})
  return rest


def from_published(state_dict: Mapping[str, np.ndarray], *, scan_layers: bool = False) -> Params:
  """The linen parameters of `MaskTransformer` from a state dict with the published key names.

  Raises:
    UserError: keys are missing or unexpected; all of them are listed.
  """
  num_layers = sum(key.endswith(".0.fn.mha.in_proj_weight") for key in state_dict)
  rows = list(_rows(num_layers))
  missing = [key for key, _, _ in rows if key not in state_dict]
  unexpected = sorted(set(state_dict) - {key for key, _, _ in rows})
  if missing or unexpected or not num_layers:
    raise UserError(
      f"not a MaskGIT transformer: missing keys {missing or 'none'},"
      f" unexpected keys {unexpected or 'none'}"
    )
  flat = {}
  for theirs, ours, transposed in rows:
    value = np.asarray(state_dict[theirs])
    value = value[0] if theirs == "pos_emb" else value
    flat[ours] = jnp.asarray(value.T if transposed else value)
  params = traverse_util.unflatten_dict(flat, sep="/")
  return stack_blocks(params, num_layers) if scan_layers else params


def to_published(params: Params) -> dict[str, np.ndarray]:
  """The state dict with the published key names and layouts of `MaskTransformer` parameters."""
  params = unstack_blocks(params) if "blocks" in params else params
  flat = traverse_util.flatten_dict(params, sep="/")
  num_layers = sum(key.endswith("attention_qkv/kernel") for key in flat)
  state_dict = {}
  for theirs, ours, transposed in _rows(num_layers):
    value = np.asarray(flat[ours])
    value = value[None] if theirs == "pos_emb" else value
    state_dict[theirs] = np.ascontiguousarray(value.T if transposed else value)
  return state_dict
