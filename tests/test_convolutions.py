"""The comparison of convolutions: both sides make the same calls, medians leave the first out."""

import sys
import time

import jax
import pytest

from benchmarks import convolutions


def test_both_sides_make_the_same_calls():
  pytest.importorskip("torch")
  ours, theirs = convolutions.in_jax(4, 3, 5), convolutions.in_torch(4, 3, 5)
  shapes = {"forward": (8, 4, 4, 5), "image": (8, 4, 4, 3), "kernel": (3, 3, 3, 5)}
  assert ours.keys() == theirs.keys() == shapes.keys()
  for name, shape in shapes.items():
    (made,) = jax.tree.leaves(ours[name]())
    assert made.shape == shape
    (made,) = jax.tree.leaves(theirs[name]())  # None is no leaf
    order = (2, 3, 1, 0) if name == "kernel" else (0, 2, 3, 1)
    assert tuple(made.permute(order).shape) == shape


def test_a_median_leaves_the_first_calls_out(monkeypatch):
  seconds = iter([9.0, 9.0, 0.3, 0.1, 0.2])
  clock = [0.0]
  monkeypatch.setattr(time, "sleep", lambda s: None)
  monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

  def call():
    clock[0] += next(seconds)

  assert convolutions.median(call, 3) == pytest.approx(0.2)
  assert next(seconds, None) is None


def test_the_table_has_a_row_for_each_pass(monkeypatch, capsys):
  pytest.importorskip("torch")
  monkeypatch.setattr(sys, "argv", ["convolutions.py", "--repeats=1"])
  monkeypatch.setattr(convolutions, "_SIZES", ((4, 3, 5),))
  monkeypatch.setattr(convolutions, "median", lambda call, num: 1e-6 * num)
  convolutions.main()
  gflop = 2e-9 * 8 * 16 * 9 * 3 * 5
  rows = [line for line in capsys.readouterr().out.splitlines() if "4x4, 3 to 5" in line]
  assert [row.split(" | ")[1:] for row in rows] == [
    [name, f"{gflop / 1e-6:.0f}", f"{gflop / 1e-6:.0f} |"]
    for name in ("forward", "image", "kernel")
  ]
  monkeypatch.setattr(sys, "argv", ["convolutions.py", "--repeats=0"])
  with pytest.raises(SystemExit, match="2"):
    convolutions.main()
  assert "--repeats=0 must be 1 or more" in capsys.readouterr().err
