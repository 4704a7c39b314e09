"""Test environment: eight fake CPU devices, shape checks, a time limit per test, golden arrays."""

import os

# Before anything imports jax. One thread per device: bits must not depend on the number of cores.
# Most of a test's time is compilation, so the compiler's expensive passes are off.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_multi_thread_eigen=false",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
  ]
)

import importlib.util
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import hypothesis
import jaxtyping
import numpy as np
import pytest
from flax import struct

# Trees are also made of shardings and shapes, so their constructors are not checked.
struct.PyTreeNode.__no_type_check__ = True

# From here on every annotated function and dataclass of dimo_jax checks its types and shapes.
jaxtyping.install_import_hook("dimo_jax", "beartype.beartype")

# Examples are the same in every run, and jit compilation may make the first one slow.
hypothesis.settings.register_profile("dimo", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("dimo")

GOLDEN = pathlib.Path(__file__).parent / "golden"

# Seconds that the body of a test without the `slow` or `ci` mark may take, fixtures not counted.
# Raise it on a slow machine: DIMO_TEST_LIMIT_S=120 make test.
TEST_LIMIT_S = float(os.environ.get("DIMO_TEST_LIMIT_S", "20"))


def pytest_sessionstart():
  """With DIMO_NEED_ALL in the environment, nothing may be missing for which a test would skip."""
  if "DIMO_NEED_ALL" in os.environ:
    missing = [m for m in ("torch", "pytorch_fid") if importlib.util.find_spec(m) is None]
    missing += [command for command in ("chromium", "shellcheck") if not shutil.which(command)]
    if missing:
      pytest.exit(f"DIMO_NEED_ALL, but {', '.join(missing)} are not installed", returncode=2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """Fails a passed test that took longer than TEST_LIMIT_S and is not marked slow or ci."""
  report = yield
  slow = any(item.get_closest_marker(name) for name in ("slow", "ci"))
  if report.when == "call" and report.passed and not slow and call.duration > TEST_LIMIT_S:
    report.outcome = "failed"
    report.longrepr = (
      f"{item.nodeid} took {call.duration:.1f} s, the limit is {TEST_LIMIT_S:g} s: make it "
      "smaller, mark it slow, or raise DIMO_TEST_LIMIT_S on a slow machine"
    )
  return report


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
  """golden(name) -> arrays of tests/golden/<name>.npz by key, and `config` from `config_json`."""

  def load(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
      arrays = dict(file)
    arrays["config"] = json.loads(str(arrays.pop("config_json", "{}")))
    return arrays

  return load
