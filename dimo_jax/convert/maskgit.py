"""MaskGIT and Di[M]O transformers: the published PyTorch key names to and from our linen tree."""

from collections.abc import Iterator, Mapping

import numpy as np
from flax import traverse_util

from dimo_jax.convert import keys
from dimo_jax.types import Params

# (published, ours, our shape); torch keeps linear weights [out, in]. Sizes: d and m the widths of
# the stream and of the blocks' hidden layer, n positions, v rows of the embedding.
_STEM = (
  ("tok_emb.weight", "token_embedding", "v d"),
  ("pos_emb", "position_embedding", "n d"),
  ("bias", "output_bias", "n v"),
  ("first_layer.0.weight", "first_norm_1/scale", "d"),
  ("first_layer.0.bias", "first_norm_1/bias", "d"),
  ("first_layer.2.weight", "first_dense_1/kernel", "d d"),
  ("first_layer.2.bias", "first_dense_1/bias", "d"),
  ("first_layer.4.weight", "first_norm_2/scale", "d"),
  ("first_layer.4.bias", "first_norm_2/bias", "d"),
  ("first_layer.6.weight", "first_dense_2/kernel", "d d"),
  ("first_layer.6.bias", "first_dense_2/bias", "d"),
  ("last_layer.0.weight", "last_norm_1/scale", "d"),
  ("last_layer.0.bias", "last_norm_1/bias", "d"),
  ("last_layer.2.weight", "last_dense/kernel", "d d"),
  ("last_layer.2.bias", "last_dense/bias", "d"),
  ("last_layer.4.weight", "last_norm_2/scale", "d"),
  ("last_layer.4.bias", "last_norm_2/bias", "d"),
)
_BLOCK = (
  ("0.norm.weight", "attention_norm/scale", "d"),
  ("0.norm.bias", "attention_norm/bias", "d"),
  ("0.fn.mha.in_proj_weight", "attention_qkv/kernel", "d 3d"),
  ("0.fn.mha.in_proj_bias", "attention_qkv/bias", "3d"),
  ("0.fn.mha.out_proj.weight", "attention_out/kernel", "d d"),
  ("0.fn.mha.out_proj.bias", "attention_out/bias", "d"),
  ("1.norm.weight", "mlp_norm/scale", "d"),
  ("1.norm.bias", "mlp_norm/bias", "d"),
  ("1.fn.net.0.weight", "mlp_in/kernel", "d m"),
  ("1.fn.net.0.bias", "mlp_in/bias", "m"),
  ("1.fn.net.3.weight", "mlp_out/kernel", "m d"),
  ("1.fn.net.3.bias", "mlp_out/bias", "d"),
)
_LAYER = "transformer.layers.{}.{}"


def _rows(num_layers: int) -> Iterator[tuple[str, str, str]]:
  yield from _STEM
  for i in range(num_layers):
    for theirs, ours, shape in _BLOCK:
      yield _LAYER.format(i, theirs), f"block_{i}/{ours}", shape


def _transposed(ours: str) -> bool:
  return ours.endswith("/kernel")


def stack_blocks(params: Params, num_layers: int) -> Params:
  """The tree with `block_0 .. block_{n-1}` stacked under `blocks`, as `scan_layers` wants it."""
  rest = {k: v for k, v in params.items() if not k.startswith("block_")}
  blocks = [traverse_util.flatten_dict(params[f"block_{i}"]) for i in range(num_layers)]
  stacked = {k: np.stack([block[k] for block in blocks]) for k in blocks[0]}
  return rest | {"blocks": traverse_util.unflatten_dict(stacked)}


def unstack_blocks(params: Params) -> Params:
  """The inverse of `stack_blocks`."""
  rest = {k: v for k, v in params.items() if k != "blocks"}
  flat = traverse_util.flatten_dict(params["blocks"])
  num_layers = len(next(iter(flat.values())))
  for i in range(num_layers):
    rest[f"block_{i}"] = traverse_util.unflatten_dict({k: v[i] for k, v in flat.items()})
  return rest


def arrange(params: Params, *, scan_layers: bool) -> Params:
  """The tree with its blocks stacked, or each by itself; a tree without blocks as it is."""
  num_layers = sum(name.startswith("block_") for name in params)
  if scan_layers and num_layers:
    return stack_blocks(params, num_layers)
  return unstack_blocks(params) if not scan_layers and "blocks" in params else params


def sizes(shapes: keys.Shapes) -> dict[str, int]:
  """What the shapes of a published state dict say of `MaskTransformer`.

  Returns:
    hidden_dim, num_layers, mlp_dim, num_tokens, and vocabulary: codes, mask id, classes and null
    class together. No shape depends on the number of heads. 0 where a tensor is missing.
  """
  num_layers = 0
  while _LAYER.format(num_layers, "0.fn.mha.in_proj_weight") in shapes:
    num_layers += 1

  def size(name: str, dimension: int, rank: int) -> int:
    return shapes[name][dimension] if len(shapes.get(name, ())) == rank else 0

  return {
    "hidden_dim": size("tok_emb.weight", 1, 2),
    "num_layers": num_layers,
    "mlp_dim": size(_LAYER.format(0, "1.fn.net.0.weight"), 0, 2),
    "num_tokens": max(0, size("pos_emb", 1, 3) - 1),
    "vocabulary": size("tok_emb.weight", 0, 2),
  }


def from_published(state_dict: Mapping[str, np.ndarray], *, scan_layers: bool = False) -> Params:
  """The linen parameters of `MaskTransformer` from a state dict with the published key names.

  Returns:
    float32 arrays on the host, which share no memory with `state_dict`.

  Raises:
    UserError: keys are missing, unexpected or misshapen; they are listed.
  """
  shapes = keys.shapes_of(state_dict)
  found = sizes(shapes)
  num_layers = found["num_layers"]
  d = found["hidden_dim"]
  dims = {"d": d, "3d": 3 * d, "m": found["mlp_dim"]}
  dims |= {"n": found["num_tokens"] + 1, "v": found["vocabulary"]}
  ours_shapes = {
    theirs: tuple(dims[name] for name in shape.split())
    for theirs, _, shape in _rows(max(1, num_layers))
  }
  expected = {
    theirs: ours_shapes[theirs][::-1] if _transposed(ours) else ours_shapes[theirs]
    for theirs, ours, _ in _rows(max(1, num_layers))
  }
  expected["pos_emb"] = (1, *expected["pos_emb"])
  keys.check(shapes, expected, "a MaskGIT transformer")

  def take(theirs: str, ours: str) -> np.ndarray:
    value = state_dict[theirs]
    value = value.T if _transposed(ours) else value
    return np.array(value, np.float32, order="C").reshape(ours_shapes[theirs])

  flat = {ours: take(theirs, ours) for theirs, ours, _ in _STEM}
  for theirs, ours, _ in _BLOCK:
    names = [_LAYER.format(i, theirs) for i in range(num_layers)]
    if scan_layers:
      stacked = flat[f"blocks/{ours}"] = np.empty(
        (num_layers, *ours_shapes[names[0]]), np.float32
      )  # filled one by one: the tensors are never all there twice
      for i, name in enumerate(names):
        stacked[i] = take(name, ours)
    else:
      flat |= {f"block_{i}/{ours}": take(name, ours) for i, name in enumerate(names)}
  return traverse_util.unflatten_dict(flat, sep="/")


def to_published(params: Params) -> dict[str, np.ndarray]:
  """The state dict with the published key names and layouts of `MaskTransformer` parameters."""
  params = unstack_blocks(params) if "blocks" in params else params
  flat = traverse_util.flatten_dict(params, sep="/")
  num_layers = sum(key.endswith("attention_qkv/kernel") for key in flat)
  state_dict = {}
  for theirs, ours, _ in _rows(num_layers):
    value = np.asarray(flat[ours])
    value = value[None] if theirs == "pos_emb" else value
    state_dict[theirs] = np.ascontiguousarray(value.T if _transposed(ours) else value)
  return state_dict
