"""Codes of training images, made once by `python -m dimo_jax.encode`."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int32

from dimo_jax.data.sources import Source, pixels_sha256
from dimo_jax.types import UserError

__all__ = ["MANIFEST", "TOKENS", "TokenSource", "describe", "load_tokens", "read_manifest"]

FORMAT = 2
TOKENS, MANIFEST = "tokens.npy", "tokens.json"


@dataclass(frozen=True, eq=False)
class TokenSource:
  """Codes and classes by index, those of mirrored images too if `mirrored`.

  Attributes:
    codes: [n, 2, l], of each image as it is and mirrored, read from the disk when asked for.
  """

  codes: np.ndarray
  labels: Int32[np.ndarray, " n"]
  mirrored: bool

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: SupportsIndex, /) -> dict[str, np.ndarray]:
    """{"tokens": int32 [l], "class_id": scalar}, and "mirrored_tokens" as the first."""
    tokens, mirrored_tokens = self.codes[index].astype(np.int32)
    sample = {"tokens": tokens, "class_id": np.asarray(self.labels[index])}
    return sample | ({"mirrored_tokens": mirrored_tokens} if self.mirrored else {})


def describe(
  source: Source, num_tokens: int, tokenizer_sha256: str, compute_dtype: str
) -> dict[str, Any]:
  """What codes depend on, as their manifest has it; images are known by their number, their classes
  and the pixels of some of them, evenly spaced.
  """
  return {
    "format": FORMAT,
    "num_images": len(source),
    "num_tokens": num_tokens,
    "labels_sha256": hashlib.sha256(source.labels.tobytes()).hexdigest(),
    "images_sha256": pixels_sha256(source),
    "tokenizer_sha256": tokenizer_sha256,
    "compute_dtype": compute_dtype,
  }


def read_manifest(folder: Path, field: str) -> dict[str, Any]:
  """The manifest of codes; `field` is for errors.

  Raises:
    UserError: there is none.
  """
  try:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(
      f"{field} must be a folder that python -m dimo_jax.encode made: {error}"
    ) from error


def load_tokens(
  path: str, wanted: dict[str, Any], labels: np.ndarray, mirrored: bool
) -> TokenSource:
  """The codes in the folder `path`.

  Args:
    wanted: as `describe` gives it, of the config's own images and tokenizer.

  Raises:
    UserError: no codes there, not all of them, or those of other images or another tokenizer.
  """
  folder, field = Path(path), f"data.tokens={path!r}"
  manifest = read_manifest(folder, field)
  wrong = [name for name, value in wanted.items() if manifest.get(name) != value]
  if wrong:
    raise UserError(f"{field} holds codes of another {_what(wrong[0])}: encode the images anew")
  if manifest["num_done"] < manifest["num_images"]:
    raise UserError(
      f"{field} is not finished, {manifest['num_done']} of {manifest['num_images']}: run the"
      " command that encodes it again"
    )
  try:
    codes = np.load(folder / TOKENS, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError) as error:
    raise UserError(f"{field} is not whole, {error}: encode the images anew") from error
  shape = (wanted["num_images"], 2, wanted["num_tokens"])
  if codes.shape != shape:
    raise UserError(f"{field} is not whole: its codes are {codes.shape}, must be {shape}")
  return TokenSource(codes, labels, mirrored)


def _what(name: str) -> str:
  texts = {
    "tokenizer_sha256": "tokenizer than tokenizer.path names",
    "labels_sha256": "data set than data.path names",
    "images_sha256": "data set than data.path names, or were decoded otherwise",
    "num_images": "data set than data.path names",
    "compute_dtype": "precision than precision.compute_dtype",
    "num_tokens": "number of tokens than the tokenizer makes",
  }
  return texts.get(name, "version of dimo_jax")
