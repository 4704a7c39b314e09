"""Statistics files (`.npz`), published and our own: read without unpickling, written atomically.

Both published key styles are read: `mu, sigma` (TTUR, pytorch-fid, EDM), and with them
`mu_s, sigma_s` and images `arr_0` (ADM). Ours add `num`, kept `features` and `settings`.
"""

import dataclasses
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dimo_jax.evaluation.inception import TAPS
from dimo_jax.evaluation.metrics import FeatureStatistics
from dimo_jax.types import Float, UserError

__all__ = ["ReferenceFile", "file_sha256", "read_arrays", "read_reference", "write_arrays"]

SETTINGS_KEY = "settings"


@dataclasses.dataclass(frozen=True)
class ReferenceFile:
  """What generated images are compared with.

  Attributes:
    path: of the file.
    sha256: of the file.
    pool: statistics of the 2048 features; `num` is 0 where the file does not say.
    spatial: of the spatial features, where there are any.
    features: kept rows of the 2048 features; None in published files.
    has_images: whether there are images under `arr_0`, from which features can be made.
    settings: how a file of ours was made (`image_size`, `resize`, `inception_sha256`, ...); empty
      for others.
  """

  path: Path
  sha256: str
  pool: FeatureStatistics
  spatial: FeatureStatistics | None
  features: Float[np.ndarray, "k d"] | None
  has_images: bool
  settings: Mapping[str, Any]

  def check(self, **wanted_settings: Any) -> None:
    """Raises UserError where a file of ours was made with other settings than these."""
    for name, wanted in wanted_settings.items():
      if self.settings.get(name, wanted) != wanted:
        raise UserError(
          f"statistics={str(self.path)!r} were made with {name}={self.settings[name]!r}; this"
          f" evaluation has {wanted!r}"
        )


def file_sha256(path: str | os.PathLike) -> str:
  """Of a file's bytes."""
  with open(path, "rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def read_arrays(path: str | os.PathLike, what: str) -> np.lib.npyio.NpzFile:
  """An opened `.npz`; arrays are read when asked for and objects never unpickled.

  Raises:
    UserError: no such file, or no `.npz`.
  """
  if not os.path.exists(path):
    raise UserError(f"{what}={str(path)!r} does not exist")
  if not zipfile.is_zipfile(path):
    raise UserError(f"{what}={str(path)!r} is not a readable .npz file")
  file = np.load(path, allow_pickle=False)
  assert isinstance(file, np.lib.npyio.NpzFile)
  return file


def read_reference(path: str | os.PathLike) -> ReferenceFile:
  """Reads a statistics file.

  Raises:
    UserError: no `.npz` of statistics, a damaged one, or one of another network.
  """
  path = Path(path)
  field = f"statistics={str(path)!r}"
  with read_arrays(path, "statistics") as file:
    if not {"mu", "sigma"} <= set(file.files):
      raise UserError(f"{field} holds {', '.join(file.files) or 'nothing'}; needs mu and sigma")
    try:
      num = int(file["num"]) if "num" in file.files else 0
      pool = _statistics(field, file["mu"], file["sigma"], TAPS["2048"], num)
      spatial = None
      if {"mu_s", "sigma_s"} <= set(file.files):
        spatial = _statistics(field, file["mu_s"], file["sigma_s"], TAPS["spatial"], num)
      features = file["features"] if "features" in file.files else None
      settings = json.loads(str(file[SETTINGS_KEY])) if SETTINGS_KEY in file.files else {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
      raise UserError(f"{field} is damaged: {str(error).splitlines()[0]}") from error
    has_images = "arr_0" in file.files
  return ReferenceFile(path, file_sha256(path), pool, spatial, features, has_images, settings)


def _statistics(
  field: str, mean: np.ndarray, covariance: np.ndarray, num_features: int, num: int
) -> FeatureStatistics:
  if mean.shape != (num_features,) or covariance.shape != (num_features, num_features):
    raise UserError(
      f"{field} has means {mean.shape} and covariances {covariance.shape}; this network's are"
      f" ({num_features},) and ({num_features}, {num_features})"
    )
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    raise UserError(f"{field} holds NaN or infinite numbers")
  return FeatureStatistics(mean.astype(np.float64), covariance.astype(np.float64), num)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Replaces an `.npz` whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)  # type: ignore[arg-type]
  temporary = path.with_name(path.name + ".tmp")
  with open(temporary, "wb") as stream:
    stream.write(buffer.getbuffer())
    stream.flush()
    os.fsync(stream.fileno())
  os.replace(temporary, path)
