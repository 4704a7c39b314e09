"""EDM networks: the published PyTorch key names to and from our linen tree."""

import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from dimo_jax.types import Params, UserError

# Our linear layers that are 1x1 convolutions in the published networks.
_POINTWISE = re.compile(r"[/_](skip|qkv|proj)/kernel$")


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
  """Paths and shapes of a preconditioned network's parameters."""
  model = network.model
  image = jnp.zeros((1, model.img_resolution, model.img_resolution, model.img_channels))
  augment = jnp.zeros((1, model.augment_dim)) if model.augment_dim else None
  tree = jax.eval_shape(network.init, jax.random.key(0), image, jnp.ones(1), None, augment)
  flat = traverse_util.flatten_dict(tree["params"], sep="/")
  return {path: leaf.shape for path, leaf in flat.items()}


def _published(path: str) -> str:
  """`model/enc_8x8_block0/conv0/kernel` -> `model.enc.8x8_block0.conv0.weight`."""
  path = re.sub(r"/(kernel|scale)$", "/weight", path)
  return re.sub(r"^model/(enc|dec)_", r"model/\1/", path).replace("/", ".")


def _filters(paths: Iterable[str]) -> set[str]:
  """The names under which published files repeat the resampling filter."""
  layers = sorted({path.split("/")[1] for path in paths})
  norms = [name for name in layers if name.endswith("_aux_norm")]
  lowest = min(norms, key=_resolution, default=None)
  names = []
  for name in layers:
    if re.search(r"\d_(up|down)$", name):
      names += [f"{name}/conv0", f"{name}/skip"]
    elif name.endswith("_aux_residual"):
      names.append(name)
    elif name.endswith("_aux_skip"):
      names.append(name.replace("_aux_skip", "_aux_down"))
    elif name in norms and name != lowest:
      names.append(name.replace("_aux_norm", "_aux_up"))
  return {_published(f"model/{name}/resample_filter") for name in names}


def _resolution(name: str) -> int:
  return int(name.split("_")[1].partition("x")[0])


def _filter(network: nn.Module) -> np.ndarray:
  """The value of those buffers."""
  taps = np.asarray(getattr(network.model, "resample_filter", (1, 1)), np.float32)
  return (np.outer(taps, taps) / taps.sum() ** 2)[None, None]


def _to_ours(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Convolutions OIHW -> HWIO, or [in, out] where `shape` is a linear layer's; linear [in, out]."""
  if value.ndim == 4 and len(shape) == 2 and value.shape[2:] == (1, 1):
    value = value[:, :, 0, 0]
  return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _to_theirs(path: str, value: np.ndarray) -> np.ndarray:
  value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
  return value[:, :, None, None] if _POINTWISE.search(path) else value


def from_published(state_dict: Mapping[str, np.ndarray], network: nn.Module) -> Params:
  """The linen parameters of a preconditioned network from a state dict with the published names.

  Raises:
    UserError: keys are missing or unexpected, all of them listed; or a shape or a resampling
      filter is another network's.
  """
  shapes = _shapes(network)
  names, filters = {_published(path): path for path in shapes}, _filters(shapes)
  missing = sorted((set(names) | filters) - set(state_dict))
  unexpected = sorted(set(state_dict) - set(names) - filters)
  if missing or unexpected:
    raise UserError(
      f"not this {type(network.model).__name__}: missing keys {missing or 'none'},"
      f" unexpected keys {unexpected or 'none'}"
    )
  wanted = _filter(network)
  for name in sorted(filters):
    if not np.array_equal(state_dict[name], wanted):
      raise UserError(f"{name} is not the filter of model.resample_filter")
  flat = {}
  for name, path in names.items():
    value = _to_ours(np.asarray(state_dict[name]), shapes[path])
    if value.shape != shapes[path]:
      raise UserError(
        f"{name} gives {path} the shape {value.shape}, the network needs {shapes[path]}"
      )
    flat[path] = jnp.asarray(value)
  return traverse_util.unflatten_dict(flat, sep="/")


def to_published(params: Params, network: nn.Module) -> dict[str, np.ndarray]:
  """The state dict with the published key names and layouts of a network's parameters."""
  flat = traverse_util.flatten_dict(params, sep="/")
  state_dict = {
    _published(path): np.ascontiguousarray(_to_theirs(path, np.asarray(value)))
    for path, value in flat.items()
  }
  return state_dict | {name: _filter(network) for name in _filters(flat)}
