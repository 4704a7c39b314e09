"""Writes weights in the layouts in which others publish them, without their software.

`zip_file` and `legacy_file` are torch.save's two layouts, `edm_pickle` is that of EDM's networks;
`Global`, `Call` and `Raw` in a content say what no honest file would.
"""

import collections
import contextlib
import dataclasses
import io
import pathlib
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

STORAGES = {
  np.dtype(np.float64): "DoubleStorage",
  np.dtype(np.float32): "FloatStorage",
  np.dtype(np.float16): "HalfStorage",
  np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
  np.dtype(np.int64): "LongStorage",
  np.dtype(np.bool_): "BoolStorage",
}
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


@dataclasses.dataclass
class Global:
  """A name, as `module name`."""

  module: str
  name: str


@dataclasses.dataclass
class Call:
  """The call of a name; with `state`, what is then set on its result."""

  function: Any
  arguments: tuple
  state: Any = None


@dataclasses.dataclass
class Raw:
  """Opcodes as they are."""

  opcodes: bytes


@dataclasses.dataclass
class Persistent:
  """A persistent id."""

  value: Any


@dataclasses.dataclass
class Tensor:
  """A tensor whose shape, strides, start and declared size may lie."""

  array: np.ndarray
  shape: tuple[int, ...] | None = None
  strides: tuple[int, ...] | None = None
  start: int = 0
  size: int | None = None


class Emitter:
  """Opcodes of protocol 2; arrays become storages, in `arrays` by key."""

  def __init__(self) -> None:
    self.arrays: dict[str, np.ndarray] = {}
    self._keys: dict[int, str] = {}

  def dumps(self, value: Any) -> bytes:
    return b"\x80\x02" + self._emit(value) + b"."

  def _emit(self, value: Any) -> bytes:
    match value:
      case None:
        return b"N"
      case bool():
        return b"\x88" if value else b"\x89"
      case int():
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
      case float():
        return b"G" + struct.pack(">d", value)
      case str():
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
      case bytes():
        return b"B" + struct.pack("<I", len(value)) + value
      case tuple():
        return b"(" + b"".join(map(self._emit, value)) + b"t"
      case list():
        return b"](" + b"".join(map(self._emit, value)) + b"e"
      case collections.OrderedDict():
        empty = self._emit(Call(Global("collections", "OrderedDict"), ()))
        return empty + self._items(value) + self._emit({"_metadata": {}}) + b"b"
      case dict():
        return b"}" + self._items(value)
      case Raw():
        return value.opcodes
      case Global():
        return f"c{value.module}\n{value.name}\n".encode()
      case Call():
        state = b"" if value.state is None else self._emit(value.state) + b"b"
        return self._emit(value.function) + self._emit(value.arguments) + b"R" + state
      case Persistent():
        return self._emit(value.value) + b"Q"
      case np.ndarray():
        return self._emit(Tensor(value))
      case Tensor():
        return self._tensor(value)
    raise TypeError(type(value))

  def _items(self, values: Mapping) -> bytes:
    return b"(" + b"".join(self._emit(k) + self._emit(v) for k, v in values.items()) + b"u"

  def _tensor(self, tensor: Tensor) -> bytes:
    array = tensor.array
    key = self._keys.setdefault(id(array), str(len(self._keys)))
    self.arrays[key] = array
    strides = tuple(step // array.itemsize for step in array.strides)
    kind = Global("torch", STORAGES[array.dtype])
    size = array.size if tensor.size is None else tensor.size
    legacy = (None,) if isinstance(self, LegacyEmitter) else ()
    storage = Persistent(("storage", kind, key, "cpu", size, *legacy))
    shape = array.shape if tensor.shape is None else tensor.shape
    strides = strides if tensor.strides is None else tensor.strides
    hooks = Call(Global("collections", "OrderedDict"), ())
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return self._emit(Call(rebuild, (storage, tensor.start, shape, strides, False, hooks)))


class LegacyEmitter(Emitter):
  """Persistent ids of the legacy layout also name a view."""


def _bytes(array: np.ndarray) -> np.ndarray:
  """As they lie in memory."""
  return array.ravel(order="K").view(np.uint8)


def zip_file(
  path: pathlib.Path,
  content: Any,
  *,
  order: bytes = b"little",
  members: Mapping[str, bytes] | None = None,
  compression: int = zipfile.ZIP_STORED,
  root: str = "archive",
) -> pathlib.Path:
  """torch.save's zip layout; `members` adds files to it."""
  emitter = Emitter()
  opcodes = emitter.dumps(content)
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr(f"{root}/data.pkl", opcodes)
    archive.writestr(f"{root}/version", "3\n")
    archive.writestr(f"{root}/byteorder", order)
    for key, array in emitter.arrays.items():
      with archive.open(f"{root}/data/{key}", "w") as member:
        member.write(_bytes(array))
    for name, data in (members or {}).items():
      archive.writestr(name, data)
  return path


def legacy_bytes(content: Any, *, little_endian: bool = True) -> bytes:
  """torch.save's layout before its zip files."""
  emitter = LegacyEmitter()
  stream = io.BytesIO()
  machine = {"protocol_version": PROTOCOL, "little_endian": little_endian, "type_sizes": {}}
  for value in (MAGIC, PROTOCOL, machine, content):
    stream.write(emitter.dumps(value))
  stream.write(emitter.dumps(list(emitter.arrays)))
  for array in emitter.arrays.values():
    stream.write(struct.pack("<q", array.size) + _bytes(array).tobytes())
  return stream.getvalue()


def legacy_file(path: pathlib.Path, content: Any, **options: Any) -> pathlib.Path:
  """A file of that layout."""
  path.write_bytes(legacy_bytes(content, **options))
  return path


# EDM's networks: our own stand-ins for the classes that its pickles name, pickled by Python's own
# pickler while modules of those names exist.


def _never(*arguments: Any) -> None:
  raise AssertionError("a file was executed")


def _stand_in(module: str, name: str, base: type = object) -> type:
  return type(name, (base,), {"__module__": module, "__qualname__": name})


def _function(module: str, name: str) -> Callable[..., None]:
  function = types.FunctionType(_never.__code__, {"AssertionError": AssertionError}, name)
  function.__module__, function.__qualname__ = module, name
  return function


REBUILD_TENSOR = _function("torch._utils", "_rebuild_tensor_v2")
REBUILD_PARAMETER = _function("torch._utils", "_rebuild_parameter")
LOAD_FROM_BYTES = _function("torch.storage", "_load_from_bytes")
RECONSTRUCT = _function("torch_utils.persistence", "_reconstruct_persistent_obj")
EasyDict = _stand_in("dnnlib.util", "EasyDict", dict)
ModuleDict = _stand_in("torch.nn.modules.container", "ModuleDict")


@contextlib.contextmanager
def _modules() -> Iterator[None]:
  """The modules that the stand-ins claim to be from, for as long as they are pickled."""
  members = (REBUILD_TENSOR, REBUILD_PARAMETER, LOAD_FROM_BYTES, RECONSTRUCT, EasyDict, ModuleDict)
  names = {member.__module__ for member in members}
  names |= {name.rpartition(".")[0] for name in names} | {"torch", "torch.nn"}
  before = {name: sys.modules.get(name) for name in names}
  for name in names:
    sys.modules[name] = types.ModuleType(name)
  for member in members:
    setattr(sys.modules[member.__module__], member.__qualname__, member)
  try:
    yield
  finally:
    for name, module in before.items():
      sys.modules.pop(name)
      if module is not None:
        sys.modules[name] = module


class _Parameter:
  def __init__(self, array: np.ndarray):
    self.array = array

  def __reduce__(self):
    return REBUILD_PARAMETER, (_Stored(self.array), True, collections.OrderedDict())


class _Stored:
  def __init__(self, array: np.ndarray):
    self.array = array

  def __reduce__(self):
    strides = tuple(step // self.array.itemsize for step in self.array.strides)
    hooks = collections.OrderedDict()
    return REBUILD_TENSOR, (_Storage(self.array), 0, self.array.shape, strides, False, hooks)


class _Storage:
  def __init__(self, array: np.ndarray):
    self.array = array

  def __reduce__(self):
    kind = Global("torch", STORAGES[self.array.dtype])
    storage = Persistent(("storage", kind, "94000000000000", "cpu", self.array.size, None))
    emitter = LegacyEmitter()
    machine = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {}}
    values = (MAGIC, PROTOCOL, machine, storage, ["94000000000000"])
    head = b"".join(map(emitter.dumps, values))
    return LOAD_FROM_BYTES, (
      head + struct.pack("<q", self.array.size) + _bytes(self.array).tobytes(),
    )


class _PersistentModule:
  """A module of a class that pickles its source code along."""

  def __init__(self, class_name: str, source: str, state: dict[str, Any]):
    self.class_name, self.source, self.state = class_name, source, state

  def __reduce__(self):
    meta = {
      "type": "class",
      "version": 6,
      "module_src": self.source,
      "class_name": self.class_name,
      "state": self.state,
    }
    return RECONSTRUCT, (meta,), None


def _module_state() -> dict[str, Any]:
  """What every torch module keeps."""
  return {
    "training": False,
    "_parameters": collections.OrderedDict(),
    "_buffers": collections.OrderedDict(),
    "_non_persistent_buffers_set": set(),
    "_backward_hooks": collections.OrderedDict(),
    "_is_full_backward_hook": None,
    "_modules": collections.OrderedDict(),
  }


def _tree(tensors: Mapping[str, np.ndarray], source: str, made: Mapping[str, Any]) -> Any:
  """Modules for dotted names. `made` gives classes and settings by the modules' dotted names."""

  def build(prefix: str) -> Any:
    state = _module_state()
    names = list(
      dict.fromkeys(k[len(prefix) :].partition(".")[0] for k in tensors if k.startswith(prefix))
    )
    for name in names:
      full = prefix + name
      if full not in tensors:
        state["_modules"][name] = build(f"{full}.")
      elif name in ("resample_filter", "freqs"):
        state["_buffers"][name] = _Stored(tensors[full])
      else:
        state["_parameters"][name] = _Parameter(tensors[full])
    if prefix in ("model.enc.", "model.dec."):
      container = ModuleDict()
      container.__dict__.update(state)
      return container
    class_name, attributes, settings = made.get(prefix, ("Conv2d", {}, {}))
    options = {"_init_args": (), "_init_kwargs": EasyDict(settings)}
    return _PersistentModule(class_name, source, {**state, **attributes, **options})

  return build("")


def edm_pickle(
  path: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  *,
  precond: str = "EDMPrecond",
  model: str = "DhariwalUNet",
  sigma_data: float = 0.5,
  source: str = "",
  **settings: Any,
) -> pathlib.Path:
  """A pickle like those of EDM: {"ema": network}, every module with its `source` code."""
  outer = {"use_fp16": False, "sigma_max": float("inf"), "model_type": model, **settings}
  attributes = {"sigma_data": sigma_data} if precond == "EDMPrecond" else {}
  made = {"": (precond, attributes, outer), "model.": (model, {}, settings)}
  loss = _PersistentModule("EDMLoss", source, {"P_mean": -1.2, "P_std": 1.2})
  content = {"ema": _tree(tensors, source, made), "loss_fn": loss, "dataset_kwargs": EasyDict()}
  with _modules(), open(path, "wb") as file:
    pickle.dump(content, file, protocol=4)
  return path


def random_tree(shapes: Any, seed: int = 0, std: float = 0.02) -> Any:
  """float32 arrays for a tree of shapes, as `jax.eval_shape` gives it."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape, np.float32) * np.float32(std), shapes
  )
