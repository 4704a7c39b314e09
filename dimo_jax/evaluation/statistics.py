"""Sums over any number of images, in float64 and constant memory: what distances are made of.

Rows are summed in blocks counted from the first image, so the same features in the same order give
the same bits whatever the batches they came in; merged parts agree to rounding.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from scipy.special import log_softmax

from dimo_jax.evaluation.metrics import FeatureStatistics
from dimo_jax.types import Float, Int, UserError

__all__ = ["RunningScore", "RunningStatistics", "class_statistics"]

BLOCK_ROWS = 256


class RunningStatistics:
  """Count, sum and sum of outer products of feature rows [d]."""

  def __init__(self, num_features: int):
    self._num = 0
    self._sum = np.zeros(num_features)
    self._outer = np.zeros((num_features, num_features))
    self._pending = np.zeros((0, num_features))  # fewer than BLOCK_ROWS

  @property
  def num(self) -> int:
    """Rows so far."""
    return self._num + len(self._pending)

  def add(self, features: Float[np.ndarray, "n d"]) -> None:
    """Adds rows behind those before."""
    rows = np.concatenate([self._pending, np.asarray(features, np.float64)])
    whole = len(rows) // BLOCK_ROWS * BLOCK_ROWS
    for block in _blocks(rows[:whole]):
      self._sum += block.sum(axis=0)
      self._outer += block.T @ block
    self._num += whole
    self._pending = rows[whole:].copy()

  def merge(self, other: "RunningStatistics") -> "RunningStatistics":
    """The statistics of both sets of rows."""
    merged = RunningStatistics(len(self._sum))
    for part in (self, other):
      num, total, outer = part._totals()
      merged._num += num
      merged._sum += total
      merged._outer += outer
    return merged

  def result(self) -> FeatureStatistics:
    """Mean and covariance (divided by num - 1).

    Raises:
      UserError: fewer than two rows.
    """
    num, total, outer = self._totals()
    if num < 2:
      raise UserError(f"features: {num} row(s); a covariance needs at least 2")
    mean = total / num
    covariance = (outer - num * np.outer(mean, mean)) / (num - 1)
    return FeatureStatistics(mean, covariance, num)

  def state(self) -> dict[str, np.ndarray]:
    """Arrays from which `restored` goes on."""
    return {
      "num": np.asarray(self._num),
      "sum": self._sum,
      "outer": self._outer,
      "pending": self._pending,
    }

  @classmethod
  def restored(cls, state: Mapping[str, np.ndarray]) -> "RunningStatistics":
    """The statistics whose `state` this was."""
    statistics = cls(len(state["sum"]))
    statistics._num = int(state["num"])
    statistics._sum, statistics._outer = state["sum"].copy(), state["outer"].copy()
    statistics._pending = state["pending"].copy()
    return statistics

  def _totals(self) -> tuple[int, Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    rest = self._pending
    return self.num, self._sum + rest.sum(axis=0), self._outer + rest.T @ rest


def _blocks(rows: Float[np.ndarray, "n d"]) -> Iterator[Float[np.ndarray, "r d"]]:
  for start in range(0, len(rows), BLOCK_ROWS):
    yield rows[start : start + BLOCK_ROWS]


class RunningScore:
  """The Inception Score's sums, for each of its splits.

  Split i of `num_images` takes the i-th of `num_splits` equal runs of the images, in their order
  or in that of `RandomState(shuffle_seed).permutation`.

  Source: arXiv:1606.03498; the splits are those of torch-fidelity, without shuffling those of ADM.
  """

  def __init__(self, num_images: int, num_splits: int, shuffle_seed: int | None, num_logits: int):
    if not 1 <= num_splits <= num_images:
      raise UserError(f"splits={num_splits} must lie in 1 .. {num_images}, the number of images")
    order = np.arange(num_images)
    if shuffle_seed is not None:
      order = np.random.RandomState(shuffle_seed).permutation(num_images)
    self._split = np.empty(num_images, np.int64)
    for i in range(num_splits):
      run = slice(i * num_images // num_splits, (i + 1) * num_images // num_splits)
      self._split[order[run]] = i
    self.num = 0
    self._sum = np.zeros((num_splits, num_logits))  # of probabilities
    self._negentropy = np.zeros(num_splits)  # of p log p

  def add(self, logits: Float[np.ndarray, "n k"]) -> None:
    """Adds rows behind those before."""
    logarithms = log_softmax(np.asarray(logits, np.float64), axis=1)
    probabilities = np.exp(logarithms)
    splits = self._split[self.num : self.num + len(logits)]
    np.add.at(self._sum, splits, probabilities)
    np.add.at(self._negentropy, splits, (probabilities * logarithms).sum(axis=1))
    self.num += len(logits)

  def result(self) -> tuple[float, float]:
    """Mean and standard deviation over the splits.

    Raises:
      UserError: not all images are there.
    """
    if self.num != len(self._split):
      raise UserError(f"{self.num} of {len(self._split)} images are there; the score needs all")
    counts = np.bincount(self._split, minlength=len(self._sum))
    marginal = self._sum / counts[:, None]
    terms = np.where(marginal > 0, marginal * np.log(np.maximum(marginal, 1e-300)), 0)
    scores = np.exp(self._negentropy / counts - terms.sum(axis=1))
    return float(scores.mean()), float(scores.std())

  def state(self) -> dict[str, np.ndarray]:
    """Arrays that `restore` takes."""
    return {"num": np.asarray(self.num), "sum": self._sum, "negentropy": self._negentropy}

  def restore(self, state: Mapping[str, np.ndarray]) -> None:
    """Goes on from a `state` of a score with the same splits."""
    self.num = int(state["num"])
    self._sum, self._negentropy = state["sum"].copy(), state["negentropy"].copy()


def class_statistics(
  features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]
) -> dict[int, FeatureStatistics]:
  """Statistics of each class that has at least two images."""
  classes, counts = np.unique(labels, return_counts=True)
  return {
    int(c): FeatureStatistics.from_features(features[labels == c])
    for c, n in zip(classes, counts, strict=True)
    if n >= 2
  }
