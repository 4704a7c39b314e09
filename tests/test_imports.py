"""The import rules: layers of dimo_jax, no torch or TensorFlow, configs are plain."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dimo_jax"

# A module imports only from rows above its own; modules of one row do not import each other, and a
# package may import from within itself.
LAYERS = """
types
remote
processes
sharding
optim
state
models
convert
teachers
distributed
writers preemption health allocator
cli trackers profile
data
samplers
objectives
step
evaluation
checkpoint
build
recipe records
prepare
hooks start artifacts
generators
judges
watch run_judge
train
sample evaluate benchmark pairs study card plan serve encode
export target
main
"""
RANK = {name: row for row, line in enumerate(LAYERS.split("\n")) for name in line.split()}

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in ("torch", "torchvision", "tensorflow", "tensorboard"):
  sys.modules[name] = None  # an import of it fails, as where it is not installed
import dimo_jax
def fail(name):
  raise ImportError(name)
for module in pkgutil.walk_packages(dimo_jax.__path__, "dimo_jax.", onerror=fail):
  importlib.import_module(module.name)
"""


def imports(source: str) -> set[str]:
  """Dotted names that a source text imports, also inside functions; `a.b` for `from a import b`."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = "." * node.level + (node.module or "")
      names |= {f"{base}.{alias.name}" for alias in node.names}
  return names


def violations(module: str, source: str) -> list[str]:
  """What is wrong with the imports of a top-level module (or a file of that package)."""
  if module not in RANK:
    return [f"{module} has no row in LAYERS"]
  wrong = []
  for name in sorted(imports(source)):
    root, _, rest = name.partition(".")
    target = rest.partition(".")[0]
    if root == "":
      wrong.append(f"{name}: relative imports are not used")
    elif root == "dimo_jax" and target not in RANK:
      wrong.append(f"{name} has no row in LAYERS")
    elif root == "dimo_jax" and target != module and RANK[target] >= RANK[module]:
      wrong.append(f"{module} may not import {name}")
  return wrong


def package_files() -> list[pathlib.Path]:
  return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers(path):
  # A package's __main__ is a command.
  module = "main" if path.name == "__main__.py" else path.relative_to(PACKAGE).parts[0]
  module = module.removesuffix(".py")
  assert not violations(module, path.read_text())


def test_importing_the_package_imports_nothing_else():
  code = "import sys; before = set(sys.modules); import dimo_jax; dimo_jax.__all__"
  code += "; print(*sorted(set(sys.modules) - before))"
  command = [sys.executable, "-c", code]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  roots = {name.partition(".")[0] for name in result.stdout.split()}
  assert roots - sys.stdlib_module_names == {"dimo_jax"}


@pytest.mark.parametrize(
  ("module", "source", "count"),
  [
    ("step", "from dimo_jax.objectives.dimo import loss\nimport dimo_jax.types, jax", 0),
    ("models", "from dimo_jax.models import layers", 0),
    ("models", "def f():\n  from dimo_jax.train import run", 1),
    ("types", "import dimo_jax.processes.masking", 1),
    ("plan", "from dimo_jax import pairs, train", 1),
    ("step", "from .objectives import dimo\nfrom . import types", 2),
    ("step", "from dimo_jax import unheard_of", 1),
    ("unheard_of", "import jax", 1),
  ],
)
def test_violations_are_seen(module, source, count):
  assert len(violations(module, source)) == count


def test_no_torch_and_no_tensorflow():
  command = [sys.executable, "-c", IMPORT_ALL]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configs_import_only_ml_collections_and_configs(path):
  roots = {name.partition(".")[0] for name in imports(path.read_text())}
  assert roots <= {"ml_collections", "configs"}
