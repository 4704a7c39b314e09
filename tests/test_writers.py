"""metrics.jsonl and TensorBoard: one row a step, whatever was interrupted."""

import json

import mlflow
import numpy as np
import pytest
import wandb
from tensorboardX.proto import event_pb2

from dimo_jax.trackers import Stage, check_trackers, open_trackers
from dimo_jax.types import UserError
from dimo_jax.writers import Writer, clock, read_metrics, write_atomically


def open_writer(directory, start, names=()):
  stage = Stage(directory, "distill", start, {"seed": 3, "objective": "dimo"})
  return Writer(directory, "distill", start, 100, open_trackers(stage, names))


def write(directory, start, steps, value=1.0):
  writer = open_writer(directory, start)
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
  write(tmp_path, 0, [25, 50])
  first, line = capsys.readouterr().out.splitlines()
  assert "ETA -  " in first  # most of that time was compilation
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
  writer = open_writer(tmp_path, 2)
  writer.picture(3, "samples", np.zeros((4, 5, 3), np.uint8))
  writer.close()
  found = events(tmp_path)
  losses = [e.step for e in found if any(v.tag == "generator/loss" for v in e.summary.value)]
  assert losses == [1, 2, 3]
  restarts = [e.step for e in found if e.session_log.status == event_pb2.SessionLog.START]
  assert restarts[-1] == 3
  assert any(value.image.width == 5 for e in found for value in e.summary.value)


def test_mlflow_gets_the_run_once_and_goes_on_in_it(tmp_path, monkeypatch):
  monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
  monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "digits")
  stage = tmp_path / "run" / "distill"
  for start in (0, 2):
    writer = open_writer(stage, start, ("mlflow",))
    for step in (start + 1, start + 2):
      writer.metrics(step, {"generator/loss": float(step)})
    writer.picture(start + 2, "samples", np.zeros((4, 5, 3), np.uint8))
    writer.close()
  client = mlflow.MlflowClient()
  (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
  assert run.info.run_name == "run/distill" and run.info.status == "FINISHED"
  assert run.data.params == {"seed": "3", "objective": "dimo"}
  history = client.get_metric_history(run.info.run_id, "generator/loss")
  assert [(point.step, point.value) for point in history] == [(i, i) for i in (1, 2, 3, 4)]
  files = [file.path for file in client.list_artifacts(run.info.run_id, "samples")]
  assert files == ["samples/step_0000002.png", "samples/step_0000004.png"]


def test_weights_and_biases_gets_the_run_and_goes_on_in_it(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  seen, init = [], wandb.init

  def recorded(**arguments):
    run = init(**arguments)
    seen.append((arguments, run))
    return run

  monkeypatch.setattr(wandb, "init", recorded)
  stage = tmp_path / "run" / "distill"
  for start in (0, 2):
    writer = open_writer(stage, start, ("wandb",))
    writer.metrics(start + 1, {"generator/loss": 7.0})
    writer.picture(start + 1, "samples", np.zeros((4, 5, 3), np.uint8))
    assert seen[-1][1].summary["generator/loss"] == 7.0
    assert seen[-1][1].summary["step"] == start + 1
    writer.close()
  (first, run), (second, again) = seen
  assert first["id"] is None and second["id"] == run.id == again.id
  assert first["name"] == "run/distill" and first["config"] == {"seed": 3, "objective": "dimo"}
  assert len(list(stage.glob("wandb/offline-run-*"))) == 2
  assert len(list(stage.glob("wandb/**/*.png"))) == 2


def test_a_tracker_that_fails_does_not_end_the_training(tmp_path, capsys):
  class Failing:
    def metrics(self, step, values):
      raise ConnectionError("gone")

    def picture(self, step, name, image):
      raise AssertionError("was left out")

    def close(self):
      raise AssertionError("was left out")

  writer = Writer(tmp_path, "distill", 0, 100, [Failing()])
  for step in (1, 2):
    writer.metrics(step, {"generator/loss": 1.0})
  writer.close()
  assert capsys.readouterr().out.count("Failing gets nothing more: ConnectionError('gone')") == 1
  assert rows(tmp_path) == [(1, 1), (2, 1)]


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
  with pytest.raises(UserError, match=r"log\.trackers='aim' is unknown"):
    check_trackers(("aim",))
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError, match="wandb is missing: pip install wandb"):
    check_trackers(("wandb",))


def test_a_service_that_does_not_open_is_refused_in_one_line(tmp_path, monkeypatch):

  def init(**arguments):
    raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

  monkeypatch.setattr(wandb, "init", init)
  with pytest.raises(UserError, match="wandb does not open: No API key configured") as error:
    open_trackers(Stage(tmp_path, "distill", 0, {}), ("wandb",))
  assert "\n" not in str(error.value)


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
