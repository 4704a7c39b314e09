"""Teachers: a network, its process and its tokenizer, by name."""

from collections.abc import Callable

import jax.numpy as jnp
import ml_collections

from dimo_jax.models.mask_transformer import MaskTransformer
from dimo_jax.teachers.maskgit import MaskedTeacher
from dimo_jax.teachers.tokenizers import NoTokenizer, PatchTokenizer, Tokenizer
from dimo_jax.types import choose

__all__ = ["TEACHERS", "TOKENIZERS", "build_teacher", "build_tokenizer"]

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _maskgit(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> MaskedTeacher:
  return MaskedTeacher(
    MaskTransformer(
      num_tokens=tokenizer.grid[0] * tokenizer.grid[1],
      codebook_size=tokenizer.codebook_size,
      num_classes=config.data.num_classes,
      dtype=choose(_DTYPES, config.precision.compute_dtype, "precision.compute_dtype"),
      **config.model,
    )
  )


TEACHERS: dict[str, Callable[[ml_collections.ConfigDict, Tokenizer], MaskedTeacher]] = {
  "maskgit": _maskgit
}
TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {"patch": PatchTokenizer, "none": NoTokenizer}


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


def build_teacher(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> MaskedTeacher:
  """The teacher that `config.teacher.name` names."""
  return choose(TEACHERS, config.teacher.name, "teacher.name")(config, tokenizer)
