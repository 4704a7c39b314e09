"""Anything that can be sampled, however it is stored: `load(path).sample(labels, seed)`.

Every image is a function of its class, the seed and its index in the call alone: neither the batch
size, nor the number of devices, nor what is sampled beside it changes it (but for rounding).
"""

import abc
import dataclasses
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from configs import base
from dimo_jax import prepare, records
from dimo_jax.build import NUM_SEEDS, Experiment, Models
from dimo_jax.checkpoint import RECORD_FILE, Checkpoints, load_params, quiet_orbax, read_tree
from dimo_jax.convert import families, files
from dimo_jax.convert.files import MANIFEST
from dimo_jax.evaluation.generation import PIXELS_PER_DEVICE
from dimo_jax.evaluation.pictures import to_uint8
from dimo_jax.recipe import Recipe, of_sizes
from dimo_jax.remote import local_path
from dimo_jax.samplers import Sampler
from dimo_jax.samplers.maskgit import MaskGit
from dimo_jax.samplers.one_step import OneStep
from dimo_jax.sharding import make_mesh, replicated, shard_batch
from dimo_jax.state import NetworkState, merge, split
from dimo_jax.types import Array, Float, Int, Params, UInt8, UInt32, UserError

PARAMS_FOLDER = "params"  # linen: an orbax checkpoint of {"network", "tokenizer"}
# torch: the published key names, where the original code looks; our decoder beside them.
TORCH_FILES = {"masked": "ema_model/model.safetensors", "gaussian": "model.safetensors"}
TORCH_FAMILIES = {"masked": "dimo", "gaussian": "dmd2"}  # whose key names these are
TOKENIZER_FILE = "tokenizer.safetensors"
PROGRAM_FILE, WEIGHTS_FILE = "program.bin", "weights.safetensors"  # stablehlo

_MAX_BATCH_SIZE = 64  # images of one call of the network, unless told otherwise

Weights = Mapping[str, Params]  # {"network": ..., "tokenizer": ...}
# (weights, labels int32 [b], seeds uint32 [b], indices uint32 [b]) -> uint8 images, or tokens; a
# tempered one takes temperatures float32 [b] too.
SampleFn = Callable[..., Array]


class Samples(NamedTuple):
  """Outputs on the host and what they took, compilation apart."""

  outputs: np.ndarray
  seconds: float
  compile_seconds: float


def sample_fn(
  models: Models, sampler: Sampler, *, tokens: bool = False, tempered: bool = False
) -> SampleFn:
  """The function that samples a batch: images, or the tokens they would be decoded from.

  Args:
    tempered: whether every row brings the temperature of its tokens, in place of the sampler's.
  """
  if tempered:
    assert isinstance(sampler, OneStep | MaskGit)  # others have no temperature
    sampler = dataclasses.replace(sampler, temperature=1.0)

  def one(
    weights: Weights,
    label: Int[Array, ""],
    seed: UInt32[Array, ""],
    index: UInt32[Array, ""],
    temperature: Float[Array, ""] | None = None,
  ) -> Array:
    network = models.teacher.frozen_state(weights["network"], weights["tokenizer"])
    if temperature is not None:
      network = _tempered(network, temperature)
    key = jax.random.fold_in(jax.random.key(seed), index)
    encoded = sampler.sample(network, {"class_id": label[None]}, key)
    if tokens:
      return encoded[0]
    return to_uint8(models.tokenizer.decode(network.autoencoder, encoded))[0]

  return jax.vmap(one, in_axes=(None, *[0] * (4 if tempered else 3)))


def _tempered(network: NetworkState, temperature: Float[Array, ""]) -> NetworkState:
  """The same with its logits divided, before guidance and filters."""
  apply_fn = network.apply_fn

  def divided(*arguments: Any, **options: Any) -> Array:
    return apply_fn(*arguments, **options).astype(jnp.float32) / temperature

  return network.replace(apply_fn=divided)


class Artifact(abc.ABC):
  """A network with all that sampling needs.

  Attributes:
    name: for error messages.
    kind: "masked" (tokens) or "gaussian" (images).
    role: "generator" or "teacher".
    num_classes: class ids are 0 .. num_classes - 1; 0 for an unconditional network, which takes
      the label 0.
    num_steps: of one sample, where `steps` does not say otherwise.
    image_shape: (height, width, channels); None where there is no decoder.
    temperature: of the drawn tokens, which `batch_fn` may change; None where there is none, or it
      is fixed.
  """

  name: str
  kind: str
  role: str
  num_classes: int
  num_steps: int
  image_shape: tuple[int, int, int] | None
  temperature: float | None

  def sample(
    self,
    labels: Sequence[Any] | np.ndarray,
    seed: int,
    steps: int | None = None,
    *,
    batch_size: int | None = None,
  ) -> UInt8[np.ndarray, "n h w c"]:
    """One image for each class id.

    Args:
      steps: of a teacher; a generator has its own number.
      batch_size: images at a time; it changes memory and speed, not the images. By default 64,
        fewer of large images.

    Raises:
      UserError: bad arguments, or no decoder for the tokens.
    """
    return self.sample_timed(labels, seed, steps, batch_size=batch_size).outputs

  def sample_timed(
    self,
    labels: Sequence[Any] | np.ndarray,
    seed: int,
    steps: int | None = None,
    *,
    batch_size: int | None = None,
  ) -> Samples:
    """As `sample`, with seconds."""
    self._check_decoder()
    return self._run(labels, seed, steps, batch_size, tokens=False)

  def sample_tokens(
    self,
    labels: Sequence[Any] | np.ndarray,
    seed: int,
    steps: int | None = None,
    *,
    batch_size: int | None = None,
  ) -> Int[np.ndarray, "n l"]:
    """The codes of the images that `sample` makes of the same arguments.

    Raises:
      UserError: bad arguments, or an artifact that has no tokens.
    """
    if self.kind != "masked":
      raise UserError(f"{self.name} is {self.kind}: it has no tokens")
    return self._run(labels, seed, steps, batch_size, tokens=True).outputs

  def batch_fn(self, num: int, steps: int | None = None) -> tuple[int, Callable[..., Array]]:
    """Compiles what samples unrelated rows together.

    Args:
      num: rows wanted.
      steps: as in `sample`.

    Returns:
      (b, f), where b is `num` or somewhat more, and f maps labels int32 [b], seeds uint32 [b] and
      indices uint32 [b], with a `temperature` also temperatures float32 [b], to images uint8
      [b, h, w, c]. A row is image number `index` of `sample` with its seed.

    Raises:
      UserError: other steps than it can take, or no decoder for the tokens.
    """
    self._check_decoder()
    self._check_steps(steps)
    return self._compile(num, steps or self.num_steps, False, self.temperature is not None)

  @property
  def default_batch_size(self) -> int:
    """Images at a time unless told otherwise: 64, fewer of large images."""
    pixels = math.prod(self.image_shape[:2]) if self.image_shape else 1
    fitting = max(1, PIXELS_PER_DEVICE // pixels) * jax.local_device_count()
    return min(_MAX_BATCH_SIZE, fitting)

  @abc.abstractmethod
  def _compile(
    self, num: int, steps: int, tokens: bool, tempered: bool
  ) -> tuple[int, Callable[..., Array]]:
    """(batch size of at least `num`, `(labels, seeds, indices) -> outputs` for such batches);
    tempered, the function takes temperatures too.
    """

  def _check_decoder(self) -> None:
    if self.image_shape is None:
      raise UserError(
        f"{self.name} makes tokens and holds no decoder; name its VQGAN with --tokenizer=PATH, or"
        " load(..., tokenizer=PATH)"
      )

  def _check_steps(self, steps: int | None) -> None:
    if steps is not None and steps < 1:
      raise UserError(f"steps={steps} must be 1 or more")
    if steps not in (None, self.num_steps) and self.role == "generator":
      raise UserError(f"steps={steps} is for teachers; {self.name} takes {self.num_steps}")

  def _run(
    self,
    labels: Sequence[Any] | np.ndarray,
    seed: int,
    steps: int | None,
    batch_size: int | None,
    *,
    tokens: bool,
  ) -> Samples:
    labels = check_labels(labels, self.num_classes)
    if not 0 <= seed < NUM_SEEDS:
      raise UserError(f"seed={seed} must lie in 0 .. {NUM_SEEDS - 1}")
    if batch_size is None:
      batch_size = self.default_batch_size
    if batch_size < 1:
      raise UserError(f"batch_size={batch_size} must be 1 or more")
    self._check_steps(steps)
    began = time.perf_counter()
    size, call = self._compile(min(batch_size, len(labels)), steps or self.num_steps, tokens, False)
    compiled = time.perf_counter()
    outputs = []
    for start in range(0, len(labels), size):
      chunk = np.resize(labels[start : start + size], size)
      indices = np.arange(start, start + size, dtype=np.uint32)
      outputs.append(np.asarray(call(chunk, np.full(size, seed, np.uint32), indices)))
    seconds = time.perf_counter() - compiled
    return Samples(np.concatenate(outputs)[: len(labels)], seconds, compiled - began)


def check_labels(labels: Sequence[Any] | np.ndarray, num_classes: int) -> Int[np.ndarray, " n"]:
  """Class ids as int32.

  Raises:
    UserError: there are none, or some are no class ids.
  """
  found = np.asarray(labels)
  if found.ndim != 1 or not len(found) or not np.issubdtype(found.dtype, np.integer):
    raise UserError(f"labels={labels!r} must be a list of class ids such as [3, 1, 4]")
  if found.min() < 0 or found.max() >= max(num_classes, 1):
    wrong = found[(found < 0) | (found >= max(num_classes, 1))][0]
    raise UserError(f"labels hold {wrong}; class ids lie in 0 .. {max(num_classes, 1) - 1}")
  return found.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Parts:
  """Weights, and what makes a network with a sampler of them.

  Attributes:
    name: for error messages.
    role: "generator" or "teacher".
    clock: of the training, where a generator's sampling settings warm up.
    step: generator updates done, where a workdir says so.
  """

  name: str
  recipe: Recipe
  weights: Weights
  role: str
  clock: int = 0
  step: int | None = None

  def sampler(self, models: Models) -> Sampler:
    """The generator's or the teacher's own."""
    return models.student_sampler.at(self.clock) if self.role == "generator" else models.decoding


def _check_shapes(parts: Parts, models: Models) -> None:
  shapes = jax.eval_shape(models.teacher.init, jax.random.key(0))
  wanted = {k: v.shape for k, v in traverse_util.flatten_dict(shapes, sep="/").items()}
  network = traverse_util.flatten_dict(parts.weights["network"], sep="/")
  found = {k: np.shape(v) for k, v in network.items()}
  wrong = sorted(k for k in {*wanted, *found} if wanted.get(k) != found.get(k))
  if wrong:
    raise UserError(
      f"{parts.name} does not hold the network that it describes: {wrong[0]} is"
      f" {found.get(wrong[0], 'missing')} for {wanted.get(wrong[0], 'nothing')}"
      f" ({len(wrong)} differ)"
    )


class NetworkArtifact(Artifact):
  """Weights with our own networks and samplers, over all local devices."""

  def __init__(self, parts: Parts):
    """Checks the weights' shapes."""
    models = parts.recipe.models(parts.name)
    self.name, self.role, self.kind = parts.name, parts.role, models.teacher.kind
    self.num_classes = parts.recipe.config.data.num_classes
    self.image_shape = models.tokenizer.image_shape
    self.parts, self.models = parts, models
    self.sampler = parts.sampler(models)
    self.num_steps = self.sampler.num_steps
    sampler = self.sampler
    self.temperature = sampler.temperature if isinstance(sampler, OneStep | MaskGit) else None
    _check_shapes(parts, models)
    self._mesh = make_mesh(devices=jax.local_devices())
    self._compiled: dict[tuple[int, int, bool, bool], Callable[..., Array]] = {}

  @functools.cached_property
  def _weights(self) -> Params:
    """On the devices; made where it samples, and who only reads it holds its weights once."""
    return jax.device_put(dict(self.parts.weights), replicated(self._mesh))

  def _compile(
    self, num: int, steps: int, tokens: bool, tempered: bool
  ) -> tuple[int, Callable[..., Array]]:
    size = -(-num // self._mesh.size) * self._mesh.size
    variant = size, steps, tokens, tempered
    if variant not in self._compiled:
      sampler = self.sampler
      if steps != self.num_steps:
        sampler = dataclasses.replace(self.models.decoding, num_steps=steps)
      types = (np.int32, np.uint32, np.uint32, *[np.float32] * tempered)
      batch = tuple(np.zeros(size, kind) for kind in types)
      function = jax.jit(sample_fn(self.models, sampler, tokens=tokens, tempered=tempered))
      compiled = function.lower(self._weights, *shard_batch(batch, self._mesh)).compile()
      self._compiled[variant] = lambda *batch: compiled(
        self._weights, *shard_batch(batch, self._mesh)
      )
    return size, self._compiled[variant]


class ProgramArtifact(Artifact):
  """An exported StableHLO program, which runs on one device."""

  def __init__(self, name: str, manifest: Mapping[str, Any], program: bytes, weights: Params):
    """Reads the program."""
    from jax import export

    self.name, self.role, self.kind = name, manifest["role"], manifest["kind"]
    self.num_classes, self.num_steps = manifest["num_classes"], manifest["num_steps"]
    self.image_shape, self.temperature = tuple(manifest["image_shape"]), None
    self.program, self.weights = export.deserialize(bytearray(program)), jax.device_put(weights)
    self._compiled: dict[int, Callable[..., Array]] = {}

  def sample_tokens(self, *arguments: Any, **options: Any) -> np.ndarray:
    """Raises UserError: the program decodes them."""
    raise UserError(f"{self.name} is a program that makes images, not tokens")

  def _compile(
    self, num: int, steps: int, tokens: bool, tempered: bool
  ) -> tuple[int, Callable[..., Array]]:
    del steps, tokens, tempered
    if num not in self._compiled:
      batch = np.zeros(num, np.int32), *[np.zeros(num, np.uint32)] * 2
      compiled = jax.jit(self.program.call).lower(self.weights, *batch).compile()
      self._compiled[num] = lambda *batch: compiled(self.weights, *batch)
    return num, self._compiled[num]


@dataclasses.dataclass(frozen=True)
class Run:
  """A workdir's generator.

  Attributes:
    step: generator updates done.
    clock: fake-score updates done.
    average: whether the weights are the training's moving average.
    teacher_sha256: over the teacher's parameters, as `checkpoint.params_hash` takes it.
  """

  workdir: Path
  recipe: Recipe
  weights: Weights
  step: int
  clock: int
  average: bool
  teacher_sha256: str

  def parts(self) -> Parts:
    """What makes a sampler of it."""
    name = str(self.workdir)
    return Parts(name, self.recipe, self.weights, "generator", self.clock, self.step)


def read_run(
  workdir: Path,
  experiment: Experiment | None = None,
  *,
  checkpoint: str = "last",
  average: bool = True,
) -> Run:
  """The generator of a workdir, which is only read; no data set is opened.

  Args:
    experiment: of a config that is to be used in place of the recorded one.
    checkpoint: "last", the newest that can be read, "best", the best evaluated, or a step.
    average: the moving average of the weights instead of the weights themselves.

  Raises:
    UserError: nothing was trained there, nothing evaluated, no config recorded, or the
      experiment's config is another than that of the training.
  """
  records.check_trained(workdir)
  if experiment is not None:
    prepare.check_workdir(experiment, workdir)
  recipe = Recipe.load(workdir) if experiment is None else prepare.recipe(experiment)
  models = recipe.models(str(workdir))
  teacher = models.teacher
  shapes = jax.eval_shape(teacher.init, jax.random.key(0))
  trainable, frozen = split(shapes, recipe.config.optim.frozen)
  number = jax.ShapeDtypeStruct((), np.int32)
  generator = {"frozen": frozen, "step": number} | ({} if average else {"params": trainable})
  part = {"generator": generator, "clock": number} | ({"ema": trainable} if average else {})
  checkpoints = Checkpoints(workdir / "distill" / "checkpoints", read_only=True)
  step = checkpoints.find_step(checkpoint)
  mesh = make_mesh(devices=jax.local_devices())
  restored = checkpoints.restore(part, mesh, (), step, partial=True)
  checkpoints.close()
  if restored is None:
    raise UserError(f"--workdir={str(workdir)!r} holds no checkpoint; run --mode=train there first")
  state = jax.device_get(restored[0])
  params = merge(
    state["ema"] if average else state["generator"]["params"], state["generator"]["frozen"]
  )
  tokenizer = prepare.run_tokenizer(models.tokenizer, recipe.config, workdir)
  given = recipe.config.teacher.path
  if experiment is not None and given not in ("", "random"):  # an older workdir kept no copy
    tokenizer = prepare.load_teacher(experiment, given)[1] or tokenizer
  record = json.loads((workdir / "distill" / RECORD_FILE).read_text(encoding="utf-8"))
  return Run(
    workdir=workdir,
    recipe=recipe,
    weights={"network": params, "tokenizer": tokenizer},
    step=int(state["generator"]["step"]),
    clock=int(state["clock"]),
    average=average,
    teacher_sha256=record["teacher.sha256"],
  )


def load(
  path: str | os.PathLike[str],
  *,
  tokenizer: str | None = None,
  family: str = "",
  fields: Mapping[str, Any] | None = None,
) -> Artifact:
  """What lies at a path, ready to be sampled.

  Args:
    path: an export (`python -m dimo_jax.export`) or one of its format's folders, converted or not;
      the workdir of a run; a teacher trained here (`teacher.safetensors`, or its folder); published
      weights of any family that `dimo_jax.convert` knows, converted or not. Here, in a bucket
      (`gs://...`), or on a hub (`hf://owner/repo/file`).
    tokenizer: a VQGAN that decodes tokens, where the artifact holds no decoder.
    family: of published weights, where the file does not say what it is: a generator of Di[M]O or
      DMD2 saved as safetensors looks like a teacher.
    fields: other values of config fields by dotted name, such as
      `{"sampling.temperature": 7.0, "teacher.decoding.guidance_scale": 2.0}`.

  Raises:
    UserError: nothing there, or nothing that can be sampled so.
  """
  with quiet_orbax():
    return _load(path, tokenizer, family, fields)


def _load(
  path: str | os.PathLike[str],
  tokenizer: str | None,
  family: str,
  fields: Mapping[str, Any] | None,
) -> Artifact:
  place = local_path(path if isinstance(path, str) else Path(path))
  if not place.exists():
    raise UserError(f"{str(path)!r} does not exist")
  if (folder := files.export_folder(place)) is not None:
    parts = _read_export(folder)
  elif (place / "distill").is_dir():
    parts = read_run(place).parts()
  else:
    parts = _read_weights(place, family, fields or {})
  if isinstance(parts, Artifact):
    if tokenizer or fields:
      raise UserError(f"{parts.name} is a fixed program: it takes no tokenizer and no fields")
    return parts
  parts = dataclasses.replace(parts, recipe=parts.recipe.override(fields or {}))
  if tokenizer:
    parts = with_tokenizer(parts, tokenizer)
  return NetworkArtifact(parts)


def with_tokenizer(parts: Parts, location: str) -> Parts:
  """The same with another decoder.

  Raises:
    UserError: something that makes no tokens, or no decoder there.
  """
  models = parts.recipe.models(parts.name)
  if models.teacher.kind != "masked":
    raise UserError(f"--tokenizer={location!r}: {parts.name} makes images, not tokens")
  recipe = parts.recipe.with_tokenizer(location)
  params = recipe.models(parts.name).tokenizer.fit(None, 0)
  weights = {"network": parts.weights["network"], "tokenizer": params}
  return dataclasses.replace(parts, recipe=recipe, weights=weights)


def _read_export(folder: Path) -> Parts | ProgramArtifact:
  """Reads one format's folder."""
  path = folder / MANIFEST
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    kind = manifest["format"]
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"{path} cannot be read: {error!r}") from error
  name = str(folder)
  if kind == "stablehlo":
    weights, _ = load_params(folder / WEIGHTS_FILE)
    try:
      program = (folder / PROGRAM_FILE).read_bytes()
    except OSError as error:
      raise UserError(f"{folder / PROGRAM_FILE} cannot be read: {error.strerror}") from error
    return ProgramArtifact(name, manifest, program, weights)
  recipe = Recipe.from_dict(manifest["recipe"], str(path))
  tree: dict[str, Any]
  if kind == "linen":
    tree = {"tokenizer": {}} | read_tree(folder / PARAMS_FOLDER)
  else:
    teacher = recipe.models(name).teacher
    tensors = files.read(folder / TORCH_FILES[teacher.kind]).tensors
    tree = {"network": prepare.from_published(teacher, tensors), "tokenizer": {}}
    if (folder / TOKENIZER_FILE).exists():
      tree["tokenizer"] = unflatten(load_params(folder / TOKENIZER_FILE)[0])
  return Parts(name, recipe, tree, manifest["role"], manifest["clock"])


def _read_weights(place: Path, family: str, fields: Mapping[str, Any]) -> Parts:
  """Reads a teacher trained here, a converted export, or published weights, converted by us or not;
  `fields` are only looked at.
  """
  file = place / prepare.TEACHER_FILE
  archive = files.read(file if file.is_file() else place)
  name, settings = str(archive.path), archive.settings
  if any(key.startswith("network/") for key in archive.tensors):
    tree = {"tokenizer": {}} | unflatten(dict(archive.tensors))
    if "recipe" in settings:
      role, clock = settings.get("role", "teacher"), settings.get("clock", 0)
      return Parts(name, Recipe.from_dict(settings["recipe"], name), tree, role, clock)
    if "conversion" not in settings:
      raise UserError(f"{name} records no config: an older version wrote it")
    record = settings["conversion"]
    sizes, family = record["sizes"], record["family"]
    recipe = of_sizes(sizes, family, _num_channels(tree["network"]))
    _check_heads(name, recipe, fields)
    return Parts(name, recipe, tree, _role(family))
  converted = families.convert(archive, family)
  family = converted.family
  network = next(iter(converted.parts.values()))
  if not families.FAMILIES[family].teacher:
    raise UserError(f"{name} is {families.FAMILIES[family].title}: it decodes, and samples nothing")
  recipe = of_sizes(converted.sizes, family, _num_channels(network))
  _check_heads(name, recipe, fields)
  return Parts(name, recipe, {"network": network, "tokenizer": {}}, _role(family))


def _check_heads(name: str, recipe: Recipe, fields: Mapping[str, Any]) -> None:
  """Raises UserError where a transformer has not the published width, and nobody says its heads:
  no shape tells them.
  """
  published = base.get_config().model
  width = recipe.config.model.hidden_dim
  if width != published.hidden_dim and "model.num_heads" not in fields:
    raise UserError(
      f"{name} is {width} wide, and nothing in it says how many heads its attention has"
      f" ({published.num_heads} at the published {published.hidden_dim}): give"
      " --field=model.num_heads=N, or load(..., fields={'model.num_heads': N})"
    )


def _role(family: str) -> str:
  return "generator" if families.FAMILIES[family].student else "teacher"


def _num_channels(network: Params) -> int:
  """Channels of the images of a converted denoiser."""
  stems = [v for k, v in network.get("model", {}).items() if re.fullmatch(r"enc_\w+_conv", k)]
  return int(np.shape(stems[0]["kernel"])[2]) if stems else 3


def unflatten(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The tree of arrays by path."""
  return traverse_util.unflatten_dict(dict(arrays), sep="/")
