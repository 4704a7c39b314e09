"""Teachers: a network, its process and its tokenizer, by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_collections

from dimo_jax.models.edm import EDMPrecond, VPPrecond
from dimo_jax.models.mask_transformer import MaskTransformer
from dimo_jax.models.mlp import DenoisingMLP
from dimo_jax.models.unet import ADM, SongUNet
from dimo_jax.processes.gaussian import PROCESSES, VariancePreserving
from dimo_jax.teachers.edm import GaussianTeacher
from dimo_jax.teachers.maskgit import MaskedTeacher
from dimo_jax.teachers.tokenizers import NoTokenizer, PatchTokenizer, PixelTokenizer, Tokenizer
from dimo_jax.types import UserError, choose

__all__ = ["DENOISERS", "TEACHERS", "TOKENIZERS", "Teacher", "build_teacher", "build_tokenizer"]

Teacher = MaskedTeacher | GaussianTeacher

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DENOISERS: dict[str, type[ADM] | type[SongUNet] | type[DenoisingMLP]] = {
  "adm": ADM,
  "song": SongUNet,
  "mlp": DenoisingMLP,
}
_PRECONDITIONERS: dict[str, type[EDMPrecond] | type[VPPrecond]] = {
  "edm": EDMPrecond,
  "variance_preserving": VPPrecond,
}


def pick(kind: type, fields: ml_collections.ConfigDict) -> dict[str, Any]:
  """Those of a config section's fields that a dataclass has: sections serve several kinds."""
  names = {field.name for field in dataclasses.fields(kind)}
  return {name: value for name, value in fields.items() if name in names}


def _maskgit(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> MaskedTeacher:
  if not tokenizer.codebook_size:
    raise UserError(
      f"teacher.name='maskgit' needs tokens; tokenizer.name={config.tokenizer.name!r} makes none"
    )
  return MaskedTeacher(
    MaskTransformer(
      num_tokens=tokenizer.grid[0] * tokenizer.grid[1],
      codebook_size=tokenizer.codebook_size,
      num_classes=config.data.num_classes,
      dtype=choose(_DTYPES, config.precision.compute_dtype, "precision.compute_dtype"),
      **config.model,
    )
  )


def _edm(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> GaussianTeacher:
  if tokenizer.codebook_size or tokenizer.image_shape is None:
    raise UserError(
      f"teacher.name='edm' needs images; tokenizer.name={config.tokenizer.name!r} has none:"
      " use 'pixels'"
    )
  height, width, channels = tokenizer.image_shape
  if height != width:
    raise UserError(f"teacher.name='edm' needs square images; data.name has {height}x{width}")
  process_type = choose(PROCESSES, config.process.name, "process.name")
  process = process_type(**pick(process_type, config.process))
  if isinstance(process, VariancePreserving) and process.prediction != "epsilon":
    raise UserError(
      f"process.prediction={process.prediction!r} must be 'epsilon' with teacher.name='edm': its"
      " variance-preserving networks predict the noise"
    )
  denoiser = choose(DENOISERS, config.denoiser.name, "denoiser.name")
  model = denoiser(
    img_resolution=height,
    img_channels=channels,
    label_dim=config.data.num_classes,
    dtype=choose(_DTYPES, config.precision.compute_dtype, "precision.compute_dtype"),
    **pick(denoiser, config.denoiser),
  )
  precond = _PRECONDITIONERS[config.process.name]
  options = {"sigma_data": config.process.sigma_data} if precond is EDMPrecond else {}
  return GaussianTeacher(precond(model, **options), process)


TEACHERS: dict[str, Callable[[ml_collections.ConfigDict, Tokenizer], Teacher]] = {
  "maskgit": _maskgit,
  "edm": _edm,
}
TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {
  "patch": PatchTokenizer,
  "pixels": PixelTokenizer,
  "none": NoTokenizer,
}


def build_tokenizer(
  config: ml_collections.ConfigDict, image_shape: tuple[int, int, int] | None
) -> Tokenizer:
  """The tokenizer that `config.tokenizer` names, for images of this shape (None: no images)."""
  tokenizer = choose(TOKENIZERS, config.tokenizer.name, "tokenizer.name")
  return tokenizer(
    image_shape,
    config.tokenizer.patch_size,
    config.tokenizer.grid_size,
    config.tokenizer.codebook_size,
  )


def build_teacher(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> Teacher:
  """The teacher that `config.teacher.name` names."""
  return choose(TEACHERS, config.teacher.name, "teacher.name")(config, tokenizer)
