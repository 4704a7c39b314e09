"""DMD2's published GAN heads (`cls_pred_branch`) <-> the Critic's parameters."""

from collections.abc import Mapping

import numpy as np

from dimo_jax.convert import keys
from dimo_jax.types import Params

_PER_STAGE = 3  # a convolution, a norm and an activation share the sequence of published indices


def from_published(tensors: Mapping[str, np.ndarray]) -> Params:
  """Parameters from tensors "0.weight" .. without their prefix; kernels come as [o, i, h, w].

  Returns:
    float32 arrays on the host, which share no memory with `tensors`.

  Raises:
    UserError: keys are missing, unexpected or misshapen; they are listed.
  """
  shapes = keys.shapes_of(tensors)
  num_layers = len({key.partition(".")[0] for key in shapes})
  num_stages = max(1, (num_layers - 1) // 2)
  keys.check(shapes, _expected(shapes, num_stages), "a GAN head of DMD2")
  params: dict[str, dict[str, np.ndarray]] = {}
  for stage in range(num_stages):
    params[f"conv_{stage}"] = _conv(tensors, _PER_STAGE * stage)
    norm = f"{_PER_STAGE * stage + 1}"
    params[f"norm_{stage}"] = {
      "scale": np.array(tensors[f"{norm}.weight"], np.float32),
      "bias": np.array(tensors[f"{norm}.bias"], np.float32),
    }
  params["logit"] = _conv(tensors, _PER_STAGE * num_stages)
  return params


def _expected(shapes: keys.Shapes, num_stages: int) -> keys.Shapes:
  """Names and shapes of a head as wide as the one given, and with its kernel sizes."""
  channels = next(iter(shapes.get("0.weight", ())), 0)
  expected: keys.Shapes = {}
  for stage in range(num_stages):
    conv, norm = _PER_STAGE * stage, _PER_STAGE * stage + 1
    kernel = shapes.get(f"{conv}.weight", ())[2:]
    expected[f"{conv}.weight"] = (channels, channels, *kernel)
    expected |= dict.fromkeys((f"{conv}.bias", f"{norm}.weight", f"{norm}.bias"), (channels,))
  logit = _PER_STAGE * num_stages
  return expected | {f"{logit}.weight": (1, channels, 1, 1), f"{logit}.bias": (1,)}


def to_published(params: Params) -> dict[str, np.ndarray]:
  """The inverse of `from_published`."""
  num_stages = (len(params) - 1) // 2
  tensors: dict[str, np.ndarray] = {}

  def conv(index: int, layer: Params):
    tensors[f"{index}.weight"] = np.transpose(layer["kernel"], (3, 2, 0, 1))
    tensors[f"{index}.bias"] = np.asarray(layer["bias"])

  for stage in range(num_stages):
    conv(_PER_STAGE * stage, params[f"conv_{stage}"])
    norm = params[f"norm_{stage}"]
    tensors[f"{_PER_STAGE * stage + 1}.weight"] = np.asarray(norm["scale"])
    tensors[f"{_PER_STAGE * stage + 1}.bias"] = np.asarray(norm["bias"])
  conv(_PER_STAGE * num_stages, params["logit"])
  return tensors


def _conv(tensors: Mapping[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
  kernel = np.transpose(tensors[f"{index}.weight"], (2, 3, 1, 0))
  return {
    "kernel": np.array(kernel, np.float32, order="C"),
    "bias": np.array(tensors[f"{index}.bias"], np.float32),
  }
