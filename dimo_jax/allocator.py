"""The C allocator's settings for CPU runs."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
  """Lets a step reuse the memory of the step before, rather than fault it in page by page.

  glibc returns large blocks to the system as they are freed, and XLA's CPU backend frees its
  buffers at every step. Measured with `benchmark --config=configs/benchmark.py` on two cores: see
  benchmarks/README.md. The process then keeps its peak memory. Returns whether glibc took it.
  """
  if sys.platform != "linux":
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):  # another C library
    return False
  settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26))
  return all(mallopt(name, value) == 1 for name, value in settings)
