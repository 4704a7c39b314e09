"""The reader of pickles: what it reads, and that it refuses everything else without running it."""

import collections
import io
import os
import pickle
import struct
import time
import zipfile
from contextlib import nullcontext

import ml_dtypes
import numpy as np
import pytest

from dimo_jax.convert import files, pickles
from dimo_jax.types import UserError
from tests import published
from tests.published import Call, Emitter, Global, LegacyEmitter, Persistent, Raw, Tensor

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
WRITERS = {"zip": published.zip_file, "legacy": published.legacy_file}


def system(path):
  """What would make a file at `path` if it were run."""
  return Call(Global("os", "system"), (f"touch {path}",))


def stack_global(module, name):
  text = b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, name))
  return Raw(text + b"\x93")


# Hostile values, and the name or opcode that the refusal must tell. `canary` would be made by them.
HOSTILE = {
  "os.system": (system, "'os.system'"),
  "posix by protocol 4": (
    lambda canary: Call(stack_global("posix", "system"), (f"touch {canary}",)),
    "'posix.system'",
  ),
  "eval": (lambda canary: Call(Global("builtins", "eval"), (f"open({canary!r}, 'w')",)), "eval"),
  "python 2's eval": (lambda _: Call(Global("__builtin__", "eval"), ("1",)), "__builtin__.eval"),
  "getattr": (
    lambda canary: Call(Call(Global("builtins", "getattr"), (Global("os", "path"), "join")), ()),
    "builtins.getattr",
  ),
  "nested reduce": (
    lambda canary: Call(Global("torch._utils", "_rebuild_parameter"), (system(canary), True, {})),
    "'os.system'",
  ),
  "called result": (
    lambda canary: Call(Call(Global("collections", "OrderedDict"), ()), (str(canary),)),
    "what has no name",
  ),
  "set as state": (
    lambda canary: Call(Global("collections", "OrderedDict"), (), {"x": system(canary)}),
    "'os.system'",
  ),
  "dotted name": (
    lambda canary: Call(stack_global("torch", "serialization.os.system"), (f"touch {canary}",)),
    "torch.serialization.os.system",
  ),
  "numpy runs": (lambda _: Call(Global("numpy", "load"), ("x",)), "numpy.load"),
  "a package beside": (lambda _: Call(Global("lightning_x", "f"), ()), "lightning_x.f"),
  "jit": (lambda _: Global("__torch__.torch.nn", "Linear"), "__torch__.torch.nn.Linear"),
  "old instance": (lambda _: Raw(b"(ios\nsystem\n"), "INST"),
  "old object": (lambda _: Raw(b"(cargparse\nNamespace\no"), "OBJ"),
  "extension": (lambda _: Raw(b"\x82\x01"), "EXT1"),
  "text persistent id": (lambda _: Raw(b"Pos.system\n"), "PERSID"),
  "new object": (lambda _: Raw(b"csubprocess\nPopen\n)\x81"), "subprocess.Popen"),
  "name that doubles when printed": (
    lambda _: Raw(b")" + b"2\x86" * 22 + b"\x8c\x01x\x93"),
    "by what is no text",
  ),
  "line break in a name": (lambda _: Raw(b"\x8c\x03o\ns\x8c\x06system\x93"), "'o s.system'"),
}


@pytest.mark.parametrize("layout", ["zip", "legacy", "plain", "inner"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name_and_not_run(tmp_path, name, layout):
  make, needle = HOSTILE[name]
  canary, path = tmp_path / "canary", tmp_path / "weights.bin"
  content = {"state_dict": {"w": X}, "callbacks": make(canary)}
  if layout in WRITERS:
    WRITERS[layout](path, content)
  elif layout == "plain":
    path.write_bytes(Emitter().dumps({"ema": make(canary)}))
  else:
    inner = published.legacy_bytes(make(canary))
    path.write_bytes(
      Emitter().dumps({"ema": Call(Global("torch.storage", "_load_from_bytes"), (inner,))})
    )
  with pytest.raises(UserError) as error:
    pickles.read(path)
  assert needle in str(error.value) and str(path) in str(error.value)
  assert "\n" not in str(error.value)
  assert not canary.exists()


def test_the_hostile_files_would_run_in_pythons_unpickler(tmp_path):
  canary = tmp_path / "canary"
  pickle.loads(Emitter().dumps(system(canary)))
  assert canary.exists()


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize(
  "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_]
)
def test_arrays_arrive_as_they_were(tmp_path, layout, dtype):
  whole = X.astype(dtype)
  scalar, empty = np.array(3, dtype), np.zeros((0, 4), dtype)
  column = np.asfortranarray(whole[0])
  content = collections.OrderedDict(whole=whole, scalar=scalar, empty=empty, column=column)
  content["row"] = Tensor(whole, (4,), (1,), 16)  # shares the storage of `whole`
  content["stepped"] = Tensor(whole, (2, 2), (12, 2), 1)
  tensors, found = pickles.read(WRITERS[layout](tmp_path / "x", {"state_dict": content}))
  assert found == layout
  stored = tensors["state_dict"]
  expected = {"whole": whole, "scalar": scalar, "empty": empty, "column": column}
  expected |= {"row": whole[1, 1], "stepped": whole.reshape(2, 12)[:, 1:5:2]}
  assert stored.keys() == expected.keys()
  for name, value in expected.items():
    loaded = stored[name].load()
    assert (
      loaded.dtype == value.dtype and loaded.flags["C_CONTIGUOUS"] and loaded.flags["WRITEABLE"]
    )
    np.testing.assert_array_equal(loaded, value, err_msg=name)


def test_what_trainers_leave_beside_the_weights_stays_inert(tmp_path):
  checkpoint = Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
  number = (Call(Global("numpy", "dtype"), ("f8", False, True), (3, "<", None)), b"12345678")
  content = {
    "state_dict": {"w": X},
    "callbacks": {checkpoint: {"best": Call(Global("numpy.core.multiarray", "scalar"), number)}},
    "hyper_parameters": Call(Global("argparse", "Namespace"), (), {"lr": 0.1}),
    "epoch": 7,
    "loss": 0.25,
  }
  path = published.zip_file(tmp_path / "last.ckpt", content)
  read, _ = pickles.read(path)
  assert read["hyper_parameters"] == pickles.Opaque("argparse.Namespace")
  [(name, values)] = read["callbacks"].items()
  assert name == pickles.Opaque("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
  assert values == {"best": pickles.Opaque("numpy.core.multiarray.scalar")}
  assert files.read(path).settings == {"epoch": 7, "loss": 0.25}


def zip_with(**options):
  return lambda path: published.zip_file(path, {"w": X}, **options)


def damaged_zip(change):
  """A zip file whose bytes are changed by a function."""

  def write(path):
    data = bytearray(published.zip_file(path, {"w": X}).read_bytes())
    change(data)
    path.write_bytes(data)

  return write


def point_to(source, target):
  """Lets the directory's entry of a member point to another member's header."""

  def change(data):
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
      offset = archive.getinfo(target).header_offset
    entry = data.rfind(source.encode()) - 46  # the last occurrence is the directory's
    data[entry + 42 : entry + 46] = struct.pack("<I", offset)

  return change


def tensors(*values):
  return lambda path: published.zip_file(path, {str(i): v for i, v in enumerate(values)})


def raw(opcodes):
  return lambda path: path.write_bytes(opcodes)


DAMAGED = {
  "a path upwards": (zip_with(members={"archive/../../evil": b""}), "'archive/../../evil'"),
  "an absolute path": (zip_with(members={"/etc/evil": b""}), "'/etc/evil'"),
  "a path of Windows": (zip_with(members={"a\\..\\evil": b""}), "a member"),
  "two pickles": (zip_with(members={"other/data.pkl": b""}), "without one NAME/data.pkl"),
  "compressed": (zip_with(compression=zipfile.ZIP_DEFLATED), "compressed"),
  "big-endian": (zip_with(order=b"big"), "big-endian"),
  "legacy big-endian": (
    lambda path: published.legacy_file(path, {"w": X}, little_endian=False),
    "big-endian",
  ),
  "members that overlap": (damaged_zip(point_to("archive/data/0", "archive/byteorder")), "overlap"),
  "huge shape": (tensors(Tensor(X, (2**40,), (1,))), "shape (1099511627776,)"),
  "huge storage": (tensors(Tensor(X, (2**40,), (1,), size=2**40)), "1099511627776 elements"),
  "huge legacy storage": (
    lambda path: published.legacy_file(path, {"w": Tensor(X, (2, 3), (3, 1), size=2**40)}),
    "declares 24 elements",
  ),
  "huge legacy storage that agrees": (
    lambda path: path.write_bytes(
      published.legacy_bytes({"w": Tensor(X, (2, 3), (3, 1), size=2**62)}).replace(
        struct.pack("<q", X.size), struct.pack("<q", 2**62)
      )
    ),
    "cut short",
  ),
  "repeated element": (tensors(Tensor(X, (2**40,), (0,))), "overlaps itself"),
  "overlapping rows": (tensors(Tensor(X, (4, 4), (3, 1))), "overlaps itself"),
  "beyond the storage": (tensors(Tensor(X, (4,), (1,), 21)), "from 21 on"),
  "before the storage": (tensors(Tensor(X, (4,), (1,), -1)), "impossible"),
  "negative stride": (tensors(Tensor(X, (4,), (-1,), 8)), "impossible"),
  "negative size": (tensors(Tensor(X, (-4,), (1,))), "impossible"),
  "fewer strides": (tensors(Tensor(X, (4, 4), (1,))), "strides"),
  "many dimensions": (tensors(Tensor(X, (1,) * 99, (1,) * 99)), "impossible"),
  "many times one storage": (
    lambda path: published.zip_file(path, {str(i): BIG for i in range(9)}),
    "many times its size",
  ),
  "no storage": (
    lambda path: path.write_bytes(Emitter().dumps({"w": X})),
    "names a storage '0', and has none",
  ),
  "storage of an unknown type": (
    lambda path: published.zip_file(
      path, {"w": Persistent(("storage", Global("torch", "device"), "0", "cpu", 4))}
    ),
    "unknown type",
  ),
  "view of a storage": (
    lambda path: path.write_bytes(
      b"".join(
        map(
          LegacyEmitter().dumps,
          (
            published.MAGIC,
            published.PROTOCOL,
            {"little_endian": True},
            Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", 4, ("1", 0, 2))),
          ),
        )
      )
    ),
    "before 0.4",
  ),
  "storage that is not named": (
    lambda path: path.write_bytes(published.legacy_bytes([1]).replace(b"](e.", b"](X\1\0\0\0ae.")),
    "not those that it names",
  ),
  "unknown version": (
    raw(b"".join(map(Emitter().dumps, (published.MAGIC, 9)))),
    "unknown version",
  ),
  "no pickle": (raw(b"hello"), "no PyTorch file"),
  "no opcode": (raw(b"\x80\x02\xff."), "damaged"),
  "no end": (raw(b"\x80\x02}"), "damaged"),
  "something left": (raw(b"\x80\x02}}."), "leaves something behind"),
  "nothing": (raw(b"\x80\x02."), "damaged"),
  "unknown memo": (raw(b"\x80\x02h\x07."), "damaged"),
  "tuple through a mark": (raw(b"\x80\x02N(\x86."), "damaged"),
  "declared bytes": (raw(b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x."), "damaged"),
  "declared text": (raw(b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x."), "damaged"),
  "shape of long numbers": (tensors(Tensor(X, (0, 1 << 99, 1 << 99), (1, 1, 1))), "impossible"),
  "long number as key": (raw(b"\x80\x02}\x8a\x0c" + b"\x11" * 12 + b"Ns."), "a key of type int"),
  "key that takes long": (raw(b"\x80\x02}(tK\1s."), "key of type tuple"),
  "attributes of a number": (raw(b"\x80\x02K\1}b."), "BUILD on int"),
  "items of a number": (raw(b"\x80\x02K\1K\2a."), "APPENDS on int"),
}
BIG = np.zeros(1 << 14, np.float32)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_in_one_line(tmp_path, name):
  write, needle = DAMAGED[name]
  path = tmp_path / "weights.bin"
  write(path)
  began = time.perf_counter()
  with pytest.raises(UserError) as error:
    content, _ = pickles.read(path)
    for tensor in content.values() if isinstance(content, dict) else ():
      tensor.load()
  assert needle in str(error.value) and str(path) in str(error.value)
  assert "\n" not in str(error.value) and len(str(error.value)) < 400
  assert time.perf_counter() - began < 5


def test_duplicate_members_are_refused(tmp_path):
  path = published.zip_file(tmp_path / "x", {"w": X})
  with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
    archive.writestr("archive/data/0", X.tobytes())
  with pytest.raises(UserError, match="'archive/data/0'"):
    pickles.read(path)


def test_a_flood_of_opcodes_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(pickles, "_MAX_OPCODES", 1000)
  path = tmp_path / "x"
  path.write_bytes(b"\x80\x02" + b"N0" * 1000 + b"N.")
  with pytest.raises(UserError, match="more than 1000 opcodes"):
    pickles.read(path)


FILLER = Raw(b"]" + b"N0" * 150)  # 300 opcodes and one more


def calls(*blobs):
  """A plain pickle that asks for files inside it, in a list."""
  load = Global("torch.storage", "_load_from_bytes")
  return Emitter().dumps([blob if isinstance(blob, Raw) else Call(load, (blob,)) for blob in blobs])


def test_an_inner_file_is_read_once_however_often_it_is_asked_for(tmp_path, monkeypatch):
  monkeypatch.setattr(pickles, "_MAX_OPCODES", 1000)
  path, inner = tmp_path / "x", published.legacy_bytes(FILLER)
  emitted = calls(inner)[: -len(b"e.")]  # a list's first item: remembered, and called again
  call = emitted[emitted.index(b"ctorch") :]
  head, tail = call[: -len(b"tR")], b"tq\x01R"
  again = b"ctorch.storage\n_load_from_bytes\nh\x01R" * 50
  path.write_bytes(emitted[: -len(call)] + head + tail + again + b"e.")
  content, _ = pickles.read(path)
  assert content == [[]] * 51


def test_inner_files_share_the_limit_of_their_file(tmp_path, monkeypatch):
  monkeypatch.setattr(pickles, "_MAX_OPCODES", 1000)
  path, inner = tmp_path / "x", published.legacy_bytes(FILLER)
  path.write_bytes(calls(inner, inner))
  assert pickles.read(path)[0] == [[], []]
  path.write_bytes(calls(*[inner] * 4))
  with pytest.raises(UserError, match="more than 1000 opcodes"):
    pickles.read(path)


def test_inner_files_share_the_size_that_tensors_may_declare(tmp_path):
  path = tmp_path / "x"
  big = published.legacy_bytes([BIG] * 3)
  path.write_bytes(calls(big, big))
  assert len(pickles.read(path)[0]) == 2
  path.write_bytes(calls(*[published.legacy_bytes([BIG] * 5)] * 2))
  with pytest.raises(UserError, match="many times its size"):
    pickles.read(path)


@pytest.mark.parametrize(
  "copy",
  [
    b"ccollections\nOrderedDict\nh\x01R0",  # of a list of pairs
    b"h\x02h\x03b0",  # a module's state
  ],
)
def test_copies_of_a_long_container_are_counted(tmp_path, monkeypatch, copy):
  monkeypatch.setattr(pickles, "_MAX_OPCODES", 3000)
  pairs = b"](" + b"K\1K\2\x86" * 100 + b"e\x85q\x010"
  module = b"ctorch.nn.modules.linear\nLinear\n)\x81q\x020"
  state = b"}(" + b"".join(b"K" + bytes([i]) + b"N" for i in range(100)) + b"uq\x030"
  path = tmp_path / "x"
  for times, refused in ((3, False), (100, True)):
    path.write_bytes(b"\x80\x02" + pairs + module + state + copy * times + b"N.")
    with pytest.raises(UserError, match="more than 3000 opcodes") if refused else nullcontext():
      pickles.read(path)


def test_shared_containers_do_not_explode(tmp_path):
  """Lists of lists, each twice in the next: 2^60 elements if they were ever walked through."""
  levels = [b"](" + bytes([104, i, 104, i]) + b"eq" + bytes([i + 1]) + b"0" for i in range(60)]
  opcodes = b"\x80\x02]q\x000" + b"".join(levels) + b"h" + bytes([60])
  path = tmp_path / "x"
  path.write_bytes(opcodes + b".")
  began = time.perf_counter()
  with pytest.raises(UserError, match="holds no weights"):
    files.read(path)
  assert time.perf_counter() - began < 5


@pytest.mark.parametrize("loop", [False, True])
def test_networks_without_bottom_are_refused(tmp_path, loop):
  """A network that contains itself, or twice the next one on each of 60 levels."""
  make = b"ctorch.nn.modules.container\nModuleDict\n)\x81q"
  modules = b"}X\x08\x00\x00\x00_modules}"
  if loop:
    opcodes = make + b"\x00" + modules + b"X\x05\x00\x00\x00modelh\x00ssb"
  else:
    opcodes = (
      make
      + b"\x00"
      + b"".join(
        b"0"
        + make
        + bytes([i + 1])
        + modules
        + b"".join(b"X\x01\x00\x00\x00" + side + b"h" + bytes([i]) + b"s" for side in (b"a", b"b"))
        + b"sb"
        for i in range(60)
      )
    )
  path = tmp_path / "x"
  path.write_bytes(b"\x80\x02}X\x03\x00\x00\x00ema" + opcodes + b"s.")
  with pytest.raises(UserError, match="more than 10000 modules"):
    files.read(path)


@pytest.mark.parametrize("layout", ["zip", "legacy", "plain"])
def test_files_cut_short_are_refused_wherever(tmp_path, layout):
  whole, path = tmp_path / "whole", tmp_path / "cut"
  content = {"model_state_dict": collections.OrderedDict(a=X, b=2 * X), "iter": 3}
  if layout == "plain":
    published.edm_pickle(whole, {"model.enc.8x8_conv.weight": X}, img_resolution=8)
  else:
    WRITERS[layout](whole, content)
  data = whole.read_bytes()
  assert files.read(whole).tensors
  for end in [*range(0, len(data), 13), len(data) - 1]:
    path.write_bytes(data[:end])
    with pytest.raises(UserError) as error:
      files.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_changed_bytes_end_in_one_line_or_in_arrays(tmp_path, layout):
  whole, path = tmp_path / "whole", tmp_path / "changed"
  WRITERS[layout](whole, {"state_dict": collections.OrderedDict(a=X, b=2 * X), "iter": 3})
  data, rng = whole.read_bytes(), np.random.default_rng(0)
  refused = 0
  for _ in range(400):
    changed = bytearray(data)
    for position in rng.integers(len(data), size=rng.integers(1, 4)):
      changed[position] = rng.integers(256)
    path.write_bytes(changed)
    try:
      tensors = files.read(path).tensors
      assert all(tensors[name].size <= 10 * X.size for name in tensors)
    except UserError as error:
      refused += 1
      assert "\n" not in str(error)
  assert refused > 100


def test_a_file_cut_while_it_is_read(tmp_path):
  path = published.legacy_file(tmp_path / "x", {"w": X})
  content, _ = pickles.read(path)
  os.truncate(path, path.stat().st_size - 4)
  with pytest.raises(UserError, match="cut short"):
    content["w"].load()
