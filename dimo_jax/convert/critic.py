"""DMD2's published GAN heads (`cls_pred_branch`) <-> the Critic's parameters."""

import numpy as np

from dimo_jax.types import Params, UserError

_PER_STAGE = 3  # a convolution, a norm and an activation share the sequence of published indices


def from_published(tensors: dict[str, np.ndarray]) -> Params:
  """Parameters from tensors "0.weight" .. without their prefix; kernels come as [o, i, h, w].

  Raises:
    UserError: the keys are not those of a head.
  """
  num_layers = len({key.partition(".")[0] for key in tensors})
  num_stages = (num_layers - 1) // 2
  params: dict[str, dict[str, np.ndarray]] = {}
  try:
    for stage in range(num_stages):
      params[f"conv_{stage}"] = _conv(tensors, _PER_STAGE * stage)
      norm = f"{_PER_STAGE * stage + 1}"
      params[f"norm_{stage}"] = {
        "scale": tensors[f"{norm}.weight"],
        "bias": tensors[f"{norm}.bias"],
      }
    params["logit"] = _conv(tensors, _PER_STAGE * num_stages)
  except KeyError as error:
    raise UserError(f"a published GAN head lacks the tensor {error}") from None
  return params


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


def _conv(tensors: dict[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
  weight = np.ascontiguousarray(np.transpose(tensors[f"{index}.weight"], (2, 3, 1, 0)))
  return {"kernel": weight, "bias": tensors[f"{index}.bias"]}
