"""taming-transformers' VQGAN: the published PyTorch key names to and from our linen tree.

A `last.ckpt` also holds what the network was trained with: its discriminator and the perceptual
loss, all under `loss.`. Those keys are dropped; every other one must have its place.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax import traverse_util

from dimo_jax.convert import keys
from dimo_jax.models.vqgan import VQGAN
from dimo_jax.remote import SETTINGS_FILE
from dimo_jax.types import Params, UserError

_TRAINING_ONLY = "loss."
PUBLISHED_RESOLUTION = 256  # pixels along a side, of the ImageNet models

# (pattern, replacement) from our paths to the published keys.
_NAMES = (
  (r"^codebook$", "quantize/embedding/weight"),
  (r"/(kernel|scale)$", "/weight"),
  (r"/(down|up)_(\d+)_(block|attn)_(\d+)/", r"/\1/\2/\3/\4/"),
  (r"/(down|up)_(\d+)_(downsample|upsample)/", r"/\1/\2/\3/conv/"),
  (r"/mid_", "/mid/"),
  (r"/", "."),
)

# Field of VQGAN -> where model.yaml has it, under model.params.
_YAML = {
  "channels": ("ddconfig", "ch"),
  "channel_mult": ("ddconfig", "ch_mult"),
  "num_res_blocks": ("ddconfig", "num_res_blocks"),
  "attn_resolutions": ("ddconfig", "attn_resolutions"),
  "z_channels": ("ddconfig", "z_channels"),
  "image_channels": ("ddconfig", "in_channels"),
  "codebook_size": ("n_embed",),
  "code_dim": ("embed_dim",),
}


def _published(path: str) -> str:
  """`decoder/up_0_block_1/conv1/kernel` -> `decoder.up.0.block.1.conv1.weight`."""
  for pattern, replacement in _NAMES:
    path = re.sub(pattern, replacement, path)
  return path


def _their_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Convolutions are HWIO here, OIHW there."""
  return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape


def _shapes(network: VQGAN) -> dict[str, tuple[int, ...]]:
  """Paths and shapes of a network's parameters."""
  image = jnp.zeros((1, network.resolution, network.resolution, network.image_channels))
  tree = jax.eval_shape(network.init, jax.random.key(0), image)
  flat = traverse_util.flatten_dict(tree["params"], sep="/")
  return {path: leaf.shape for path, leaf in flat.items()}


def from_published(state_dict: Mapping[str, np.ndarray], network: VQGAN) -> Params:
  """The linen parameters of a network from a published state dict.

  Keys under `loss.` belong to the training alone and are dropped.

  Returns:
    float32 arrays on the host, which share no memory with `state_dict`.

  Raises:
    UserError: keys are missing, unexpected or misshapen; they are listed.
  """
  shapes = _shapes(network)
  given = {k: v for k, v in keys.shapes_of(state_dict).items() if not k.startswith(_TRAINING_ONLY)}
  expected = {_published(path): _their_shape(shape) for path, shape in shapes.items()}
  keys.check(given, expected, "this VQGAN")
  flat = {}
  for path, shape in shapes.items():
    value = state_dict[_published(path)]
    value = value.transpose(2, 3, 1, 0) if len(shape) == 4 else value
    flat[path] = np.array(value, np.float32, order="C")
  return traverse_util.unflatten_dict(flat, sep="/")


def to_published(params: Params) -> dict[str, np.ndarray]:
  """The state dict with the published key names and layouts of a network's parameters."""
  state_dict = {}
  for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
    value = np.asarray(leaf)
    value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
    state_dict[_published(path)] = np.ascontiguousarray(value)
  return state_dict


def settings(
  state_dict: Mapping[str, np.ndarray],
  *,
  resolution: int = PUBLISHED_RESOLUTION,
  model_yaml: str = "",
) -> dict[str, Any]:
  """The fields of VQGAN that a published state dict is for, read off its keys and shapes.

  Args:
    resolution: pixels along an image's side; no shape depends on it.
    model_yaml: text of the `model.yaml` beside a checkpoint. Its resolution is taken, and it must
      agree with the shapes in everything else; "" is none.

  Raises:
    UserError: keys that every VQGAN has are missing, or the yaml is another network's or no yaml of
      a VQGAN.
  """
  declared = _declared(model_yaml) if model_yaml else {}
  resolution = declared.pop("resolution", resolution)
  shapes = keys.shapes_of(state_dict)
  try:
    channels, image_channels = shapes["encoder.conv_in.weight"][:2]
    levels = _count(shapes, "encoder.down.{}.block.0.conv1.weight")
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    codebook_size, code_dim = shapes["quantize.embedding.weight"]
    found = {
      "channels": channels,
      "channel_mult": tuple(width // channels for width in widths),
      "num_res_blocks": _count(shapes, "encoder.down.0.block.{}.conv1.weight"),
      "attn_resolutions": tuple(
        resolution >> i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in shapes
      ),
      "z_channels": shapes["encoder.conv_out.weight"][0],
      "codebook_size": codebook_size,
      "code_dim": code_dim,
      "image_channels": image_channels,
    }
  except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
    raise UserError(f"not a VQGAN of taming-transformers: {error} is missing") from None
  if "attn_resolutions" in declared:  # may name some that never occur
    occurring = [resolution >> i for i in range(levels)]
    declared["attn_resolutions"] = tuple(
      side for side in occurring if side in declared["attn_resolutions"]
    )
  wrong = [
    f"{'.'.join(_YAML[name])}={value} where the weights have {found[name]}"
    for name, value in declared.items()
    if value != found[name]
  ]
  if wrong:
    raise UserError(f"{SETTINGS_FILE} is not of these weights: {'; '.join(wrong)}")
  return {"resolution": resolution, **found}


def yaml_beside(path: Path) -> str:
  """The text of the `model.yaml` in a checkpoint's folder, "" where there is none."""
  path = path.with_name(SETTINGS_FILE)
  return path.read_text(encoding="utf-8") if path.is_file() else ""


def _count(shapes: keys.Shapes, key: str) -> int:
  """How many of `key`, numbered from 0, there are."""
  number = 0
  while key.format(number) in shapes:
    number += 1
  return number


def _declared(model_yaml: str) -> dict[str, Any]:
  """What a `model.yaml` says of the fields of VQGAN."""
  try:
    params = yaml.safe_load(model_yaml)["model"]["params"]
    fields: dict[str, Any] = {"resolution": int(params["ddconfig"]["resolution"])}
    for name, path in _YAML.items():
      value = params
      for part in path:
        value = value[part]
      fields[name] = tuple(map(int, value)) if isinstance(value, list) else int(value)
    double_z = params["ddconfig"].get("double_z", True)
  except yaml.YAMLError as error:
    raise UserError(f"{SETTINGS_FILE} is no yaml: {' '.join(str(error).split())}") from error
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(f"{SETTINGS_FILE} does not describe a VQGAN ({error!r})") from error
  if double_z:
    raise UserError(
      f"{SETTINGS_FILE} says double_z: its encoder is a variational one, not a VQGAN's"
    )
  return fields
