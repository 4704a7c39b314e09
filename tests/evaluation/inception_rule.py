"""Inception weights made by a stated rule, in place of the published ones."""

import zlib

import numpy as np


def rule_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Arrays by published key, drawn from RandomState(crc32(key)), of sizes that keep the scale.

  Convolutions n * sqrt(2 / fan_in); `fc.weight` n / sqrt(fan_in); norm weights 1 + 0.1 n; variances
  exp(0.2 n); the rest 0.1 n.
  """
  weights = {}
  for key, shape in shapes.items():
    n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    fan_in = np.prod(shape[1:])
    if key.endswith("conv.weight"):
      value = n * np.sqrt(2 / fan_in)
    elif key == "fc.weight":
      value = n / np.sqrt(fan_in)
    elif key.endswith("bn.weight"):
      value = 1 + 0.1 * n
    elif key.endswith("running_var"):
      value = np.exp(0.2 * n)
    else:
      value = 0.1 * n
    weights[key] = value.astype(np.float32)
  return weights
