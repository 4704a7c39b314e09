"""Times the 3x3 convolutions of configs/benchmark.py:dmd2 in JAX and in PyTorch:

    python benchmarks/convolutions.py

Needs requirements-torch.txt. For each layer size: the forward pass, the gradient of the image and
that of the kernel, float32, in GFLOP/s of the median call.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from dimo_jax.allocator import keep_freed_memory

_BATCH = 8
_PAUSE_S = 0.3  # one library's threads look for work a while after a call, which slows the other's
# (pixels a side, channels in, channels out)
_SIZES = ((32, 64, 64), (32, 128, 64), (16, 128, 128), (16, 256, 128), (8, 192, 192))


def in_jax(side: int, channels: int, features: int) -> dict[str, Callable[[], Any]]:
  """The three calls as XLA compiles them."""
  import jax

  def convolve(image, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=dimensions)

  keys = jax.random.split(jax.random.key(0), 3)
  image = jax.random.normal(keys[0], (_BATCH, side, side, channels))
  kernel = jax.random.normal(keys[1], (3, 3, channels, features))
  gradient = jax.random.normal(keys[2], (_BATCH, side, side, features))
  of_image = jax.jit(lambda x, k, g: jax.vjp(lambda x: convolve(x, k), x)[1](g))
  of_kernel = jax.jit(lambda x, k, g: jax.vjp(lambda k: convolve(x, k), k)[1](g))
  forward = jax.jit(convolve)
  return {
    "forward": lambda: jax.block_until_ready(forward(image, kernel)),
    "image": lambda: jax.block_until_ready(of_image(image, kernel, gradient)),
    "kernel": lambda: jax.block_until_ready(of_kernel(image, kernel, gradient)),
  }


def in_torch(side: int, channels: int, features: int) -> dict[str, Callable[[], Any]]:
  """The three calls as PyTorch makes them."""
  import torch

  image = torch.randn(_BATCH, channels, side, side)
  kernel = torch.randn(features, channels, 3, 3)
  gradient = torch.randn(_BATCH, features, side, side)

  def backward(*wanted: bool) -> Any:
    one, none = [1, 1], [0, 0]
    return torch.ops.aten.convolution_backward(
      gradient, image, kernel, [features], one, one, one, False, none, 1, [*wanted, False]
    )

  return {
    "forward": lambda: torch.nn.functional.conv2d(image, kernel, padding=1),
    "image": lambda: backward(True, False),
    "kernel": lambda: backward(False, True),
  }


def median(call: Callable[[], Any], num: int) -> float:
  """Seconds of the median of `num` calls, after two that do not count."""
  time.sleep(_PAUSE_S)
  seconds = []
  for _ in range(2 + num):
    began = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - began)
  return statistics.median(seconds[2:])


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
  parser.add_argument("--repeats", type=int, default=51)
  arguments = parser.parse_args()
  if arguments.repeats < 1:
    parser.error(f"--repeats={arguments.repeats} must be 1 or more")
  keep_freed_memory()
  os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: PyTorch's side runs there
  print("| side, channels | pass | JAX | PyTorch |\n| --- | --- | --- | --- |")
  for side, channels, features in _SIZES:
    ours, theirs = in_jax(side, channels, features), in_torch(side, channels, features)
    gflop = 2e-9 * _BATCH * side**2 * 9 * channels * features
    for name in ours:
      found = [median(calls[name], arguments.repeats) for calls in (ours, theirs)]
      rates = " | ".join(f"{gflop / seconds:.0f}" for seconds in found)
      print(f"| {side}x{side}, {channels} to {features} | {name} | {rates} |", flush=True)


if __name__ == "__main__":
  main()
