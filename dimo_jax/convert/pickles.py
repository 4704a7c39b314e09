"""Reads PyTorch's and EDM's pickles as data. Nothing in a file is imported, called or executed.

`pickletools.genops` decodes the opcodes and a small machine of our own builds the values; Python's
unpickler, which looks up and calls what a file names, has no part in it. What a file names becomes
an inert `Opaque`, and a name outside the lists below is refused. Objects that trainers leave beside
the weights (callbacks, hyper-parameters, numpy scalars) are not made: they stay `Opaque`, and what
the file would do with them is dropped.

Tensors stay on the disk: they are offsets into the file, checked against its size, until `load`.

Layouts: torch's zip files; its older, legacy files; plain pickles of EDM networks, whose modules
arrive as `StoredModule` (their source code is in the file, and ignored).
"""

import dataclasses
import functools
import io
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import ml_dtypes
import numpy as np

from dimo_jax.types import UserError

_MAX_OPCODES = 5_000_000  # of one file; a network of 300 M parameters has some 100,000
_MAX_PICKLE_BYTES = 1 << 26  # of the pickle inside a zip file, which holds no tensors
_MAX_LINE = 1 << 12  # of a name or number written as text
_MAX_DIMENSIONS = 16
_MAX_NUMBER = 1 << 63  # of elements and their places; products of longer numbers take long
_MAX_REUSE = 4  # bytes that the tensors declare together, over the bytes of the file
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LOCAL_HEADER_BYTES = 30  # of a zip member, before its name

_STORAGES = {
  "torch.DoubleStorage": np.dtype("<f8"),
  "torch.FloatStorage": np.dtype("<f4"),
  "torch.HalfStorage": np.dtype("<f2"),
  "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "torch.LongStorage": np.dtype("<i8"),
  "torch.IntStorage": np.dtype("<i4"),
  "torch.ShortStorage": np.dtype("<i2"),
  "torch.CharStorage": np.dtype("i1"),
  "torch.ByteStorage": np.dtype("u1"),
  "torch.BoolStorage": np.dtype("?"),
}
_MAPPINGS = {"collections.OrderedDict", "dnnlib.util.EasyDict"}
_MODULES = "torch.nn.modules."  # containers that EDM's networks keep their blocks in
# Never made: `Opaque`.
_INERT_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
_INERT = {
  "__builtin__.set",
  "_codecs.encode",
  "argparse.Namespace",
  "builtins.dict",
  "builtins.int",
  "builtins.list",
  "builtins.set",
  "builtins.str",
  "collections.defaultdict",
  "numpy._core.multiarray._reconstruct",
  "numpy._core.multiarray.scalar",
  "numpy.core.multiarray._reconstruct",
  "numpy.core.multiarray.scalar",
  "numpy.dtype",
  "numpy.ndarray",
  "pathlib.PosixPath",
  "torch.Size",
  "torch.bfloat16",
  "torch.device",
  "torch.float16",
  "torch.float32",
  "torch.float64",
  "torch.int64",
  "typing.Any",
}


@dataclasses.dataclass(frozen=True)
class Opaque:
  """Something that a file names, or an object of that name that was not made."""

  name: str


@dataclasses.dataclass(eq=False)
class StoredModule:
  """A pickled network or one of its modules.

  Attributes:
    name: of its class.
    state: its attributes, as torch's modules keep them (`_parameters`, `_buffers`, `_modules`).
  """

  name: str
  state: dict[Any, Any]


@dataclasses.dataclass(eq=False)
class _Storage:
  """Bytes of the file that tensors are cut out of."""

  dtype: np.dtype
  size: int  # in elements
  offset: int | None = None  # in the file; None until a legacy file says


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
  """A tensor on the disk."""

  path: Path
  shape: tuple[int, ...]
  strides: tuple[int, ...]  # in elements
  start: int  # its first element in its storage
  storage: _Storage

  @property
  def dtype(self) -> np.dtype:
    """The stored type."""
    return self.storage.dtype

  @property
  def nbytes(self) -> int:
    """Size once loaded."""
    return math.prod(self.shape) * self.dtype.itemsize

  def load(self) -> np.ndarray:
    """The array, read from the file: [shape], row-major, of the stored type."""
    assert self.storage.offset is not None
    span = _span(self.shape, self.strides)
    offset = self.storage.offset + self.start * self.dtype.itemsize
    flat = np.fromfile(self.path, self.dtype, span, offset=offset)
    if len(flat) != span:
      raise UserError(f"{self.path} was cut short while it was read")
    strides = [stride * self.dtype.itemsize for stride in self.strides]
    view = np.lib.stride_tricks.as_strided(flat, self.shape, strides)
    return np.ascontiguousarray(view).reshape(self.shape)


def read(path: Path) -> tuple[Any, str]:
  """(content, layout) of a pickled file; the layout is "zip", "legacy" or "plain".

  Contents are dicts, lists, tuples, sets, strings, numbers, `StoredTensor`, `StoredModule` and
  `Opaque`; byte strings are left unread.

  Raises:
    UserError: the file is damaged, names what is not read, or declares tensors that are not there.
  """
  try:
    with open(path, "rb") as file:
      magic = file.read(4)
    if magic[:2] == b"PK":
      content, layout = _read_zip(path), "zip"
    elif magic[:1] == b"\x80":
      content, layout = _read_pickles(path)
    else:
      raise UserError(f"{path} is no PyTorch file, EDM pickle or safetensors file")
    return content, layout
  except FileNotFoundError as error:
    raise UserError(f"{path} does not exist") from error
  except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
    raise UserError(f"{path} cannot be read: {_line(error) or type(error).__name__}") from error


class _Budget:
  """What reading one file may still take, over all the pickles in it.

  Attributes:
    path: of the file.
  """

  def __init__(self, path: Path):
    self.path = path
    self._opcodes = _MAX_OPCODES
    self._bytes = _MAX_REUSE * os.path.getsize(path)

  def take(self, opcodes: int) -> None:
    """Opcodes, or items that one of them copies."""
    self._opcodes -= opcodes
    if self._opcodes < 0:
      raise UserError(f"{self.path} has pickles of more than {_MAX_OPCODES} opcodes")

  def declare(self, num_bytes: int) -> None:
    """The size of a tensor."""
    self._bytes -= num_bytes
    if self._bytes < 0:
      raise UserError(f"{self.path} declares tensors of many times its size")


@dataclasses.dataclass(frozen=True)
class _Blob:
  """A byte string of the file."""

  offset: int
  size: int


class _Mark:
  """Where a group on the stack begins."""


_MARK = _Mark()


class _Window:
  """Part of a file, for `genops`: never reads beyond it, so no declared size is believed."""

  def __init__(self, file: io.BufferedReader | io.BytesIO, start: int, end: int):
    self._file, self._end = file, end
    file.seek(start)

  def tell(self) -> int:
    return self._file.tell()

  def read(self, size: int) -> bytes:
    return self._file.read(max(0, min(size, self._end - self.tell())))

  def readline(self) -> bytes:
    return self._file.readline(max(0, min(_MAX_LINE, self._end - self.tell())))

  def skip(self, size: int) -> bool:
    """Passes over bytes; False where there are fewer."""
    if size > self._end - self.tell():
      return False
    self._file.seek(size, os.SEEK_CUR)
    return True


def _key(value: Any) -> Any:
  """A dictionary's key; what takes long to hash is no key."""
  if value is None or type(value) in (str, float, bool, Opaque):
    return value
  if type(value) is int and -_MAX_NUMBER < value < _MAX_NUMBER:
    return value
  raise ValueError(f"a key of type {type(value).__name__}")


def _keys(values: list[Any]) -> list[Any]:
  return [_key(value) for value in values]


def _pairs(values: list[Any]) -> dict[Any, Any]:
  return dict(zip(_keys(values[::2]), values[1::2], strict=True))


_IGNORED = {"PROTO", "FRAME"}
_VALUES = {
  *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
  *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
  "MARK": lambda: _MARK,
  "EMPTY_TUPLE": tuple,
  "EMPTY_LIST": list,
  "EMPTY_DICT": dict,
  "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GROUPS: dict[str, Callable[[list[Any]], Any]] = {
  "TUPLE": tuple,
  "LIST": list,
  "DICT": _pairs,
  "FROZENSET": lambda values: frozenset(_keys(values)),
}


class _Machine:
  """Builds the value of one pickle. Its opcodes are those that the known writers use."""

  def __init__(
    self,
    budget: _Budget,
    storage: Callable[[str, np.dtype, int], _Storage],
    inner: Callable[[_Blob], Any] | None = None,
  ):
    """
    Args:
      budget: of the file.
      storage: (key, type, number of elements) -> the storage that a persistent id names.
      inner: reads the pickle inside a byte string; None where there may be none.
    """
    self._budget, self._storage, self._inner = budget, storage, inner
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}
    self._calls: dict[str, Callable[..., Any]] = {
      "collections.OrderedDict": self._mapping,
      "torch._utils._rebuild_tensor": self._tensor,
      "torch._utils._rebuild_tensor_v2": self._tensor,
      "torch._utils._rebuild_parameter": self._parameter,
      "torch._utils._rebuild_parameter_with_state": self._parameter,
      "torch_utils.persistence._reconstruct_persistent_obj": self._persistent,
    }
    if inner is not None:
      self._calls["torch.storage._load_from_bytes"] = self._load_from_bytes

  def run(self, window: _Window) -> Any:
    """The value of the pickle that begins here."""
    try:
      for opcode, argument, _ in pickletools.genops(cast(BinaryIO, window)):
        self._budget.take(1)
        if opcode.name == "STOP":
          value = self._stack.pop()
          if self._stack:
            raise self._error("is damaged: its pickle leaves something behind")
          return value
        self._apply(opcode.name, argument, window)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
      raise self._error(f"is damaged or no such file: {_line(error)}") from error
    raise self._error("is damaged: its pickle has no end")

  def _error(self, text: str) -> UserError:
    return UserError(f"{self._budget.path} {text}")

  def _apply(self, opcode: str, argument: Any, window: _Window) -> None:
    """Carries out one opcode."""
    stack = self._stack
    if opcode in _IGNORED:
      return
    if opcode in _VALUES:
      stack.append(argument)
    elif opcode in _CONSTANTS:
      stack.append(_CONSTANTS[opcode]())
    elif opcode in _BYTES:
      stack.append(_Blob(window.tell() - len(argument), len(argument)))
    elif opcode in _TUPLES:
      count = _TUPLES[opcode]
      stack[len(stack) - count :] = [tuple(self._top(count))]
    elif opcode in ("PUT", "BINPUT", "LONG_BINPUT"):
      self._memo[argument] = self._top(1)[0]
    elif opcode == "MEMOIZE":
      self._memo[len(self._memo)] = self._top(1)[0]
    elif opcode in ("GET", "BINGET", "LONG_BINGET"):
      stack.append(self._memo[argument])
    elif opcode in _GROUPS:
      stack.append(_GROUPS[opcode](self._group()))
    elif opcode in ("APPENDS", "ADDITEMS", "SETITEMS"):
      self._fill(opcode, self._group())
    elif opcode == "APPEND":
      self._fill("APPENDS", self._take(1))
    elif opcode == "SETITEM":
      self._fill("SETITEMS", self._take(2))
    elif opcode == "DUP":
      stack.append(self._top(1)[0])
    elif opcode == "POP":
      stack.pop()
    elif opcode == "POP_MARK":
      self._group()
    elif opcode == "GLOBAL":
      stack.append(self._named(*argument.split(" ", 1)))
    elif opcode == "STACK_GLOBAL":
      stack.append(self._named(*self._take(2)))
    elif opcode == "REDUCE":
      function, arguments = self._take(2)
      stack.append(self._call(function, arguments))
    elif opcode in ("NEWOBJ", "NEWOBJ_EX"):
      kind, *_ = self._take(2 + (opcode == "NEWOBJ_EX"))
      stack.append(self._new(kind))
    elif opcode == "BUILD":
      (state,) = self._take(1)
      self._build(self._top(1)[0], state)
    elif opcode == "BINPERSID":
      stack.append(self._persistent_id(*self._take(1)))
    else:
      raise self._error(f"holds the pickle opcode {opcode}, which no known writer uses: refused")

  def _top(self, count: int) -> list[Any]:
    values = self._stack[len(self._stack) - count :]
    if len(values) != count or any(value is _MARK for value in values):
      raise ValueError("a pickle takes more than it holds")
    return values

  def _take(self, count: int) -> list[Any]:
    values = self._top(count)
    del self._stack[len(self._stack) - count :]
    return values

  def _group(self) -> list[Any]:
    """Takes what lies above the last mark, and the mark."""
    for start in range(len(self._stack) - 1, -1, -1):
      if self._stack[start] is _MARK:
        values = self._stack[start + 1 :]
        del self._stack[start:]
        return values
    raise ValueError("a pickle has no mark")

  def _fill(self, opcode: str, values: list[Any]) -> None:
    target = self._top(1)[0]
    if isinstance(target, Opaque):
      return
    if opcode == "SETITEMS" and type(target) is dict:
      target.update(_pairs(values))
    elif opcode == "APPENDS" and type(target) is list:
      target.extend(values)
    elif opcode == "ADDITEMS" and type(target) is set:
      target.update(_keys(values))
    else:
      raise ValueError(f"{opcode} on {type(target).__name__}")

  def _named(self, module: Any, name: Any) -> Opaque:
    if not isinstance(module, str) or not isinstance(name, str):  # printing it may take for ever
      raise ValueError("a pickle names something by what is no text")
    full = f"{module}.{name}"
    known = (
      full in _STORAGES
      or full in _MAPPINGS
      or full in _INERT
      or full in self._calls
      or full.startswith((_MODULES, *_INERT_PACKAGES))
    )
    if not known:
      raise self._error(
        f"holds {_line(full)!r}, which is no tensor or plain container: refused, nothing was run"
      )
    return Opaque(full)

  def _call(self, function: Any, arguments: Any) -> Any:
    if not isinstance(function, Opaque) or not isinstance(arguments, tuple):
      raise ValueError("a pickle calls what has no name")
    if function.name in self._calls:
      return self._calls[function.name](*arguments)
    return self._new(function)

  def _new(self, kind: Any) -> Any:
    if not isinstance(kind, Opaque):
      raise ValueError("a pickle makes an object of what has no name")
    if kind.name in _MAPPINGS:
      return {}
    if kind.name.startswith(_MODULES):
      return StoredModule(kind.name.rpartition(".")[2], {})
    return Opaque(kind.name)

  def _build(self, target: Any, state: Any) -> None:
    if isinstance(target, StoredModule) and type(state) is dict:
      self._budget.take(len(state))
      target.state.update(state)
    elif not isinstance(target, (dict, Opaque)):  # attributes of these are dropped
      raise ValueError(f"BUILD on {type(target).__name__}")

  def _mapping(self, items: Any = ()) -> dict[Any, Any]:
    self._budget.take(len(items))
    return {_key(key): value for key, value in items}

  def _parameter(self, data: Any, *rest: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
      raise ValueError("a parameter without a tensor")
    return data

  def _persistent(self, meta: Any) -> StoredModule:
    if type(meta) is not dict or meta.get("type") != "class":
      raise ValueError("a persistent object that is no class")
    name, state = meta["class_name"], meta["state"]
    if not isinstance(name, str) or type(state) is not dict:
      raise ValueError("a persistent object without name or state")
    return StoredModule(name, state)

  def _load_from_bytes(self, blob: Any) -> Any:
    if not isinstance(blob, _Blob):
      raise ValueError("an inner file that is no byte string")
    assert self._inner is not None
    return self._inner(blob)

  def _persistent_id(self, value: Any) -> _Storage | Opaque:
    if isinstance(value, tuple) and value[:1] == ("module",) and isinstance(value[1], Opaque):
      return value[1]  # a class, with its source code behind it
    if not isinstance(value, tuple) or len(value) not in (5, 6) or value[0] != "storage":
      raise ValueError("a persistent id that is no storage")
    kind, key, _, size = value[1:5]
    if not isinstance(kind, Opaque) or kind.name not in _STORAGES:
      raise ValueError("a storage of an unknown type")
    if not isinstance(key, str) or type(size) is not int or not 0 <= size < _MAX_NUMBER:
      raise ValueError("a storage without key or size")
    if len(value) == 6 and value[5] is not None:
      raise ValueError("a view of a storage, which PyTorch wrote before 0.4")
    return self._storage(key, _STORAGES[kind.name], size)

  def _tensor(self, storage: Any, start: Any, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
      raise ValueError("a tensor without storage, shape or strides")
    numbers = (start, *shape, *strides) if len(shape) <= _MAX_DIMENSIONS else (None,)
    if any(type(n) is not int or not 0 <= n < _MAX_NUMBER for n in numbers):
      raise ValueError("a tensor of impossible shape or strides")
    if start + _span(shape, strides) > storage.size:
      raise self._error(
        f"declares a tensor of shape {tuple(shape)}, strides {tuple(strides)} from {start} on, in"
        f" a storage of {storage.size} elements"
      )
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
      if size > 1 and 0 not in shape:
        if stride <= reach:
          raise self._error(f"declares a tensor of shape {tuple(shape)} that overlaps itself")
        reach += (size - 1) * stride
    tensor = StoredTensor(self._budget.path, tuple(shape), tuple(strides), start, storage)
    self._budget.declare(tensor.nbytes)
    return tensor


def _read_zip(path: Path) -> Any:
  """The content of torch's zip files: a pickle `ROOT/data.pkl`, storages `ROOT/data/KEY`."""
  with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
    members = _members(path, archive)
    pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
      raise UserError(f"{path} is a zip file without one NAME/data.pkl: not PyTorch's")
    root = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    for member in filter(None, (order, members[pickles[0]])):
      if member.file_size > _MAX_PICKLE_BYTES:
        raise UserError(f"{path} has a pickle of more than {_MAX_PICKLE_BYTES} bytes")
    if order is not None and archive.read(order) != b"little":
      raise UserError(f"{path} was written big-endian; save it on a little-endian machine")
    content = archive.read(pickles[0])
    storages: dict[str, _Storage] = {}

    def storage(key: str, dtype: np.dtype, size: int) -> _Storage:
      if key not in storages:
        member = members.get(f"{root}data/{key}")
        if member is None:
          raise UserError(f"{path} lacks the storage {_line(key)!r}")
        storages[key] = _Storage(dtype, member.file_size // dtype.itemsize, _start(file, member))
      return _agreed(path, storages[key], key, dtype, size)

    window = _Window(io.BytesIO(content), 0, len(content))
    return _Machine(_Budget(path), storage).run(window)


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
  """The files of an archive by name, all of them stored as they are, none on top of another."""
  members: dict[str, zipfile.ZipInfo] = {}
  end = 0
  for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
    name = member.filename
    if name in members or name.startswith("/") or "\\" in name or ".." in name.split("/"):
      raise UserError(f"{path} has a member {_line(name)!r}, as no PyTorch file has: refused")
    plain = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
    if not plain or member.file_size != member.compress_size:
      raise UserError(f"{path} is compressed or encrypted, as no PyTorch file is: refused")
    if member.header_offset < end:
      raise UserError(f"{path} has members that overlap: refused")
    end = member.header_offset + _LOCAL_HEADER_BYTES + len(name.encode()) + member.file_size
    members[name] = member
  return members


def _start(file: io.BufferedReader, member: zipfile.ZipInfo) -> int:
  """Where the bytes of a stored member begin."""
  file.seek(member.header_offset)
  header = file.read(_LOCAL_HEADER_BYTES)
  if header[:4] != b"PK\x03\x04":
    raise zipfile.BadZipFile(f"no header before {_line(member.filename)!r}")
  name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
  start = member.header_offset + _LOCAL_HEADER_BYTES + name + extra
  if start + member.file_size > os.fstat(file.fileno()).st_size:
    raise zipfile.BadZipFile(f"{_line(member.filename)!r} ends beyond the file")
  return start


def _read_pickles(path: Path) -> tuple[Any, str]:
  """(content, layout) of a file that begins with a pickle: torch's legacy layout, or any other."""
  with open(path, "rb") as file:
    window = _Window(file, 0, os.fstat(file.fileno()).st_size)
    budget = _Budget(path)
    inner = functools.cache(lambda blob: _inner(budget, blob))
    first = _Machine(budget, _no_storage(path), inner).run(window)
    if first != _LEGACY_MAGIC or type(first) is not int:
      return first, "plain"
    return _read_legacy(budget, window), "legacy"


def _inner(budget: _Budget, blob: _Blob) -> Any:
  """The content of a legacy file inside another one."""
  path = budget.path
  with open(path, "rb") as file:
    window = _Window(file, blob.offset, blob.offset + blob.size)
    if _Machine(budget, _no_storage(path)).run(window) != _LEGACY_MAGIC:
      raise UserError(f"{path} has an inner file that is not PyTorch's")
    return _read_legacy(budget, window)


def _read_legacy(budget: _Budget, window: _Window) -> Any:
  """What follows the magic number: version, byte order, content, keys, then each storage."""
  path = budget.path
  storages: dict[str, _Storage] = {}

  def storage(key: str, dtype: np.dtype, size: int) -> _Storage:
    storages.setdefault(key, _Storage(dtype, size))
    return _agreed(path, storages[key], key, dtype, size)

  def run() -> Any:
    return _Machine(budget, storage).run(window)

  if run() != _LEGACY_PROTOCOL:
    raise UserError(f"{path} is of an unknown version of PyTorch's legacy layout")
  machine = run()
  if type(machine) is not dict or machine.get("little_endian") is not True:
    raise UserError(f"{path} was written big-endian; save it on a little-endian machine")
  content, keys = run(), run()
  if type(keys) is not list or set(_keys(keys)) != set(storages) or len(keys) != len(storages):
    raise UserError(f"{path} is damaged: its storages are not those that it names")
  for key in keys:
    size = int.from_bytes(window.read(8), "little")
    _agreed(path, storages[key], key, storages[key].dtype, size)
    storages[key].offset = window.tell()
    if not window.skip(size * storages[key].dtype.itemsize):
      raise UserError(f"{path} is cut short: the storage {_line(key)!r} ends beyond it")
  return content


def _no_storage(path: Path) -> Callable[[str, np.dtype, int], _Storage]:
  def storage(key: str, dtype: np.dtype, size: int) -> _Storage:
    raise UserError(f"{path} names a storage {_line(key)!r}, and has none")

  return storage


def _agreed(path: Path, storage: _Storage, key: str, dtype: np.dtype, size: int) -> _Storage:
  """The storage, if it is what a persistent id or the bytes say."""
  if storage.dtype != dtype or storage.size != size:
    raise UserError(
      f"{path} declares {size} elements of {dtype} in the storage {_line(key)!r}, which holds"
      f" {storage.size} of {storage.dtype}"
    )
  return storage


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
  """Elements between the first and the last of a tensor, both counted."""
  if 0 in shape:
    return 0
  return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _line(value: object) -> str:
  """A short single line of a text that a file gives."""
  return " ".join(str(value).split())[:100]
