"""From sums of features to a result: one row with every number and all that makes it comparable."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dimo_jax.distributed import from_first
from dimo_jax.evaluation import metrics
from dimo_jax.evaluation.extraction import FeatureSums
from dimo_jax.evaluation.inception import Inception
from dimo_jax.evaluation.published import PublishedProtocol
from dimo_jax.evaluation.references import ReferenceFile
from dimo_jax.evaluation.report import versions
from dimo_jax.types import Float, UserError
from dimo_jax.writers import say, write_atomically

__all__ = ["append_row", "find_row", "read_rows", "result_row", "say_row", "score", "title_of"]

# What a console line says of a row, where it has it.
_SAID = (
  ("frechet_distance", "Fréchet distance"),
  ("fid", "FID"),
  ("sfid", "sFID"),
  ("inception_score", "IS"),
  ("kid", "KID"),
  ("class_agreement", "class agreement"),
  ("precision", "precision"),
  ("recall", "recall"),
)
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000


def score(
  protocol: PublishedProtocol,
  reference: ReferenceFile,
  reference_features: Float[np.ndarray, "k d"] | None,
  sums: FeatureSums,
) -> dict[str, float | None]:
  """All metrics of a set of images; None where the reference lacks what one needs.

  Args:
    reference_features: rows of 2048 features of real images.

  Returns:
    fid; fid_low and fid_high (its 95 % interval over the draw of the images); sfid;
    inception_score and its standard deviation over the splits; kid (mean over random subsets of
    the squared kernel distance) and its deviation; precision, recall, density,
    coverage; authenticity (of the kept images against the reference's).
  """
  mean, std = sums.score.result()
  pool = sums.pool.result()
  interval = metrics.frechet_interval(reference.pool, pool, sums.features)
  row: dict[str, float | None] = {
    "fid": metrics.frechet_distance(reference.pool, pool),
    "fid_low": interval.low if interval else None,
    "fid_high": interval.high if interval else None,
    "sfid": None,
    "inception_score": mean,
    "inception_score_std": std,
  }
  if reference.spatial is not None and sums.spatial is not None:
    row["sfid"] = metrics.frechet_distance(reference.spatial, sums.spatial.result())
  names = ("kid", "kid_std", "precision", "recall", "density", "coverage", "authenticity")
  if reference_features is None:
    return row | dict.fromkeys(names)
  size = min(KERNEL_SUBSET_SIZE, len(reference_features), len(sums.features))
  kernel = metrics.kernel_distance(
    reference_features, sums.features, num_subsets=KERNEL_SUBSETS, subset_size=size
  )
  neighbors = metrics.precision_recall(
    reference_features, sums.features, protocol.num_neighbors, protocol.balls
  )
  authentic = metrics.authenticity(reference_features, sums.features)
  return row | dict(zip(names, (*kernel, *neighbors, authentic), strict=True))


def result_row(
  protocol: PublishedProtocol,
  reference: ReferenceFile,
  inception: Inception,
  numbers: Mapping[str, Any],
  source: Mapping[str, Any],
) -> dict[str, Any]:
  """The numbers with their protocol, hashes, source, versions and device.

  Args:
    source: what the images are: `images`, or `checkpoint`, `step`, `sampler`, `seed`, ...
  """
  unverified = []
  if not protocol.verified:
    unverified.append("statistics")
  if not inception.published:
    unverified.append("inception")
  return {
    "protocol": protocol.name,
    "unverified": unverified,
    "departures": protocol.departures(),
    **numbers,
    "num_images": protocol.num_images,
    "num_reference_images": reference.pool.num or None,
    "rounding": protocol.rounding,
    "resize": protocol.resize,
    "statistics": str(reference.path),
    "statistics_sha256": reference.sha256,
    "inception_sha256": inception.sha256,
    **source,
    "versions": versions(),
  }


def append_row(path: Path, row: Mapping[str, Any]) -> None:
  """Adds one JSON line to a file of results; a kill leaves the file before or after."""
  path.parent.mkdir(parents=True, exist_ok=True)
  before = path.read_text(encoding="utf-8") if path.exists() else ""
  write_atomically(path, before + json.dumps(dict(row)) + "\n")


def say_row(name: str, row: Mapping[str, Any], path: Path) -> None:
  """A console line: the numbers of a row of the file `path`, and what of them is unverified."""
  numbers = ", ".join(f"{title} {row[key]:.4g}" for key, title in _SAID if row.get(key) is not None)
  unverified = row.get("unverified")
  doubts = [f"with {key}={value}" for key, value in row.get("departures", {}).items()]
  doubts += [f"unverified: {', '.join(unverified)}"] if unverified else []
  doubt = f" ({'; '.join(doubts)})" if doubts else ""
  say(f"{title_of(name, row)}: {row['protocol']}{doubt}: {numbers}; row in {path}")


def title_of(name: str, row: Mapping[str, Any]) -> str:
  """A generator's name, and which of its checkpoints and settings a row is of."""
  step, swept = row.get("step"), row.get("sweep")
  of = f", step {step}" if step is not None else ""
  return name + of + (f", {swept['field']}={swept['value']:g}" if swept else "")


def read_rows(path: Path) -> list[dict[str, Any]]:
  """The rows of a file of results.

  Raises:
    UserError: no such file, or a line that is no JSON object.
  """
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"results={str(path)!r} cannot be read: {error}") from error
  rows = []
  for i, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError as error:
      raise UserError(f"{path}, line {i}, is no JSON") from error
    if not isinstance(row, dict) or "protocol" not in row:
      raise UserError(f"{path}, line {i}, is no result of `evaluate`")
    rows.append(row)
  return rows


def find_row(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
  """The last row of a file of results that has all of `wanted`, if there is one."""
  wanted = json.loads(json.dumps(dict(wanted)))  # as it is read back
  rows = from_first(read_rows(path) if path.exists() else [])
  found = (row for row in reversed(rows) if all(row.get(k) == v for k, v in wanted.items()))
  return next(found, None)


def too_few(protocol: PublishedProtocol, num: int, what: str) -> None:
  """Raises UserError where a set has fewer images than a protocol takes."""
  if num < protocol.num_images:
    raise UserError(
      f"{what} has {num} images, protocol={protocol.name!r} takes {protocol.num_images}:"
      " --num_images=N takes the first N, and the result says so"
    )
