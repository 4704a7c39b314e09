"""Sample-quality metrics on the host: numpy float64, no device and no network.

The feature-based metrics take features of any network; `dimo_jax.evaluation.protocols` says which
network, reference set and sample count make a number comparable.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.spatial import distance

from dimo_jax.types import Float, Int, UserError, choose

__all__ = [
  "FeatureStatistics",
  "Interval",
  "KernelDistance",
  "PrecisionRecall",
  "authenticity",
  "class_agreement",
  "frechet_distance",
  "frechet_interval",
  "kernel_distance",
  "nearest_distances",
  "num_distinct",
  "precision_recall",
  "token_entropy",
]

BLOCK_ROWS = 1024  # rows of a distance matrix held in memory at once
DIRECT_FEATURES = 256


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
  """The Gaussian that stands for a set of images in the Fréchet distance.

  Attributes:
    mean: [d] float64.
    covariance: [d, d] float64, divided by num - 1.
    num: how many images; the distance is biased upwards by about 1 / num.
  """

  mean: Float[np.ndarray, " d"]
  covariance: Float[np.ndarray, "d d"]
  num: int

  @classmethod
  def from_features(cls, features: Float[np.ndarray, "n d"]) -> "FeatureStatistics":
    """Mean and covariance of features [n, d], in float64.

    Raises:
      UserError: fewer than two rows.
    """
    num = len(features)
    if num < 2:
      raise UserError(f"features: {num} row(s); a covariance needs at least 2")
    features = np.asarray(features, np.float64)
    mean = features.mean(axis=0)
    centred = features - mean
    return cls(mean=mean, covariance=centred.T @ centred / (num - 1), num=num)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
  """Squared Wasserstein-2 distance of two Gaussians (FID when the features are Inception's).

  |m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)). The last trace is the sum of the singular
  values of A^(1/2) B^(1/2): real, symmetric in a and b, and stable for singular covariances, where
  a general matrix square root is not.

  Source: Heusel et al., arXiv:1706.08500, equation 6.

  Raises:
    UserError: the two have different numbers of features.
  """
  if a.mean.shape != b.mean.shape:
    raise UserError(
      f"features: {a.mean.size} against {b.mean.size}; the same network must make both"
    )
  roots = _square_root(a.covariance) @ _square_root(b.covariance)
  trace_root = np.linalg.svd(roots, compute_uv=False).sum()
  traces = np.trace(a.covariance) + np.trace(b.covariance)
  return max(float(np.sum((a.mean - b.mean) ** 2) + traces - 2 * trace_root), 0.0)


def _square_root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
  """The symmetric square root; eigenvalues that rounding made negative count as 0."""
  values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


class Interval(NamedTuple):
  """Ends of a confidence interval."""

  low: float
  high: float


def frechet_interval(
  reference: FeatureStatistics,
  generated: FeatureStatistics,
  features: Float[np.ndarray, "n d"],
  *,
  confidence: float = 0.95,
  num_resamples: int = 1000,
) -> Interval | None:
  """Bootstrap interval of the distance over the draw of the generated images, the reference fixed.

  The distance is linearised at `generated`: each image moves it by its influence, and resamples
  of images become means of influences. It says how far another draw of equally many images would
  fall; not how far the distance lies above that of infinitely many.

  Args:
    features: of all images behind `generated`, or of a random part of them.

  Returns:
    None where the covariance of the generated images is singular for want of images.
  """
  num, dim = len(features), generated.mean.size
  if generated.num <= dim or num < 2:
    return None
  root = _square_root(reference.covariance)
  values, vectors = np.linalg.eigh(root @ generated.covariance @ root)
  positive = values > values[-1] * 1e-12
  scaled = root @ vectors[:, positive] * values[positive] ** -0.25
  centred = np.asarray(features, np.float64) - generated.mean
  influences = 2 * centred @ (generated.mean - reference.mean)
  influences += (centred**2).sum(axis=1) - ((centred @ scaled) ** 2).sum(axis=1)
  random = np.random.default_rng(0)
  means = [influences[random.integers(0, num, num)].mean() for _ in range(num_resamples)]
  deviations = (np.array(means) - influences.mean()) * np.sqrt(num / generated.num)
  distance = frechet_distance(reference, generated)
  tail = (1 - confidence) / 2
  low, high = np.quantile(deviations, (tail, 1 - tail))
  return Interval(max(float(distance + low), 0.0), float(distance + high))


class PrecisionRecall(NamedTuple):
  """Fractions in [0, 1]; density has mean 1 for equal distributions and may exceed it."""

  precision: float  # generated images inside the real manifold
  recall: float  # real images inside the generated manifold
  density: float  # real balls around a generated image, divided by k
  coverage: float  # real images whose ball holds a generated one


# Whether a point at exactly the radius is inside; published code does either.
BALLS = {"open": np.less, "closed": np.less_equal}


def precision_recall(
  real_features: Float[np.ndarray, "n d"],
  fake_features: Float[np.ndarray, "m d"],
  k: int = 3,
  balls: str = "open",
) -> PrecisionRecall:
  """Improved precision and recall, density and coverage, over k-nearest-neighbour balls.

  The manifold of a set is the union of balls around its points, each reaching to the point's k-th
  nearest other point.

  Args:
    balls: "open", distance strictly smaller than the radius (arXiv:2002.09797's code), or "closed"
      (ADM's and torch-fidelity's).

  Source: arXiv:1904.06991 (precision, recall) and arXiv:2002.09797 (density, coverage).

  Raises:
    UserError: k is not between 1 and the smaller set's size minus 1, or no such balls.
  """
  within = choose(BALLS, balls, "balls")
  if not 1 <= k < min(len(real_features), len(fake_features)):
    raise UserError(
      f"k={k} must be at least 1 and smaller than both sets: {len(real_features)} real and"
      f" {len(fake_features)} generated"
    )
  real_radii, fake_radii = _radii(real_features, k), _radii(fake_features, k)
  inside, num_balls = 0, 0
  recalled = np.zeros(len(real_features), bool)
  nearest_fake = np.full(len(real_features), np.inf)
  for rows, distances in _distance_blocks(fake_features, real_features):
    in_real_ball = within(distances, real_radii)
    inside += int(in_real_ball.any(axis=1).sum())
    num_balls += int(in_real_ball.sum())
    recalled |= within(distances, fake_radii[rows, None]).any(axis=0)
    nearest_fake = np.minimum(nearest_fake, distances.min(axis=0))
  return PrecisionRecall(
    precision=inside / len(fake_features),
    recall=float(recalled.mean()),
    density=num_balls / (k * len(fake_features)),
    coverage=float(within(nearest_fake, real_radii).mean()),
  )


def _radii(features: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, " n"]:
  """Distance of every row to its k-th nearest other row (index 0 is the row itself)."""
  blocks = _distance_blocks(features, features)
  return np.concatenate([np.partition(distances, k, axis=1)[:, k] for _, distances in blocks])


def _distance_blocks(
  a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> Iterator[tuple[slice, Float[np.ndarray, "r m"]]]:
  """Euclidean distances of all rows of a to all of b, some rows of a at a time.

  Up to `DIRECT_FEATURES` differences are taken before squaring, so equal rows are exactly 0 apart;
  with more a matrix product does it, a hundred times as fast and good to about 1e-7 of the norms.
  """
  direct = a.shape[1] <= DIRECT_FEATURES
  b = b if direct else np.asarray(b, np.float64)
  squares = None if direct else np.einsum("md,md->m", b, b)
  for start in range(0, len(a), BLOCK_ROWS):
    rows = slice(start, start + BLOCK_ROWS)
    if direct:
      yield rows, distance.cdist(a[rows], b)
      continue
    block = np.asarray(a[rows], np.float64)
    products = np.einsum("nd,nd->n", block, block)[:, None] + squares - 2 * (block @ b.T)
    yield rows, np.sqrt(np.maximum(products, 0))


def nearest_distances(
  samples: Float[np.ndarray, "n ..."], references: Float[np.ndarray, "m ..."]
) -> Float[np.ndarray, " n"]:
  """Euclidean distance from each sample to its nearest reference, in the units of the pixels.

  0 is an exact copy: a generator that memorises has many of them.
  """
  samples = samples.reshape(len(samples), -1)
  references = references.reshape(len(references), -1)
  nearest = []
  for rows, distances in _distance_blocks(samples, references):
    differences = samples[rows] - references[distances.argmin(axis=1)]
    nearest.append(np.linalg.norm(np.asarray(differences, np.float64), axis=1))
  return np.concatenate(nearest)


def authenticity(
  train_features: Float[np.ndarray, "n d"], fake_features: Float[np.ndarray, "m d"]
) -> float:
  """Fraction of generated images that are not nearer to a training image than others of its kind.

  A generated image counts as a copy where it lies nearer to its nearest training image than that
  one's own nearest neighbour in the training set does; of new samples of the same distribution
  about half count so. 0 is a training set repeated.

  Source: arXiv:2102.08921, section 4.

  Raises:
    UserError: fewer than two training images.
  """
  if len(train_features) < 2:
    raise UserError(f"features: {len(train_features)} training image(s); it takes at least 2")
  radii = _radii(train_features, 1)
  authentic = 0
  for _, distances in _distance_blocks(fake_features, train_features):
    nearest = distances.argmin(axis=1)
    authentic += int((distances.min(axis=1) > radii[nearest]).sum())
  return authentic / len(fake_features)


class KernelDistance(NamedTuple):
  """Mean and standard deviation of the squared kernel distance over random subsets."""

  mean: float
  std: float


def kernel_distance(
  features_a: Float[np.ndarray, "n d"],
  features_b: Float[np.ndarray, "m d"],
  *,
  num_subsets: int = 100,
  subset_size: int = 1000,
  seed: int = 2020,
) -> KernelDistance:
  """The kernel inception distance: unbiased squared MMD under the kernel (x.y / d + 1)^3.

  Each subset takes `subset_size` rows of both without replacement, first of a, then of b, from one
  `RandomState(seed)`: the draws and the default seed are torch-fidelity's.

  Source: arXiv:1801.01401.

  Raises:
    UserError: subsets of fewer than two rows or more than a set has.
  """
  smaller = min(len(features_a), len(features_b))
  if not 2 <= subset_size <= smaller:
    raise UserError(f"subset_size={subset_size} must lie in 2 .. {smaller}, the smaller set's size")
  random = np.random.RandomState(seed)
  values = []
  for _ in range(num_subsets):
    a = features_a[random.choice(len(features_a), subset_size, replace=False)]
    b = features_b[random.choice(len(features_b), subset_size, replace=False)]
    values.append(_squared_mmd(np.asarray(a, np.float64), np.asarray(b, np.float64)))
  return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _squared_mmd(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"]) -> float:
  """The unbiased estimate from equally many rows."""
  n, d = a.shape
  within = 0.0
  for x in (a, b):
    kernel = (x @ x.T / d + 1) ** 3
    within += (kernel.sum() - np.trace(kernel)) / (n * (n - 1))
  return float(within - 2 * ((a @ b.T / d + 1) ** 3).mean())


def class_agreement(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> float:
  """Fraction of images that the classifier puts into the class they were asked for."""
  return float((np.argmax(logits, axis=-1) == labels).mean())


def token_entropy(tokens: Int[np.ndarray, "n l"], codebook_size: int) -> float:
  """Diversity of token maps: the mean over positions of the entropy at that position, in nats.

  The entropy is that of the empirical distribution over the n images: 0 when all agree, at most
  log(min(n, codebook_size)).

  Raises:
    UserError: a token outside [0, codebook_size).
  """
  if tokens.min() < 0 or tokens.max() >= codebook_size:
    raise UserError(
      f"tokens span {tokens.min()} to {tokens.max()}; must be in [0, codebook_size={codebook_size})"
    )
  entropies = []
  for position in tokens.T:
    counts = np.bincount(position, minlength=codebook_size)
    p = counts[counts > 0] / len(position)
    entropies.append(-np.sum(p * np.log(p)))
  return float(np.mean(entropies))


def num_distinct(samples: np.ndarray) -> int:
  """How many different rows samples [n, ...] has (token maps or rounded images)."""
  return len(np.unique(samples.reshape(len(samples), -1), axis=0))
