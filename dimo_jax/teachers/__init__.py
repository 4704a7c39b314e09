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
from dimo_jax.models.vqgan import VQGAN
from dimo_jax.processes.gaussian import PROCESSES, VariancePreserving
from dimo_jax.teachers.edm import GaussianTeacher
from dimo_jax.teachers.maskgit import MaskedTeacher
from dimo_jax.teachers.network import GaussianNetwork, MaskedNetwork
from dimo_jax.teachers.tokenizers import NoTokenizer, PatchTokenizer, PixelTokenizer, Tokenizer
from dimo_jax.teachers.vqgan import VQGANTokenizer
from dimo_jax.types import UserError, choose

__all__ = [
  "COMPUTE_DTYPES",
  "DENOISERS",
  "TEACHERS",
  "TOKENIZERS",
  "Teacher",
  "build_teacher",
  "build_tokenizer",
]

Teacher = MaskedNetwork | GaussianNetwork
ImageShape = tuple[int, int, int]

COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
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
      dtype=choose(COMPUTE_DTYPES, config.precision.compute_dtype, "precision.compute_dtype"),
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
    raise UserError(
      f"teacher.name='edm' needs square images; data.name={config.data.name!r} has"
      f" {height}x{width}: set data.image_size, to which images are scaled and cropped"
    )
  process_type = choose(PROCESSES, config.process.name, "process.name", extensible=True)
  process = process_type(**pick(process_type, config.process))
  if isinstance(process, VariancePreserving) and process.prediction != "epsilon":
    raise UserError(
      f"process.prediction={process.prediction!r} must be 'epsilon' with teacher.name='edm': its"
      " variance-preserving networks predict the noise"
    )
  denoiser = choose(DENOISERS, config.denoiser.name, "denoiser.name", extensible=True)
  fields = pick(denoiser, config.denoiser)
  if "remat" not in fields and config.denoiser.remat != "none":
    raise UserError(
      f"denoiser.remat={config.denoiser.remat!r} must be 'none':"
      f" denoiser.name={config.denoiser.name!r} keeps everything"
    )
  model = denoiser(
    img_resolution=height,
    img_channels=channels,
    label_dim=config.data.num_classes,
    dtype=choose(COMPUTE_DTYPES, config.precision.compute_dtype, "precision.compute_dtype"),
    **fields,
  )
  precond = _PRECONDITIONERS[config.process.name]
  options = {"sigma_data": config.process.sigma_data} if precond is EDMPrecond else {}
  return GaussianTeacher(precond(model, **options), process)


TEACHERS: dict[str, Callable[[ml_collections.ConfigDict, Tokenizer], Teacher]] = {
  "maskgit": _maskgit,
  "edm": _edm,
}


def _patch(config: ml_collections.ConfigDict, image_shape: ImageShape | None) -> PatchTokenizer:
  if image_shape is None:
    raise UserError("tokenizer.name='patch' needs a data set with images")
  return PatchTokenizer(image_shape, **pick(PatchTokenizer, config.tokenizer))


def _pixels(config: ml_collections.ConfigDict, image_shape: ImageShape | None) -> PixelTokenizer:
  if image_shape is None:
    raise UserError(
      f"tokenizer.name='pixels' needs images, and data.name={config.data.name!r} has none"
    )
  return PixelTokenizer(image_shape)


def _vqgan(config: ml_collections.ConfigDict, image_shape: ImageShape | None) -> VQGANTokenizer:
  fields = config.tokenizer
  network = VQGAN(
    resolution=fields.grid_size * fields.patch_size,
    dtype=choose(COMPUTE_DTYPES, config.precision.compute_dtype, "precision.compute_dtype"),
    **pick(VQGAN, fields),
  )
  tokenizer = VQGANTokenizer(network, fields.path)
  halvings = len(network.channel_mult) - 1
  if fields.patch_size != 2**halvings:
    raise UserError(
      f"tokenizer.patch_size={fields.patch_size} must be {2**halvings}, as"
      f" tokenizer.channel_mult={network.channel_mult} halves the image {halvings} times"
    )
  if image_shape not in (None, tokenizer.image_shape):
    raise UserError(
      f"tokenizer.grid_size={fields.grid_size} times tokenizer.patch_size={fields.patch_size} makes"
      f" images of shape {tokenizer.image_shape}; those of data.name={config.data.name!r} have"
      f" {image_shape}"
    )
  return tokenizer


def _none(config: ml_collections.ConfigDict, image_shape: ImageShape | None) -> NoTokenizer:
  del image_shape
  return NoTokenizer(**pick(NoTokenizer, config.tokenizer))


TOKENIZERS: dict[str, Callable[[ml_collections.ConfigDict, ImageShape | None], Tokenizer]] = {
  "patch": _patch,
  "pixels": _pixels,
  "vqgan": _vqgan,
  "none": _none,
}


def build_tokenizer(config: ml_collections.ConfigDict, image_shape: ImageShape | None) -> Tokenizer:
  """The tokenizer that `config.tokenizer` names, for images of this shape (None: no images)."""
  make = choose(TOKENIZERS, config.tokenizer.name, "tokenizer.name", extensible=True)
  if config.tokenizer.path and make is not _vqgan:
    raise UserError(
      f"tokenizer.path={config.tokenizer.path!r} is for tokenizer.name='vqgan', and the config says"
      f" {config.tokenizer.name!r}"
    )
  return make(config, image_shape)


def build_teacher(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> Teacher:
  """The teacher that `config.teacher.name` names."""
  make = choose(TEACHERS, config.teacher.name, "teacher.name", extensible=True)
  return make(config, tokenizer)
