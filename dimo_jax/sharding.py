"""The device mesh and the rules that place arrays on it: the only file that names mesh axes.

The mesh is `(data, fsdp)`. Batches are split over both axes; parameters, moments and averages are
split over `fsdp`, along the dimension a rule gives or else along the largest that divides. Where
the devices are slices joined by a data-centre network, `fsdp` stays inside a slice and only `data`
crosses that network.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dimo_jax.types import Array, Int, UserError, check_pattern

# (regex on the parameter's path, dimension to split, or None to replicate); the first match wins.
Rules = Sequence[tuple[str, int | None]]
_AXES = ("data", "fsdp")
_HOST = "pinned_host"  # JAX's name of the memory that devices read directly


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A `(data, fsdp)` mesh over all devices.

  Raises:
    UserError: `fsdp` does not divide the number of devices, or of those of one slice.
  """
  devices = jax.devices() if devices is None else devices
  _check_fsdp(fsdp, len(devices))
  types = (AxisType.Auto, AxisType.Auto)
  # GPUs may name slices too, one for each host; their fsdp may span hosts.
  slices = {getattr(d, "slice_index", None) for d in devices if d.platform == "tpu"}
  num_slices = max(1, len(slices))
  if num_slices == 1:
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, _AXES, axis_types=types, devices=devices)
  per_slice = len(devices) // num_slices
  if per_slice % fsdp:
    raise UserError(f"mesh.fsdp={fsdp} must divide the devices of one slice, {per_slice}")
  grid = mesh_utils.create_hybrid_device_mesh(
    (per_slice // fsdp, fsdp), (num_slices, 1), devices=devices, allow_split_physical_axes=True
  )
  return Mesh(grid, _AXES, axis_types=types)


def abstract_mesh(num_devices: int, fsdp: int = 1) -> AbstractMesh:
  """The mesh that `make_mesh` would make of so many devices, without the devices.

  Raises:
    UserError: `fsdp` does not divide the number of devices.
  """
  _check_fsdp(fsdp, num_devices)
  types = (AxisType.Auto, AxisType.Auto)
  return AbstractMesh((num_devices // fsdp, fsdp), _AXES, axis_types=types)


def _check_fsdp(fsdp: int, num_devices: int) -> None:
  if fsdp < 1 or num_devices % fsdp:
    raise UserError(f"mesh.fsdp={fsdp} must divide the number of devices, {num_devices}")


def check_batch(batch_size: int, mesh: Mesh | AbstractMesh, field: str) -> None:
  """Raises UserError where a global batch cannot be split evenly over the mesh."""
  if batch_size < 1 or batch_size % mesh.size:
    fits = max(1, round(batch_size / mesh.size)) * mesh.size
    raise UserError(
      f"{field}={batch_size} must be a positive multiple of the number of devices, {mesh.size},"
      f" such as {fits}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of scalars, metrics and keys."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, batch_axis: int = 0) -> NamedSharding:
  """Splits axis `batch_axis` over every device; the axes before it stay whole."""
  return NamedSharding(mesh, PartitionSpec(*[None] * batch_axis, ("data", "fsdp")))


def local_rows(batch_size: int, mesh: Mesh) -> Int[np.ndarray, " n"]:
  """The samples of a global batch that this process feeds to its devices, in order."""
  slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in slices]))


def shard_batch(batch: Any, mesh: Mesh, batch_axis: int = 0) -> Any:
  """Puts this process's `local_rows` of host arrays on the mesh, split along `batch_axis`."""
  return jax.make_array_from_process_local_data(batch_sharding(mesh, batch_axis), batch)


def put(tree: Any, shardings: Any) -> Any:
  """Puts a tree that every process holds whole on the mesh."""
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  def leaf(x, sharding):  # device_put would first send every array around, to compare
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = leaf(jax.random.key_data(x), sharding)
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  return jax.tree.map(leaf, tree, shardings)


def fetch(tree: Any) -> Any:
  """Whole host arrays, in every process, of arrays however sharded; all processes call it."""

  def leaf(x):
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      return multihost_utils.process_allgather(x, tiled=True)
    return jax.device_get(x)

  return jax.tree.map(leaf, tree)


def _parameter_spec(path: str, shape: tuple[int, ...], fsdp: int, rules: Rules) -> PartitionSpec:
  axis = None
  for pattern, dimension in rules:
    if re.search(pattern, path):
      if dimension is not None and not 0 <= dimension < len(shape):
        raise UserError(
          f"mesh.rules {pattern!r} splits dimension {dimension} of {path}, which has"
          f" {len(shape)} dimensions, counted from 0"
        )
      if dimension is not None and shape[dimension] % fsdp:
        raise UserError(
          f"mesh.rules {pattern!r} splits dimension {dimension} of {path}, of shape {shape},"
          f" which mesh.fsdp={fsdp} does not divide"
        )
      axis = dimension
      break
  else:
    divisible = [i for i, size in enumerate(shape) if size % fsdp == 0 and size >= fsdp]
    axis = max(divisible, key=lambda i: shape[i], default=None)
  if axis is None or fsdp == 1:
    return PartitionSpec()
  return PartitionSpec(*[None] * axis, "fsdp")


def state_sharding(
  state: Any, mesh: Mesh | AbstractMesh, rules: Rules = (), host: Sequence[str] = ()
) -> Any:
  """Shardings for a tree of parameters, moments and counters (arrays or shapes).

  What matches a regex of `host` lies in the hosts' memory, split in the same way.
  """
  fsdp = mesh.shape["fsdp"]
  for pattern, _ in rules:
    check_pattern(pattern, "mesh.rules")

  def leaf(path, value):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = _parameter_spec(name, getattr(value, "shape", ()), fsdp, rules)
    on_host = any(re.search(pattern, name) for pattern in host)
    return NamedSharding(mesh, spec, memory_kind=_HOST if on_host else None)

  return jax.tree_util.tree_map_with_path(leaf, state)


def check_rules(states: Sequence[Any], mesh: Mesh | AbstractMesh, rules: Rules) -> None:
  """Raises UserError where a rule of the config cannot split what it matches, or matches nothing in
  any of the states (arrays or shapes) that a run puts on the mesh.
  """
  names = []
  for state in states:
    state_sharding(state, mesh, rules)
    paths = jax.tree_util.tree_leaves_with_path(state)
    names += [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
  for pattern, _ in rules:
    if not any(re.search(pattern, name) for name in names):
      example = next(name for name in names if "/params/" in name)
      raise UserError(f"mesh.rules {pattern!r} matches nothing; there are paths such as {example}")


def to_memory(state: Any, mesh: Mesh, rules: Rules = (), host: Sequence[str] = ()) -> Any:
  """A state on the mesh with what matches `host` in the hosts' memory, all else on the devices.

  Only what lies elsewhere moves, and each process moves its own part.
  """
  leaves, tree = jax.tree.flatten(state)
  wanted = jax.tree.leaves(state_sharding(state, mesh, rules, host))
  moving = [i for i, x in enumerate(leaves) if x.sharding.memory_kind != wanted[i].memory_kind]
  if moving:
    moved = _mover(tuple(wanted[i] for i in moving))([leaves[i] for i in moving])
    for i, x in zip(moving, moved, strict=True):
      leaves[i] = x
  return jax.tree.unflatten(tree, leaves)


@functools.cache  # else every save would compile its transfer again
def _mover(shardings: tuple[jax.sharding.Sharding, ...]) -> Callable[[list[Array]], list[Array]]:
  wanted = list(shardings)
  return jax.jit(lambda xs: jax.device_put(xs, wanted), out_shardings=wanted)


def bytes_per_device(
  state: Any, mesh: Mesh | AbstractMesh, rules: Rules = (), host: Sequence[str] = ()
) -> int:
  """What one device holds of a tree of arrays or shapes under `state_sharding`."""

  def leaf(x, sharding):
    on_device = sharding.memory_kind != _HOST
    return on_device * math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize

  return sum(jax.tree.leaves(jax.tree.map(leaf, state, state_sharding(state, mesh, rules, host))))


def jit_step(
  step_fn: Callable[..., Any],
  mesh: Mesh,
  state: Any,
  constants: Any,
  rules: Rules = (),
  host: Sequence[str] = (),
) -> jax.stages.Wrapped:
  """Jits `step_fn(state, constants, batch, base_key) -> (state, metrics)`.

  The state keeps its shardings and is donated; what of it lies in the `host`'s memory visits the
  device. `constants` (a frozen teacher, tokenizer parameters) is sharded by the same rules and
  never donated; batches keep the sharding they come with; metrics are replicated.
  """
  state_shardings = state_sharding(state, mesh, rules, host)
  constant_shardings = state_sharding(constants, mesh, rules)

  def visiting(state, *rest):
    state, metrics = step_fn(jax.device_put(state, state_sharding(state, mesh, rules)), *rest)
    return jax.device_put(state, state_shardings), metrics

  return jax.jit(
    visiting if host else step_fn,
    in_shardings=(state_shardings, constant_shardings, None, replicated(mesh)),
    out_shardings=(state_shardings, replicated(mesh)),
    donate_argnums=(0,),
  )
