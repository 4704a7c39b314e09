import dataclasses
import itertools
import multiprocessing
import threading

import numpy as np
import pytest
from scipy import stats

from dimo_jax.data.pipeline import condition_batches, image_batches
from dimo_jax.data.sources import ArraySource


def numbered(n):
  """A source whose image i holds the number i, of class i % 3."""
  ids = np.arange(n)
  levels = np.stack([ids // 256, ids % 256], -1).astype(np.uint8).reshape(n, 1, 1, 2)
  return ArraySource(levels, (ids % 3).astype(np.int32), num_classes=3, num_levels=256)


def ids_of(batch):
  levels = np.round((batch["image"][:, 0, 0] + 1) * 127.5).astype(int)
  return levels[:, 0] * 256 + levels[:, 1]


def image_ids(start_step, num_steps, n=50, batch_size=8, seed=3):
  batches = image_batches(
    numbered(n), batch_size=batch_size, seed=seed, start_step=start_step, num_steps=num_steps
  )
  return [ids_of(batch).tolist() for batch in batches]


def class_ids(start_step, num_steps, num_classes=10, shape=(4, 8), seed=3):
  batches = condition_batches(
    num_classes, shape=shape, seed=seed, start_step=start_step, num_steps=num_steps
  )
  return [batch["class_id"].tolist() for batch in batches]


@pytest.mark.parametrize("ids", [image_ids, class_ids])
def test_starting_at_a_step_equals_skipping_to_it(ids):
  whole = ids(0, 30)
  assert len(whole) == 30
  for start, count in [(0, 3), (1, 1), (7, 20), (29, 1), (30, 0)]:  # across the end of epochs
    assert ids(start, count) == whole[start : start + count]
  assert ids(10**6, 2)[1] == ids(10**6 + 1, 1)[0]


@pytest.mark.parametrize("ids", [image_ids, class_ids])
def test_another_process_sees_the_same(ids):
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    assert pool.apply(ids, (5, 3)) == ids(5, 3)


def test_seeds_share_nothing():
  epochs = [
    tuple(epoch) for seed in range(5) for epoch in image_ids(0, 5, batch_size=50, seed=seed)
  ]
  assert len(set(epochs)) == 25
  conditions = [str(ids) for seed in range(5) for ids in class_ids(0, 5, seed=seed)]
  assert len(set(conditions)) == 25


def test_image_batches_shapes_and_pairs():
  (batch,) = image_batches(numbered(50), batch_size=8, seed=0, start_step=0, num_steps=1)
  assert set(batch) == {"image", "class_id"}
  assert batch["image"].shape == (8, 1, 1, 2)
  assert batch["image"].dtype == np.float32
  assert batch["class_id"].dtype == np.int32
  assert (ids_of(batch) % 3).tolist() == batch["class_id"].tolist()  # image and class stay paired


@pytest.mark.parametrize("batch_size", [1, 8, 10, 64])
def test_every_sample_once_per_epoch_in_a_new_order(batch_size):
  flat = list(itertools.chain(*image_ids(0, 320 // batch_size + 1, batch_size=batch_size)))
  epochs = [flat[50 * e : 50 * (e + 1)] for e in range(6)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(50))
  assert len({tuple(epoch) for epoch in epochs}) == 6


def test_shuffle_is_uniform():
  """Over epochs each sample comes equally often among the first eighth of an epoch."""
  flat = np.concatenate(image_ids(0, 80, n=256, batch_size=256))
  first = flat.reshape(80, 256)[:, :32]
  assert stats.chisquare(np.bincount(first.ravel(), minlength=256)).pvalue > 1e-3


def test_conditions_are_uniform_and_independent():
  ids = np.array(class_ids(0, 500, num_classes=7, shape=(2, 32)))
  assert (ids.min(), ids.max()) == (0, 6)
  assert stats.chisquare(np.bincount(ids.ravel())).pvalue > 1e-3
  pairs = {
    "neighbours": ids[:, :, 1:] + 7 * ids[:, :, :-1],
    "steps": ids[1:] + 7 * ids[:-1],
    "rows": ids[:, 1] + 7 * ids[:, 0],
  }
  for name, pair in pairs.items():
    counts = np.bincount(pair.ravel(), minlength=49)
    assert stats.chisquare(counts).pvalue > 1e-3, name


def test_condition_shapes():
  (batch,) = condition_batches(5, shape=(3, 2, 4), seed=0, start_step=9, num_steps=1)
  assert batch["class_id"].shape == (3, 2, 4)
  assert batch["class_id"].dtype == np.int32


@dataclasses.dataclass(frozen=True, eq=False)
class Meeting(ArraySource):
  """A source whose every image waits until several threads ask for one."""

  barrier: threading.Barrier

  def __getitem__(self, index):
    self.barrier.wait(timeout=10)
    return super().__getitem__(index)


def test_threads_read_at_once_and_keep_the_order():
  options = {"batch_size": 8, "seed": 3, "start_step": 2, "num_steps": 8}
  wanted = [ids_of(batch).tolist() for batch in image_batches(numbered(50), **options)]
  source = numbered(50)
  fields = (source.levels, source.labels, source.num_classes, source.num_levels)
  several = image_batches(Meeting(*fields, threading.Barrier(4)), num_threads=4, **options)
  assert [ids_of(batch).tolist() for batch in several] == wanted


def test_flips_are_random_half_and_the_same_after_a_resume():
  levels = np.zeros((256, 1, 2, 1), np.uint8)
  levels[:, :, 1] = 255
  source = ArraySource(levels, np.zeros(256, np.int32), 1, 256)
  options = {"batch_size": 64, "seed": 0, "flip": True}
  batches = list(image_batches(source, start_step=0, num_steps=8, **options))
  flipped = [batch["image"][:, 0, 0, 0] > 0 for batch in batches]
  assert 0.4 < np.mean(flipped) < 0.6
  (resumed,) = image_batches(source, start_step=5, num_steps=1, **options)
  np.testing.assert_array_equal(resumed["image"], batches[5]["image"])
  (plain,) = image_batches(source, start_step=5, num_steps=1, batch_size=64, seed=0)
  assert (plain["image"][:, 0, 0, 0] < 0).all()
