"""What distillation needs first: data in memory, tokenizer, classifier, a trained teacher."""

import contextlib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util

from dimo_jax import records
from dimo_jax.build import Experiment
from dimo_jax.checkpoint import (
  RECORD_FILE,
  Checkpoints,
  changed_fields,
  check_record,
  listed,
  load_params,
  params_hash,
  refuse_changes,
  save_params,
)
from dimo_jax.convert import edm, families, files, maskgit
from dimo_jax.convert.files import Archive
from dimo_jax.data.sources import Source
from dimo_jax.data.tokens import TokenSource, describe, load_tokens
from dimo_jax.distributed import exists, on_first
from dimo_jax.evaluation.features import Classifier, train_classifier
from dimo_jax.evaluation.protocols import Reference
from dimo_jax.recipe import CONFIG_FILE, Recipe
from dimo_jax.remote import local_path
from dimo_jax.sharding import fetch
from dimo_jax.state import FirstStage, merge
from dimo_jax.teachers import Teacher
from dimo_jax.teachers.edm import GaussianTeacher
from dimo_jax.teachers.maskgit import MaskedTeacher
from dimo_jax.teachers.tokenizers import Tokenizer
from dimo_jax.teachers.vqgan import RANDOM
from dimo_jax.types import Params, UserError
from dimo_jax.writers import say

CLASSIFIER_FILE = "classifier/classifier.safetensors"  # in a workdir
TEACHER_FILE = "teacher.safetensors"
_TOKENIZER_FILE = "tokenizer.safetensors"  # fitted
_GIVEN_TOKENIZER_FILE = "given.safetensors"  # beside it: the one that a given teacher brought

_UNTOLD = (
  "teacher.name",
  "process.name",
  "process.prediction",
  "process.sigma_data",
  "model.num_heads",
  "denoiser.channels_per_head",
  "denoiser.resample_filter",
)


@functools.lru_cache(maxsize=4)
def load_arrays(source: Source) -> tuple[np.ndarray, np.ndarray]:
  """(images float32 [n, h, w, c], labels int32 [n]) of a small source."""
  samples = [source[i] for i in range(len(source))]
  return np.stack([s["image"] for s in samples]), np.array([s["class_id"] for s in samples])


def fit_tokenizer(experiment: Experiment, workdir: Path) -> Params:
  """The tokenizer's parameters: from the workdir, or fitted on the training split and saved there;
  those of a published tokenizer from its file.

  Raises:
    UserError: the config or that file differ from what the run was begun with.
  """
  config, directory = experiment.config, workdir / "tokenizer"
  if not experiment.has_pictures:
    return {}
  directory.mkdir(parents=True, exist_ok=True)
  fields = records.tokenizer_fields(experiment)
  if not experiment.tokenizer.needs_images:
    params = experiment.tokenizer.fit(None, config.seed)
    check_record(directory, fields | ({"tokenizer.sha256": params_hash(params)} if params else {}))
    return params
  check_record(directory, fields)
  path = directory / _TOKENIZER_FILE
  if not exists(path):
    arrays, _ = load_arrays(experiment.source("train"))
    params = experiment.tokenizer.fit(arrays, config.seed)
    images = jnp.asarray(arrays)
    decoded = experiment.tokenizer.decode(params, experiment.tokenizer.encode(params, images))
    error = float(jnp.mean((decoded - images) ** 2))
    metadata = {"name": config.tokenizer.name, "train_mse": error}
    on_first(lambda: save_params(path, params, metadata))
    say(f"tokenizer: {experiment.tokenizer.codebook_size} codes, mean squared error {error:.4f}")
  return _read_tokenizer(path)


def _read_tokenizer(path: Path) -> Params:
  params, _ = load_params(path)
  return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(params, sep="/"))


def keep_tokenizer(workdir: Path, params: Params) -> None:
  """Copies the tokenizer that a given teacher brought into the workdir, which then needs no other
  file.
  """
  if params:
    (workdir / "tokenizer").mkdir(parents=True, exist_ok=True)
    path = workdir / "tokenizer" / _GIVEN_TOKENIZER_FILE
    on_first(lambda: save_params(path, params, {}))


def check_encodable(experiment: Experiment) -> None:
  """Raises UserError unless the training images have codes that no run has to fit first."""
  name = experiment.config.tokenizer.name
  if experiment.tokenizer.needs_images or not (
    experiment.has_pictures and experiment.tokenizer.codebook_size
  ):
    raise UserError(f"codes are of a given tokenizer, 'vqgan'; tokenizer.name={name!r}")
  if experiment.train_source is None:
    raise UserError(f"data.name={experiment.config.data.name!r} has no images to encode")


def codes_settings(experiment: Experiment, tokenizer_params: Params) -> dict[str, Any]:
  """What the codes of the training images depend on."""
  grid = experiment.tokenizer.grid
  return describe(
    experiment.source("train"),
    grid[0] * grid[1],
    params_hash(tokenizer_params),
    experiment.config.precision.compute_dtype,
  )


def training_source(experiment: Experiment, tokenizer_params: Params) -> Source | TokenSource:
  """What the teacher is trained on: images, or their codes where `data.tokens` names them.

  Raises:
    UserError: the codes are of other images or another tokenizer.
  """
  source, data = experiment.source("train"), experiment.config.data
  if not data.tokens:
    return source
  check_encodable(experiment)
  wanted = codes_settings(experiment, tokenizer_params)
  return load_tokens(data.tokens, wanted, source.labels, data.flip)


def run_tokenizer(tokenizer: Tokenizer, config: ml_collections.ConfigDict, workdir: Path) -> Params:
  """The tokenizer's parameters that a trained workdir's networks go with.

  Raises:
    UserError: they lie elsewhere, and are not there any more.
  """
  for name in (_GIVEN_TOKENIZER_FILE, _TOKENIZER_FILE):
    if (workdir / "tokenizer" / name).exists():
      return _read_tokenizer(workdir / "tokenizer" / name)
  return {} if tokenizer.needs_images else tokenizer.fit(None, config.seed)


def fit_classifier(experiment: Experiment, workdir: Path) -> Reference | None:
  """The protocol's reference: its classifier is trained here once, before any generator is."""
  protocol = experiment.protocol
  if protocol is None:
    return None
  path = workdir / CLASSIFIER_FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  check_record(path.parent, records.classifier_fields(experiment))
  if not exists(path):
    train, test = load_arrays(experiment.source("train")), load_arrays(experiment.source("test"))
    classifier = train_classifier(
      *train,
      experiment.config.data.num_classes,
      num_steps=protocol.classifier_steps,
      test_images=test[0],
      test_labels=test[1],
    )
    on_first(lambda: classifier.save(path))
  classifier = Classifier.load(path)
  say(
    f"classifier: test accuracy {classifier.test_accuracy:.4f},"
    f" weights sha256 {classifier.weight_hash()[:12]}"
  )
  return protocol.reference(classifier, *load_arrays(experiment.source(protocol.reference_split)))


def random_teacher(experiment: Experiment) -> Params:
  """Random network parameters, for `teacher.path='random'` and the start of a pre-training."""
  return experiment.teacher.init(jax.random.fold_in(jax.random.key(experiment.config.seed), 1))


def recipe(experiment: Experiment) -> Recipe:
  """What rebuilds an experiment's networks and samplers without its data."""
  return Recipe(experiment.config, experiment.tokenizer.image_shape)


def record_config(experiment: Experiment, workdir: Path) -> None:
  """Records the config in the workdir, and says in what it differs from the one before."""
  new = recipe(experiment)
  if (workdir / CONFIG_FILE).exists():
    with contextlib.suppress(UserError):  # a damaged one is replaced
      before, after = _flat(Recipe.load(workdir)), _flat(new)
      changed = {
        name: f"{before[name]!r} -> {after[name]!r}"
        for name in before.keys() & after
        if before[name] != after[name]
      }
      if changed:
        say(f"config: changed since the last start: {listed(changed)}")
  new.save(workdir)


def _flat(recorded: Recipe) -> dict[str, Any]:
  """A recorded config's fields by dotted name, as JSON keeps them."""
  fields = traverse_util.flatten_dict(recorded.config.to_dict(), sep=".")
  return json.loads(json.dumps(fields))


def save_teacher(
  path: Path, network: Params, tokenizer: Params, fields: dict, recipe: Recipe
) -> None:
  """A finished teacher, network and tokenizer together, with what it was trained as."""
  metadata = {"teacher": fields, "recipe": recipe.to_dict()}
  tree = fetch({"network": network, "tokenizer": tokenizer})
  on_first(lambda: save_params(path, tree, metadata))


def load_teacher(experiment: Experiment, location: str | Path) -> tuple[Params, Params | None]:
  """(network parameters, tokenizer parameters if any) of a teacher, checked against the config.

  Args:
    experiment: what the teacher must fit.
    location: of our own `teacher.safetensors` or its folder, of published weights of any family
      with a network like the teacher's, or of a safetensors file of the network's parameters by
      flat name ("Dense_0/kernel"); here or elsewhere, see `remote.local_path`.

  Raises:
    UserError: no such file, another family's file, a student's, or other sizes than the config's.
  """
  field, path = f"teacher.path={str(location)!r}", local_path(location)
  if not path.exists():
    raise UserError(f"{field} does not exist")
  if files.export_folder(path) is not None:
    raise UserError(f"{field} is an export of dimo_jax: a student, and a teacher is wanted")
  archive, tokenizer = files.read(path), None
  expected = jax.eval_shape(lambda: random_teacher(experiment))
  wanted = traverse_util.flatten_dict(expected, sep="/")
  if families.is_student(archive):
    raise UserError(f"{field} is a generator of dimo_jax: a student, and a teacher is wanted")
  if "teacher" in archive.settings:
    _check_untold(experiment, field, archive.settings["teacher"])
    tree = traverse_util.unflatten_dict(dict(archive.tensors), sep="/")
    network, tokenizer = tree["network"], tree.get("tokenizer")
    if isinstance(experiment.teacher, MaskedTeacher):
      network = maskgit.arrange(network, scan_layers=experiment.teacher.network.scan_layers)
  elif not _is_published(experiment) or set(archive.tensors) & set(wanted):
    network = traverse_util.unflatten_dict(dict(archive.tensors), sep="/")
  else:
    network = _from_published(experiment, field, archive)
  found = traverse_util.flatten_dict(network, sep="/")
  wrong = [
    f"{name} {np.shape(found[name]) if name in found else 'missing'} for"
    f" {wanted[name].shape if name in wanted else 'nothing'}"
    for name in sorted({*wanted, *found}, key=lambda name: (name.count("/"), name))
    if name not in wanted or name not in found or np.shape(found[name]) != wanted[name].shape
  ]
  if wrong:
    raise UserError(
      f"{field} does not fit model, tokenizer and data of the config:"
      f" {'; '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}"
    )
  return jax.tree.map(lambda x: np.asarray(x, np.float32), network), tokenizer


def from_published(teacher: Teacher, arrays: Mapping[str, np.ndarray]) -> Params:
  """A network's parameters from a state dict with the published key names.

  Raises:
    UserError: keys are missing or unexpected, shapes are another network's, or the network has none
      that were published.
  """
  if isinstance(teacher, GaussianTeacher):
    return edm.from_published(arrays, teacher.network)
  if isinstance(teacher, MaskedTeacher):
    return maskgit.from_published(arrays, scan_layers=teacher.network.scan_layers)
  raise _unpublished(teacher)


def to_published(teacher: Teacher, params: Params) -> dict[str, np.ndarray]:
  """The inverse of `from_published`."""
  if isinstance(teacher, GaussianTeacher):
    return edm.to_published(params, teacher.network)
  if isinstance(teacher, MaskedTeacher):
    return maskgit.to_published(params)
  raise _unpublished(teacher)


def _unpublished(teacher: Teacher) -> UserError:
  return UserError(
    f"{type(teacher).__name__} has no published key names, as --format=torch needs;"
    " take linen or stablehlo"
  )


def _is_published(experiment: Experiment) -> bool:
  """Whether there are published weights of such a teacher."""
  name = experiment.config.teacher.name
  return any(row.teacher == name for row in families.FAMILIES.values())


def _from_published(experiment: Experiment, field: str, archive: Archive) -> Params:
  """The network of a published file; of one with several, the first that is a teacher."""
  wanted = experiment.config.teacher.name
  network: Any = getattr(experiment.teacher, "network", None)
  try:
    name = families.guess(archive)
    family = families.FAMILIES[name]
    if family.teacher != wanted:
      fitting = [row.title for row in families.FAMILIES.values() if row.teacher == wanted]
      raise UserError(
        f"it is {family.title}, and teacher.name={wanted!r} needs {' or '.join(fitting)}"
      )
    if family.student:
      raise UserError(
        f"it is {family.title}: a student, and a teacher is wanted; if it only looks like one,"
        f" python -m dimo_jax.convert --family={family.teacher} makes a teacher's file of it"
      )
    families.check_sizes(family.sizes(archive), network)
    scan_layers = experiment.config.model.scan_layers
    parts = families.convert(archive, name, scan_layers=scan_layers).parts
  except UserError as error:
    raise UserError(f"{field}: {error}") from error
  return next(iter(parts.values()))


def _check_untold(experiment: Experiment, field: str, trained: Mapping[str, Any]) -> None:
  """Raises UserError where a teacher of ours differs in what no shape of its weights tells."""
  for name in _UNTOLD:
    value = records.flat_fields(experiment.config, name)[name]
    wanted = json.loads(json.dumps(value))  # as it is kept
    if trained.get(name, wanted) != wanted:
      raise UserError(
        f"{field} was trained with {name}={trained[name]!r}, and the config says {wanted!r}"
      )


def first_stage(experiment: Experiment, teacher: Params) -> FirstStage | None:
  """The weights that `train.start_from` names; None where it names none.

  Raises:
    UserError: no distillation there, none evaluated, or one of another teacher or other networks.
  """
  train = experiment.config.train
  found = _find_first_stage(experiment, teacher)
  if found is None:
    return None
  directory, step = found
  checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
  tree = checkpoints.read(step)
  checkpoints.close()
  say(
    f"starts from {'the best' if train.start_from_best else 'the last'} student of {directory},"
    f" step {step}"
  )
  generator = merge(tree["ema"], tree["generator"]["frozen"] or {})
  fake_score = merge(tree["fake_score"]["params"], tree["fake_score"]["frozen"] or {})
  stage = FirstStage(generator, experiment.objective.score_params(fake_score))
  for weights in stage:
    if jax.tree.map(np.shape, weights) != jax.tree.map(np.shape, teacher):
      raise UserError(
        f"train.start_from={train.start_from!r} holds other networks than the config's"
      )
  return stage


def _find_first_stage(experiment: Experiment, teacher: Params | None) -> tuple[Path, int] | None:
  """(folder, step) of the distillation that `train.start_from` names; None where it names none.

  Raises:
    UserError: no distillation there, none evaluated, or one by another method or of another
      teacher.
  """
  workdir = experiment.config.train.start_from
  if not workdir:
    return None
  directory = Path(workdir) / "distill"
  if not (directory / "checkpoints").is_dir() or not (directory / RECORD_FILE).is_file():
    raise UserError(
      f"train.start_from={workdir!r} holds no distillation; name the workdir of a finished one"
    )
  record = json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))
  if record.get("objective") != experiment.config.objective:
    raise UserError(
      f"train.start_from={workdir!r} was distilled with objective={record.get('objective')!r};"
      f" this run's is {experiment.config.objective!r}"
    )
  if not experiment.config.teacher.path:
    own = Path(workdir) / "teacher"
    known = str(own) if (own / TEACHER_FILE).exists() else "the teacher.path of that run"
    raise UserError(
      f"train.start_from={workdir!r} goes on with the teacher of that run: set teacher.path to"
      f" {known}"
    )
  if teacher is not None and record.get("teacher.sha256") != params_hash(teacher):
    raise UserError(
      f"train.start_from={workdir!r} was distilled from another teacher than this run's,"
      f" teacher.path={experiment.config.teacher.path!r}"
    )
  checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
  best = experiment.config.train.start_from_best
  step = checkpoints.best_step() if best else checkpoints.last_step()
  checkpoints.close()
  if step is None:
    raise UserError(
      f"train.start_from={workdir!r} holds no evaluated checkpoint; set train.start_from_best=False"
    )
  return directory, step


def check_workdir(experiment: Experiment, workdir: Path) -> None:
  """What the stages would find one after the other, found before any of them computes.

  Raises:
    UserError: the given teacher, tokenizer or first stage cannot be used, or the config differs
      from the records of the stages begun in `workdir`; all changes are named at once.
  """
  if experiment.config.tokenizer.path not in ("", RANDOM):
    experiment.tokenizer.fit(None, experiment.config.seed)
  path = experiment.config.teacher.path
  given = None if path in ("", "random") else load_teacher(experiment, path)[0]
  if not records.has_checkpoints(workdir / "distill"):  # later it is not needed any more
    _find_first_stage(experiment, given)
  stages = {
    "tokenizer": records.tokenizer_fields(experiment),
    "distill": records.distill_fields(experiment, given),
  }
  if experiment.protocol is not None:
    stages["classifier"] = records.classifier_fields(experiment)
  if not path:
    stages["teacher"] = records.teacher_fields(experiment)
  changed: dict[str, str] = {}
  for stage, fields in stages.items():
    changed |= changed_fields(workdir / stage, fields)
  changed.pop("tokenizer.sha256", None)  # compared once it is there, as is a teacher not given
  if given is None:
    changed.pop("teacher.sha256", None)
  refuse_changes(workdir, changed)
