"""The iteration compiled for devices that are not here: `--mode=plan --target=v5e:4x4`.

PyPI's libtpu compiles for a described topology on any machine; `v5e:4x4*2` is two slices of it, and
`cpu:8` so many CPU devices. Nothing runs. What is said of memory is the compiler's own account, for
one device.
"""

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
from jax.experimental import topologies

from dimo_jax import plan
from dimo_jax.build import build
from dimo_jax.sharding import batch_sharding, bytes_per_device, make_mesh, replicated
from dimo_jax.start import jit_distill_step, on_host
from dimo_jax.types import UserError
from dimo_jax.writers import say

_COLLECTIVE = re.compile(
  r" = (?P<shapes>\(.*?\)|\S+) "
  r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALL = re.compile(
  r"\b(?:body|calls|to_apply|(?:true|false)_computation|branch_computations)="
  r"(\{[^}]*\}|%?[\w.\-]+)"
)
_CONDITION = re.compile(r" while\(.*\bcondition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(\S+, %?([\w.\-]+)\), direction=LT")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SHAPE = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+)(?:e\dm\d\w*)?\[(?P<sizes>[\d,]*)\]")


def devices(target: str) -> list[jax.Device]:
  """The devices of a topology such as "v5e:4x4" or "cpu:8", for compiling only.

  Call it before anything else asks JAX for its devices: it says how many CPUs there are.

  Raises:
    UserError: libtpu is missing, or there is no such topology.
  """
  platform, _, size = target.partition(":")
  if platform == "cpu":
    if not size.isdigit() or int(size) < 1:
      raise UserError(f"--target={target!r} must be cpu:N, with N of 1 or more")
    jax.config.update("jax_num_cpu_devices", int(size))
    return jax.devices()
  return _tpu_devices(target)


def _tpu_devices(target: str) -> list[jax.Device]:
  topology, _, num_slices = target.partition("*")
  if "*" in target and not num_slices.isdecimal():
    raise UserError(f"--target={target!r} must be a TPU topology, as v5e:4x4, or slices, v5e:4x4*2")
  slices = {"num_slices": int(num_slices)} if num_slices else {}
  # Without these libtpu asks the cloud which machine this is, and complains of no answer.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here holds a device
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise UserError(f"--target={target!r} needs libtpu: pip install libtpu") from error
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **slices)
    return list(found.devices)
  except Exception as error:  # of kinds that the plugin chooses
    reason = (str(error).splitlines() or [repr(error)])[0]
    raise UserError(f"--target={target!r} must be a TPU topology, as v5e:4x4: {reason}") from error


def collectives(hlo: str) -> dict[str, dict[str, int]]:
  """{kind: {"count", "bytes"}} of the collective operations that a compiled program executes.

  Bytes are those of the results, on one device. What lies in a loop's body counts once for each of
  its turns, or once where their number cannot be read.
  """
  computations, entry = _computations(hlo)
  found: dict[str, dict[str, int]] = {}

  def visit(name: str, times: int) -> None:
    for line in computations[name]:
      match = _COLLECTIVE.search(line)
      if match:
        row = found.setdefault(match["kind"], {"count": 0, "bytes": 0})
        row["count"] += times
        row["bytes"] += times * _result_bytes(match)
      turns = _turns(line, computations)
      for callee in _callees(line):
        if callee in computations:
          visit(callee, times * turns)

  if entry:
    visit(entry, 1)
  return found


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
  """({name: instructions} of a program's computations, the name of the one that it begins with)."""
  computations: dict[str, list[str]] = {}
  entry = name = ""
  for line in hlo.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      name = head["name"]
      computations[name] = []
      entry = name if head["entry"] else entry
    elif name:
      computations[name].append(line)
  return computations, entry


def _turns(line: str, computations: Mapping[str, list[str]]) -> int:
  """How often an instruction runs what it calls: a loop as often as is written beside it, or as its
  condition bounds the counter (those of `jax.lax.scan` count from 0); all else once.
  """
  known, condition = _TRIP_COUNT.search(line), _CONDITION.search(line)
  if known:
    return int(known[1])
  text = "\n".join(computations.get(condition[1], [])) if condition else ""
  values, below = dict(_CONSTANT.findall(text)), _BELOW.search(text)
  return int(values[below[1]]) if below and below[1] in values else 1


def _callees(line: str) -> Iterator[str]:
  """The computations that an instruction runs; of a loop its body, not its condition."""
  for match in _CALL.finditer(line):
    yield from re.findall(r"[\w.\-]+", match[1])


def _result_bytes(match: re.Match[str]) -> int:
  sizes = list(_shape_bytes(match["shapes"]))
  if match["start"] and match["kind"] == "all-gather":  # (operands, results)
    sizes = sizes[len(sizes) // 2 :]
  elif match["start"] and match["kind"] == "collective-permute":  # (operand, result, ...)
    sizes = sizes[1:2]
  return sum(sizes)


def _shape_bytes(text: str) -> Iterator[int]:
  for match in _SHAPE.finditer(text):
    bits = 8 if match["dtype"] == "pred" else int(re.sub(r"\D", "", match["dtype"]))
    sizes = [int(size) for size in match["sizes"].split(",") if size]
    yield math.prod(sizes) * bits // 8


def compile_for(config: ml_collections.ConfigDict, target: str) -> dict[str, Any]:
  """Compiles the iteration for a topology and prints what the compiler says of it.

  Returns:
    The figures, which the last printed line holds as JSON.

  Raises:
    UserError: a config that cannot work, a topology that is not known, or memory that is too small.
  """
  mesh = make_mesh(config.mesh.fsdp, devices(target))
  experiment = build(plan.without_files(config), mesh)
  teacher, state = plan.shapes(experiment)
  train, rounds = config.train, experiment.objective.fake_rounds

  def batches(network: str, *leading: int) -> Any:
    sharding = batch_sharding(mesh, len(leading))
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=sharding),
      plan.batch_shapes(experiment, network, train.batch_size),
    )

  batch = {
    "generator": batches("generator", train.accumulation),
    "fake_score": batches("fake_score", rounds, train.accumulation),
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
  began = time.perf_counter()
  try:
    lowered = jit_distill_step(experiment, state, teacher).lower(state, teacher, batch, key)
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    reason = " ".join(str(error).split())[:300]
    raise UserError(
      f"--target={target!r} has too little memory for this config: {reason}"
    ) from error
  memory = compiled.memory_analysis()
  assert memory is not None  # not every backend knows; a TPU's does
  result = {
    "target": target,
    "device_kind": mesh.devices.flat[0].device_kind,
    "devices": mesh.size,
    "state_bytes": sum(
      bytes_per_device(tree, mesh, config.mesh.rules, on_host(experiment))
      for tree in (state, teacher)
    ),
    "compiler": {
      "argument_bytes": memory.argument_size_in_bytes,
      "temporary_bytes": memory.temp_size_in_bytes,
      "output_bytes": memory.output_size_in_bytes,
      "aliased_bytes": memory.alias_size_in_bytes,
      "program_bytes": memory.generated_code_size_in_bytes,
    },
    "collectives": collectives(compiled.as_text() or ""),
    "compile_seconds": time.perf_counter() - began,
  }
  say(
    f"the distillation compiled for {mesh.size} x {result['device_kind']} in"
    f" {result['compile_seconds']:.0f} s;"
  )
  say("by the compiler's own account, on each device:")
  for name, num_bytes in result["compiler"].items():
    say(f"{name.replace('_', ' '):24s} {num_bytes / 2**30:10.3f} GiB")
  say("collective operations that an iteration executes:")
  for kind, row in result["collectives"].items():
    say(f"{kind:24s} {row['bytes'] / 2**30:10.3f} GiB in {row['count']} operations")
  say(json.dumps(result))
  return result
