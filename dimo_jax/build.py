"""From a config to objects: the `ConfigDict` stops here, and so does most bad input."""

import dataclasses
import functools
import math
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import traverse_util
from jax.sharding import Mesh

from dimo_jax.data.sources import PairSource, Source, load_pairs, load_source
from dimo_jax.evaluation.protocols import PROTOCOLS, Protocol
from dimo_jax.evaluation.published import PUBLISHED, PublishedProtocol
from dimo_jax.objectives import OBJECTIVES, Objective
from dimo_jax.objectives.denoising import GaussianDenoising, MaskedDenoising
from dimo_jax.optim import OptimizerSpec
from dimo_jax.profile import check_profile_steps
from dimo_jax.samplers import Sampler
from dimo_jax.samplers.edm import Heun
from dimo_jax.samplers.maskgit import MaskGit
from dimo_jax.sharding import check_batch, check_rules, make_mesh
from dimo_jax.state import DistillState, PretrainState
from dimo_jax.teachers import COMPUTE_DTYPES, Teacher, build_teacher, build_tokenizer, pick
from dimo_jax.teachers.edm import GaussianTeacher
from dimo_jax.teachers.maskgit import MaskedTeacher
from dimo_jax.teachers.network import MaskedNetwork
from dimo_jax.teachers.tokenizers import Tokenizer
from dimo_jax.trackers import check_trackers
from dimo_jax.types import Params, UserError, choose

STORAGE_DTYPES = ("float32", "bfloat16")
NUM_SEEDS = 2**32  # what every generator of random numbers takes


@dataclasses.dataclass(frozen=True)
class Models:
  """Networks, losses and samplers that a config describes, without its data.

  Attributes:
    pretraining: the teacher's loss.
    student_sampler: how the student is sampled at test time.
    decoding: the teacher's sampler.
  """

  tokenizer: Tokenizer
  teacher: Teacher
  pretraining: MaskedDenoising | GaussianDenoising
  objective: Objective
  student_sampler: Sampler
  decoding: MaskGit | Heun


@dataclasses.dataclass(frozen=True)
class Experiment(Models):
  """Everything a config describes, built and checked; nothing is computed yet.

  Attributes:
    train_source, test_source: None where the data set is classes only.
    protocol: how numbers are made, with the data set's own features; None where they are not.
    published: how they are made with Inception's; None where they are not.
    pairs: of noise and the teacher's image, for a regression.
  """

  config: ml_collections.ConfigDict
  mesh: Mesh
  train_source: Source | None
  test_source: Source | None
  pretrain_optimizer: OptimizerSpec
  generator_optimizer: OptimizerSpec
  fake_score_optimizer: OptimizerSpec
  protocol: Protocol | None
  published: PublishedProtocol | None
  pairs: PairSource | None

  @property
  def num_updates(self) -> int:
    """Fake-score updates of the whole distillation: the length of every schedule."""
    return self.config.train.num_steps * self.objective.fake_rounds

  def source(self, split: str) -> Source:
    """The images of a split, of an experiment that has images."""
    source = {"train": self.train_source, "test": self.test_source}[split]
    assert source is not None  # `build` refuses what needs images without them
    return source

  @property
  def model_flops(self) -> dict[str, float]:
    """Floating-point operations of one iteration, by network; optimisers and losses not counted."""
    train, forward_flops = self.config.train, self.teacher.forward_flops
    samples = train.batch_size * train.accumulation
    return {k: v * samples * forward_flops for k, v in self.objective.forward_equivalents.items()}

  @property
  def untested(self) -> list[str]:
    """Lines about what lies outside of the ranges in which the preset was tried."""
    train, tested = self.config.train, self.config.tested
    batch_size = train.batch_size * train.accumulation
    values = {"train.batch_size * train.accumulation": (batch_size, tested.batch_size)} | {
      f"optim.{name}.learning_rate": (self.config.optim[name].learning_rate, tested.learning_rate)
      for name in ("generator", "fake_score")
    }
    return [
      f"warning: {name}={value:g} lies outside of {tried[0]:g} .. {tried[1]:g}, where this preset"
      " was tried; small batches and other rates may collapse or give mosaics: watch the pictures"
      for name, (value, tried) in values.items()
      if tried and not tried[0] <= value <= tried[1]
    ]

  @property
  def has_pictures(self) -> bool:
    """Whether tokens can be turned into images."""
    return self.tokenizer.image_shape is not None


def build(config: ml_collections.ConfigDict, mesh: Mesh | None = None) -> Experiment:
  """Builds and checks an experiment, on a mesh of all devices if none is given.

  Raises:
    UserError: a value that cannot work, named with what would be right.
  """
  mesh = make_mesh(config.mesh.fsdp) if mesh is None else mesh
  _check_numbers(config, mesh)
  if config.data.name == "labels":
    train_source = test_source = None
  else:
    train_source, test_source = (
      load_source(
        config.data.name,
        split,
        config.data.path,
        image_size=config.data.image_size,
        tfds_name=config.data.tfds_name,
        num_classes=config.data.num_classes,
      )
      for split in ("train", "test")
    )
    if config.data.num_classes != train_source.num_classes:
      raise UserError(
        f"data.num_classes={config.data.num_classes} must be {train_source.num_classes}, as in"
        f" data.name={config.data.name!r}"
      )
  models = build_models(config, train_source.image_shape if train_source else None)
  tokenizer, teacher, objective = models.tokenizer, models.teacher, models.objective
  _check_teacher(config, tokenizer, teacher)
  pretrain_optimizer = OptimizerSpec(**config.teacher.pretrain.optim)
  pretrain_steps = config.teacher.pretrain.num_steps
  if not config.teacher.path:
    if train_source is None or not tokenizer.image_shape:
      raise UserError(
        "teacher.path='' trains a teacher, which needs images: set teacher.path to a trained"
        " teacher, or data.name and tokenizer.name to ones with images"
      )
    if pretrain_steps < 1:
      raise UserError(
        f"teacher.pretrain.num_steps={pretrain_steps} must be positive, or teacher.path given"
      )
    check_batch(config.teacher.pretrain.batch_size, mesh, "teacher.pretrain.batch_size")
    pretrain_optimizer.check(pretrain_steps, "teacher.pretrain.optim")

  elif config.data.tokens:
    raise UserError(
      f"data.tokens={config.data.tokens!r} is what a teacher is trained on, and teacher.path="
      f"{config.teacher.path!r} is one already; leave one of them empty"
    )

  if objective.uses_pairs != bool(config.data.pairs):
    raise UserError(
      f"data.pairs={config.data.pairs!r} goes with dmd2.regression_weight: set both or neither"
      " (--mode=pairs makes pairs)"
    )
  pairs = None
  if objective.uses_pairs and tokenizer.image_shape:
    pairs = load_pairs(config.data.pairs, tokenizer.image_shape, max(1, config.data.num_classes))
  if objective.uses_images and train_source is None:
    raise UserError(
      f"objective={config.objective!r} needs real images with these settings, and"
      f" data.name={config.data.name!r} has none"
    )
  optimizers = {}
  for name in ("generator", "fake_score"):
    optimizers[name] = OptimizerSpec(**config.optim[name])
    optimizers[name].check(config.train.num_steps * objective.fake_rounds, f"optim.{name}")
  states = functools.partial(_states, config, teacher, objective, optimizers, pretrain_optimizer)
  check_rules(jax.eval_shape(states, tokenizer.shapes()), mesh, config.mesh.rules)

  protocol = published = None
  if config.evaluation.protocol in PUBLISHED:
    published = _published(config, mesh, tokenizer)
  elif config.evaluation.protocol != "none":
    choose({**PROTOCOLS, **PUBLISHED}, config.evaluation.protocol, "evaluation.protocol")
    protocol = PROTOCOLS[config.evaluation.protocol]
    if tokenizer.image_shape is None or train_source is None:
      raise UserError(
        f"evaluation.protocol={protocol.name!r} needs pictures: data.name and tokenizer.name that"
        " have them, or evaluation.protocol='none'"
      )
    if train_source.num_levels != protocol.num_levels:
      raise UserError(
        f"evaluation.protocol={protocol.name!r} is not for data.name={config.data.name!r};"
        " evaluation.protocol='none' is for data without one"
      )
    check_batch(config.evaluation.batch_size, mesh, "evaluation.batch_size")
  return Experiment(
    **vars(models),
    config=config,
    mesh=mesh,
    train_source=train_source,
    test_source=test_source,
    pretrain_optimizer=pretrain_optimizer,
    generator_optimizer=optimizers["generator"],
    fake_score_optimizer=optimizers["fake_score"],
    protocol=protocol,
    published=published,
    pairs=pairs,
  )


def _states(
  config: ml_collections.ConfigDict,
  teacher: Teacher,
  objective: Objective,
  optimizers: Mapping[str, OptimizerSpec],
  pretrain_optimizer: OptimizerSpec,
  tokenizer_params: Params,
) -> tuple[Any, ...]:
  """Whatever of a run lies on the mesh, under the names that it has there; for its shapes."""
  key, frozen = jax.random.key(0), tuple(config.optim.frozen)
  params = teacher.init(key)
  frozen_teacher = teacher.frozen_state(params, tokenizer_params)
  trained = {"generator": params, "fake_score": objective.fake_score_params(key, frozen_teacher)}
  num_updates = config.train.num_steps * objective.fake_rounds
  nets = {
    name: teacher.trained_state(weights, optimizers[name].build(num_updates), frozen)
    for name, weights in trained.items()
  }
  distillation = DistillState.create(**nets, extra=objective.init_extra())
  if config.teacher.path:
    return distillation, frozen_teacher
  num_steps = config.teacher.pretrain.num_steps
  network = teacher.trained_state(params, pretrain_optimizer.build(num_steps))
  return distillation, frozen_teacher, PretrainState.create(network)


def _check_teacher(
  config: ml_collections.ConfigDict, tokenizer: Tokenizer, teacher: Teacher
) -> None:
  """Raises UserError where a teacher, which may be the user's own, does not fit data and tokenizer
  or its own network.
  """
  name = f"teacher.name={config.teacher.name!r}"
  if teacher.null_class != config.data.num_classes:
    raise UserError(
      f"{name} has null_class={teacher.null_class}, the id after its classes: data.num_classes="
      f"{config.data.num_classes} must be that"
    )
  shape: tuple[int, ...]
  if isinstance(teacher, MaskedNetwork):
    found = teacher.codebook_size, teacher.num_tokens
    wanted = tokenizer.codebook_size, math.prod(tokenizer.grid)
    if found != wanted:
      raise UserError(
        f"{name} has {found[0]} codes and {found[1]} tokens;"
        f" tokenizer.name={config.tokenizer.name!r} makes {wanted[0]} and {wanted[1]}"
      )
    shape = (1, teacher.num_tokens, teacher.codebook_size + 1)
  else:
    if tokenizer.image_shape != teacher.image_shape:
      raise UserError(
        f"{name} makes images of shape {teacher.image_shape}; tokenizer.name="
        f"{config.tokenizer.name!r} with data.name={config.data.name!r} has"
        f" {tokenizer.image_shape or 'none'}: take tokenizer.name='pixels' and a data.name"
        " with images of that shape, which only a GAN or a teacher's training look at"
      )
    shape = (1, *teacher.image_shape)
  if type(teacher) in (MaskedTeacher, GaussianTeacher):
    return  # these are built to fit
  condition = {"class_id": jnp.zeros(1, jnp.int32)}
  try:
    params = jax.eval_shape(teacher.init, jax.random.key(0))
    output = jax.eval_shape(teacher.apply, params, teacher.example, condition)
  except UserError:
    raise
  except Exception as error:  # the user's own code
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not _is_library(frame.filename)]
    frame = (theirs or frames)[-1]
    line = (str(error).splitlines() or [""])[0]
    raise UserError(
      f"{name}: its network fails on one sample: {type(error).__name__}: {line}"
      f" ({frame.filename}, line {frame.lineno})"
    ) from error
  found_shape = getattr(output, "shape", type(output).__name__)
  if found_shape != shape:
    raise UserError(f"{name}: its network makes {found_shape} of one sample, must make {shape}")


def _is_library(file: str) -> bool:
  """Whether a file is of this package, of Python or of what is installed into it."""
  paths = sysconfig.get_paths()
  folders = [Path(paths[name]) for name in ("stdlib", "purelib", "platlib")]
  return any(Path(file).is_relative_to(folder) for folder in [*folders, Path(__file__).parent])


def build_models(
  config: ml_collections.ConfigDict, image_shape: tuple[int, int, int] | None
) -> Models:
  """Builds what a config says of networks and samplers, for images of this shape (None: tokens
  only).

  Raises:
    UserError: a value that cannot work, named with what would be right.
  """
  tokenizer = build_tokenizer(config, image_shape)
  teacher = build_teacher(config, tokenizer)
  pretraining, decoding, objective_fields = _family(config, tokenizer, teacher)
  objective_type = choose(OBJECTIVES, config.objective, "objective", extensible=True)
  if objective_type.teacher_kind != teacher.kind:
    raise UserError(
      f"objective={config.objective!r} is for {objective_type.teacher_kind} teachers;"
      f" teacher.name={config.teacher.name!r} is {teacher.kind}"
    )
  objective = objective_type(**objective_fields, **config[config.objective])
  student_sampler = objective.sampler(config.sampling.to_dict())
  return Models(tokenizer, teacher, pretraining, objective, student_sampler, decoding)


def _family(
  config: ml_collections.ConfigDict, tokenizer: Tokenizer, teacher: Teacher
) -> tuple[MaskedDenoising | GaussianDenoising, MaskGit | Heun, dict[str, Any]]:
  """The teacher's loss and sampler, and what an objective must know of it."""
  fields: dict[str, Any]
  if isinstance(teacher, MaskedNetwork):
    fields = {"num_tokens": teacher.num_tokens, "mask_token_id": teacher.mask_token_id}
    masked = pick(MaskedDenoising, config.teacher.pretrain)
    pretraining = MaskedDenoising(**fields, **masked)
    fields["codebook_size"] = teacher.codebook_size
    decoding = MaskGit(
      grid=tokenizer.grid,
      codebook_size=teacher.codebook_size,
      mask_token_id=teacher.mask_token_id,
      **config.teacher.decoding,
    )
    return pretraining, decoding, fields
  fields = {"process": teacher.process, "image_shape": teacher.image_shape}
  gaussian = pick(GaussianDenoising, config.teacher.pretrain)
  denoising = GaussianDenoising(**fields, **gaussian)
  heun = Heun(image_shape=teacher.image_shape, **config.teacher.sampling)
  # An unconditional network takes the label 0, which is its null.
  return denoising, heun, fields | {"num_classes": max(1, config.data.num_classes)}


def _published(
  config: ml_collections.ConfigDict, mesh: Mesh, tokenizer: Tokenizer
) -> PublishedProtocol | None:
  """The published protocol that the config names; None where its files are not given."""
  evaluation = config.evaluation
  protocol = PUBLISHED[evaluation.protocol]
  field = f"evaluation.protocol={protocol.name!r}"
  if not evaluation.inception and not evaluation.statistics:
    return None
  for name, value, wanted in (
    ("inception", evaluation.inception, "the weights, pt_inception-2015-12-05-6726825d.pth"),
    ("statistics", evaluation.statistics, protocol.statistics),
  ):
    if not value:
      raise UserError(f"evaluation.{name}='' must be {wanted}, with {field}")
  if tokenizer.image_shape is None:
    raise UserError(f"{field} needs pictures; tokenizer.name={config.tokenizer.name!r} has none")
  shape = (protocol.image_size, protocol.image_size, 3)
  if tokenizer.image_shape != shape:
    raise UserError(f"{field} is for images {shape}; this run's are {tokenizer.image_shape}")
  if config.data.num_classes != protocol.num_classes:
    raise UserError(
      f"{field}: data.num_classes={config.data.num_classes} must be {protocol.num_classes}"
    )
  if jax.process_count() > 1:
    raise UserError(
      f"{field} is for runs of one process: set 'none', and follow the run with"
      " `python -m dimo_jax.evaluate watch`"
    )
  check_batch(evaluation.batch_size, mesh, "evaluation.batch_size")
  return protocol.with_images(evaluation.num_images) if evaluation.num_images else protocol


def _check_numbers(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Ranges of the fields that no factory looks at."""
  for path, value in traverse_util.flatten_dict(config.to_dict(), sep=".").items():
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f"{path}={value} must be finite")
  check_batch(config.train.batch_size, mesh, "train.batch_size")
  choose(dict.fromkeys(("device", "host")), config.train.ema_memory, "train.ema_memory")
  for name in ("batch_size", "learning_rate"):
    if config.tested[name] and not (
      len(config.tested[name]) == 2 and config.tested[name][0] <= config.tested[name][1]
    ):
      raise UserError(f"tested.{name}={config.tested[name]} must be () or (lowest, highest)")
  choose(dict.fromkeys(STORAGE_DTYPES), config.precision.teacher_dtype, "precision.teacher_dtype")
  choose(COMPUTE_DTYPES, config.precision.compute_dtype, "precision.compute_dtype")
  positive = (
    ("data", "num_read_threads"),
    ("train", "num_steps"),
    ("train", "accumulation"),
    ("train", "ema_every_steps"),
    ("log", "every_steps"),
    ("log", "checkpoint_every_steps"),
    ("log", "keep_checkpoints"),
    ("log", "num_pictures"),
    ("health", "patience"),
    ("health", "max_skipped"),
  )
  for section, name in positive:
    if config[section][name] < 1:
      raise UserError(f"{section}.{name}={config[section][name]} must be 1 or more")
  for name in ("pictures_every_steps", "evaluate_every_steps", "keep_every_steps"):
    if config.log[name] < 0:
      raise UserError(f"log.{name}={config.log[name]} must not be negative; 0 is off")
  if config.log.keep_every_steps % config.log.checkpoint_every_steps:
    raise UserError(
      f"log.keep_every_steps={config.log.keep_every_steps} must be a multiple of"
      f" log.checkpoint_every_steps={config.log.checkpoint_every_steps}; 0 is off"
    )
  check_profile_steps(config.log.profile_steps)
  check_trackers(config.log.trackers)
  for path, decay in (
    ("train.ema_decay", config.train.ema_decay),
    ("teacher.pretrain.ema_decay", config.teacher.pretrain.ema_decay),
  ):
    if not 0 <= decay < 1:
      raise UserError(f"{path}={decay} must lie in [0, 1)")
  for path, seed in (("seed", config.seed), ("evaluation.seed", config.evaluation.seed)):
    if not 0 <= seed < NUM_SEEDS:
      raise UserError(f"{path}={seed} must lie in 0 .. {NUM_SEEDS - 1}")
  if not config.evaluation.teacher_steps or min(config.evaluation.teacher_steps) < 1:
    raise UserError(
      f"evaluation.teacher_steps={config.evaluation.teacher_steps} must hold positive step counts"
    )
