"""EDM networks: the published PyTorch key names to and from our linen tree."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from dimo_jax.convert import keys
from dimo_jax.types import Params, UserError

# Our linear layers that are 1x1 convolutions in the published networks.
_POINTWISE = re.compile(r"[/_](skip|qkv|proj)/kernel$")
_ENCODER = re.compile(r"model\.enc\.(\d+)x\1_")


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
  """Paths and shapes of a preconditioned network's parameters."""
  model = network.model
  side = model.img_resolution
  image = jax.ShapeDtypeStruct((1, side, side, model.img_channels), jnp.float32)
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


def _their_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  theirs = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
  return (*theirs, 1, 1) if _POINTWISE.search(path) else theirs


def _to_theirs(path: str, value: np.ndarray) -> np.ndarray:
  value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
  return value[:, :, None, None] if _POINTWISE.search(path) else value


def sizes(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The fields of `ADM` or `SongUNet` that a published state dict is for.

  `kind` says which of them: "adm" or "song".
  No shape depends on ADM's channels per head (64 in every published network) or on dropout.
  `attn_resolutions` are those whose encoder blocks attend.

  Raises:
    UserError: layers that every such network has are missing.
  """
  shapes = keys.shapes_of(state_dict)
  resolutions = sorted(
    {int(match[1]) for name in shapes if (match := _ENCODER.match(name))}, reverse=True
  )
  if not resolutions:
    raise UserError("not an EDM network: it has no layers model.enc.*")
  try:
    first = f"model.enc.{resolutions[0]}x{resolutions[0]}"
    emb, noise_channels = shapes["model.map_layer0.weight"]
    stem, img_channels = shapes[f"{first}_conv.weight"][:2]
    blocks = [f"model.enc.{res}x{res}_block0" for res in resolutions]
    widths = [shapes[f"{block}.conv1.weight"][0] for block in blocks]
    is_adm = "model.out_norm.weight" in shapes
    channels = noise_channels if is_adm else stem
    if any(not width or width % channels for width in (*widths, emb, noise_channels)):
      raise ValueError(f"{channels} channels do not divide the layers' {widths}")
    fields = {
      "kind": "adm" if is_adm else "song",
      "img_resolution": resolutions[0],
      "img_channels": img_channels,
      "label_dim": shapes.get("model.map_label.weight", (0, 0))[1],
      "augment_dim": shapes.get("model.map_augment.weight", (0, 0))[1],
      "model_channels": channels,
      "channel_mult": tuple(width // channels for width in widths),
      "channel_mult_emb": emb // channels,
      "num_blocks": sum(
        re.match(rf"{first}_block\d+\.conv1\.weight", n) is not None for n in shapes
      ),
      "attn_resolutions": tuple(
        res
        for res, block in zip(resolutions, blocks, strict=True)
        if f"{block}.qkv.weight" in shapes
      ),
    }
  except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
    raise UserError(f"not an EDM network: {error!r}") from None
  if is_adm:
    return fields
  aux = {match[1] for name in shapes if (match := re.search(r"enc\..*_aux_(skip|residual)", name))}
  num_outputs = sum(name.endswith("_aux_norm.weight") for name in shapes)
  filters = [name for name in shapes if name.endswith(".resample_filter")]
  return fields | {
    "embedding_type": "fourier" if "model.map_noise.freqs" in shapes else "positional",
    "channel_mult_noise": noise_channels // channels,
    "encoder_type": min(aux, default="standard"),
    "decoder_type": "skip" if num_outputs > 1 else "standard",
    "resample_filter": _filter_taps(state_dict[filters[0]]) if filters else (1, 1),
  }


def _filter_taps(value: np.ndarray) -> tuple[int, ...]:
  """The smallest integers that make a filter: [1, 1, n, n] -> n taps."""
  taps = value.reshape(value.shape[-2:]).sum(0)
  return tuple(int(tap) for tap in np.rint(taps / abs(taps).min()))


def from_published(state_dict: Mapping[str, np.ndarray], network: nn.Module) -> Params:
  """The linen parameters of a preconditioned network from a state dict with the published names.

  Returns:
    float32 arrays on the host, which share no memory with `state_dict`.

  Raises:
    UserError: keys are missing, unexpected or misshapen, they are listed; or a resampling filter is
      another network's.
  """
  shapes = _shapes(network)
  names, filters = {_published(path): path for path in shapes}, _filters(shapes)
  wanted = _filter(network)
  expected = {name: _their_shape(path, shapes[path]) for name, path in names.items()}
  expected |= dict.fromkeys(sorted(filters), wanted.shape)
  keys.check(keys.shapes_of(state_dict), expected, f"this {type(network.model).__name__}")
  for name in sorted(filters):
    if not np.array_equal(state_dict[name], wanted):
      raise UserError(f"{name} is not the filter of denoiser.resample_filter")
  flat = {
    path: np.array(_to_ours(state_dict[name], shapes[path]), np.float32, order="C")
    for name, path in names.items()
  }
  return traverse_util.unflatten_dict(flat, sep="/")


def to_published(params: Params, network: nn.Module) -> dict[str, np.ndarray]:
  """The state dict with the published key names and layouts of a network's parameters."""
  flat = traverse_util.flatten_dict(params, sep="/")
  state_dict = {
    _published(path): np.ascontiguousarray(_to_theirs(path, np.asarray(value)))
    for path, value in flat.items()
  }
  return state_dict | {name: _filter(network) for name in _filters(flat)}
