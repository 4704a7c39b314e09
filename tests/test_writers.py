"""metrics.jsonl and TensorBoard: one row a step, whatever was interrupted."""

import json

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from dimo_jax.writers import Writer, clock, read_metrics, write_atomically


def write(directory, start, steps, value=1.0):
  writer = Writer(directory, "distill", start, 100)
  for step in steps:
    writer.metrics(step, {"generator/loss": value * float(step), "generator/grad_norm": 2.0})
  writer.close()


def rows(directory):
  return [(row["step"], row["generator/loss"]) for row in read_metrics(directory)]


def test_rows_beyond_the_restored_step_are_dropped(tmp_path):
  write(tmp_path, 0, range(1, 8))
  write(tmp_path, 4, range(5, 7), value=10.0)
  assert rows(tmp_path) == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60)]


def test_a_line_cut_short_is_dropped(tmp_path):
  write(tmp_path, 0, range(1, 4))
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text()[:-20])
  assert rows(tmp_path) == [(1, 1), (2, 2)]
  write(tmp_path, 2, [3])
  assert rows(tmp_path) == [(1, 1), (2, 2), (3, 3)]
  assert all(json.loads(line) for line in path.read_text().splitlines())


def test_the_console_line_has_step_rate_time_left_and_losses(tmp_path, capsys):
  write(tmp_path, 0, [50])
  line = capsys.readouterr().out
  for part in ("distill 50/100", " it/s", "ETA 0:00", "generator/loss 50"):
    assert part in line
  assert "grad_norm" not in line


def events(directory):
  """Events of all TensorBoard files, in order of creation."""
  found = []
  for path in sorted(directory.glob("tensorboard/*"), key=lambda p: p.stat().st_mtime_ns):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], "little")
      found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return found


def test_tensorboard_purges_what_comes_after_the_restored_step(tmp_path):
  write(tmp_path, 0, range(1, 4))
  writer = Writer(tmp_path, "distill", 2, 100)
  writer.picture(3, "samples", np.zeros((4, 5, 3), np.uint8))
  writer.close()
  found = events(tmp_path)
  losses = [e.step for e in found if any(v.tag == "generator/loss" for v in e.summary.value)]
  assert losses == [1, 2, 3]
  restarts = [e.step for e in found if e.session_log.status == event_pb2.SessionLog.START]
  assert restarts[-1] == 3
  assert any(value.image.width == 5 for e in found for value in e.summary.value)


def test_text_is_replaced_whole(tmp_path):
  path = tmp_path / "record.json"
  write_atomically(path, "one")
  write_atomically(path, "two")
  assert path.read_text() == "two"
  assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
  ("seconds", "text"), [(0.0, "0:00"), (59.6, "1:00"), (61.0, "1:01"), (3723.0, "1:02:03")]
)
def test_clock(seconds, text):
  assert clock(seconds) == text
