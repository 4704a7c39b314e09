"""One door for weight files: what a file is follows from its content, not from its name."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dimo_jax.convert import pickles
from dimo_jax.convert.pickles import StoredModule, StoredTensor
from dimo_jax.types import UserError

FORMATS = ("linen", "torch", "stablehlo")  # folders of an export, best first for loading
MANIFEST = "dimo_jax.json"  # in each of them

# Where trainers put the weights beside other things, outermost first.
_WRAPPERS = ("model_state_dict", "state_dict", "ema_model", "ema", "model")
_IN_FOLDERS = (  # the first that is there
  "teacher.safetensors",  # of this package, as is the next
  "generator.safetensors",
  "model.safetensors",
  "diffusion_pytorch_model.safetensors",
  "pytorch_model.safetensors",
  "pytorch_model.bin",
  "diffusion_pytorch_model.bin",
  "ema_model",
)
_INDICES = (  # of weights in several files
  "model.safetensors.index.json",
  "diffusion_pytorch_model.safetensors.index.json",
  "pytorch_model.bin.index.json",
)
_PARALLEL = "module."  # before every key of a network saved from torch's data parallelism
_MAX_MODULES = 10_000  # of a pickled network; ImageNet-64's has some 600
_HEADER_BYTES = 8  # of a safetensors file: the length of its JSON


class Tensors(Mapping[str, np.ndarray]):
  """Weights by name, read from the disk whenever one is asked for; nothing is kept.

  Floating-point tensors arrive as float32, others as they are stored; each is the caller's own.

  Attributes:
    shapes: by name, known without reading a tensor.
  """

  def __init__(self, shapes: Mapping[str, tuple[int, ...]], load: Callable[[str], np.ndarray]):
    self.shapes = dict(shapes)
    self._load = load

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self.shapes:
      raise KeyError(name)
    value = self._load(name)
    floating = np.issubdtype(value.dtype, np.floating) or value.dtype == ml_dtypes.bfloat16
    return value.astype(np.float32, copy=False) if floating else value

  def __iter__(self) -> Iterator[str]:
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)

  def __contains__(self, name: object) -> bool:
    return name in self.shapes

  def under(self, prefix: str) -> "Tensors":
    """Those whose names begin with a prefix, which is cut off."""
    shapes = {k[len(prefix) :]: v for k, v in self.shapes.items() if k.startswith(prefix)}
    return Tensors(shapes, lambda name: self._load(prefix + name))


@dataclasses.dataclass(frozen=True)
class Archive:
  """A weight file.

  Attributes:
    path: of the file itself, where a folder was asked for.
    layout: "safetensors"; "zip" or "legacy" of torch; "plain", a pickled network of EDM.
    wrapper: the key under which the weights lay, such as "model_state_dict"; "" where they are all
      there is.
    tensors: the weights.
    settings: plain values beside them: counters, a safetensors file's metadata (that of this
      package decoded), a folder's config.json, or what a pickled network was made with.
  """

  path: Path
  layout: str
  wrapper: str
  tensors: Tensors
  settings: Mapping[str, Any]


def export_folder(path: Path) -> Path | None:
  """The folder of one format of an export: `path`, or the best one in it; None if there is none."""
  folders = (path, *(path / name for name in FORMATS))
  return next((folder for folder in folders if (folder / MANIFEST).is_file()), None)


def read(path: str | Path) -> Archive:
  """Opens a weight file, or the weight files of a folder. Nothing in them is executed.

  Raises:
    UserError: the file is missing, damaged, of no known layout, or holds more than weights and
      plain values.
  """
  path = Path(path)
  if path.is_dir():
    return _read_folder(path)
  if _is_safetensors(path):
    return _read_safetensors(path)
  content, layout = pickles.read(path)
  weights, wrapper, settings = _unwrap(path, content)
  if all(name.startswith(_PARALLEL) for name in weights):
    weights = {name[len(_PARALLEL) :]: tensor for name, tensor in weights.items()}
  shapes = {name: tensor.shape for name, tensor in weights.items()}
  tensors = Tensors(shapes, lambda name: weights[name].load())
  return Archive(path, layout, wrapper, tensors, settings)


def _read_folder(path: Path) -> Archive:
  for name in _INDICES:
    if (path / name).is_file():
      archive = _read_sharded(path / name)
      break
  else:
    names = [name for name in _IN_FOLDERS if (path / name).exists()]
    if not names:
      own = path / "teacher"
      meant = f"; did you mean {own}?" if (own / _IN_FOLDERS[0]).exists() else ""
      raise UserError(
        f"{path} holds no weights, such as {_IN_FOLDERS[0]} or {_IN_FOLDERS[2]}; it is no export,"
        f" and no workdir with a finished checkpoint{meant}"
      )
    archive = read(path / names[0])
  config = path / "config.json"
  if not config.is_file():
    return archive
  return dataclasses.replace(archive, settings={**_json(config), **archive.settings})


def _read_sharded(index: Path) -> Archive:
  """Several files as one, as an index says which tensor lies where."""
  places = _json(index).get("weight_map")
  if not isinstance(places, dict) or not places:
    raise UserError(f"{index} has no weight_map")
  names = sorted({str(name) for name in places.values()})
  if any(Path(name).name != name for name in names):
    raise UserError(f"{index} names files outside its folder: refused")
  parts = {name: read(index.parent / name) for name in names}
  lost = [name for name, part in places.items() if name not in parts[part].tensors]
  if lost:
    raise UserError(f"{index} names tensors that are not in its files: {', '.join(lost[:4])}")
  first = parts[names[0]]
  shapes = {name: parts[part].tensors.shapes[name] for name, part in places.items()}
  tensors = Tensors(shapes, lambda name: parts[places[name]].tensors[name])
  return Archive(index, first.layout, first.wrapper, tensors, first.settings)


def _is_safetensors(path: Path) -> bool:
  """Whether a file begins as they do: the length of a JSON object, and the object."""
  try:
    with open(path, "rb") as file:
      head = file.read(_HEADER_BYTES + 1)
  except FileNotFoundError as error:
    raise UserError(f"{path} does not exist") from error
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error}") from error
  return head[:2] != b"PK" and head[_HEADER_BYTES:] == b"{"


def _read_safetensors(path: Path) -> Archive:
  try:
    file = safe_open(path, framework="numpy", backend="pread")
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    settings: dict[str, Any] = dict(file.metadata() or {})
    if "dimo_jax" in settings:
      settings |= json.loads(settings.pop("dimo_jax"))
  except (SafetensorError, OSError, ValueError) as error:
    raise UserError(f"{path} is not a readable safetensors file: {error}") from error
  return Archive(path, "safetensors", "", Tensors(shapes, file.get_tensor), settings)


def _unwrap(path: Path, content: Any) -> tuple[dict[str, StoredTensor], str, dict[str, Any]]:
  """(tensors by name, the key they lay under, plain values beside them) of a pickle's content."""
  wrapper = ""
  settings: dict[str, Any] = {}
  for _ in _WRAPPERS:
    if not isinstance(content, dict):
      break
    settings |= _plain(content)
    wrappers = [name for name in _WRAPPERS if isinstance(content.get(name), dict | StoredModule)]
    if not wrappers:
      break
    wrapper, content = wrappers[0], content[wrappers[0]]
  if isinstance(content, StoredModule):
    settings |= _module_settings(content)
    content = _state_dict(path, content)
  elif not isinstance(content, dict):
    content = {}
  tensors = {
    name: value
    for name, value in content.items()
    if isinstance(name, str) and isinstance(value, StoredTensor)
  }
  if not tensors:
    raise UserError(f"{path} holds no weights, also not under {', '.join(_WRAPPERS)}")
  return tensors, wrapper, settings


def _plain(values: Mapping[Any, Any]) -> dict[str, Any]:
  """Those values that are numbers, strings or flat sequences of them."""

  def is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str)

  return {
    name: value
    for name, value in values.items()
    if isinstance(name, str)
    and (is_plain(value) or (type(value) in (list, tuple) and all(map(is_plain, value))))
  }


def _module_settings(module: StoredModule) -> dict[str, Any]:
  """What a pickled network was made with, its class as `class_name`; that of the network inside it
  under `model`.
  """
  inner = _submodules(module).get("model")
  return _made_with(module) | ({"model": _made_with(inner)} if inner is not None else {})


def _made_with(module: StoredModule) -> dict[str, Any]:
  state = {k: v for k, v in module.state.items() if isinstance(k, str)}
  attributes = _plain({k: v for k, v in state.items() if not k.startswith("_")})
  given = state.get("_init_kwargs")
  made = _plain(given) if isinstance(given, dict) else {}
  return {"class_name": module.name, **attributes, **made}


def _submodules(module: StoredModule) -> dict[Any, StoredModule]:
  found = module.state.get("_modules")
  if not isinstance(found, dict):
    return {}
  return {name: value for name, value in found.items() if isinstance(value, StoredModule)}


def _state_dict(path: Path, module: StoredModule) -> dict[str, StoredTensor]:
  """Parameters and buffers of a pickled network by their dotted names."""
  tensors: dict[str, StoredTensor] = {}
  waiting = [("", module)]
  for _ in range(_MAX_MODULES):
    if not waiting:
      return tensors
    prefix, current = waiting.pop()
    for kind in ("_parameters", "_buffers"):
      values = current.state.get(kind)
      for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, StoredTensor):
          tensors[f"{prefix}{name}"] = value
    for name, inner in _submodules(current).items():
      waiting.append((f"{prefix}{name}.", inner))
  raise UserError(f"{path} holds a network of more than {_MAX_MODULES} modules")


def _json(path: Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is no readable JSON: {error}") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} holds no JSON object")
  return value
