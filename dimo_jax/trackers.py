"""Where a stage's metrics and pictures go besides metrics.jsonl: TensorBoard, and what is wanted.

Weights & Biases and MLflow read projects, addresses and keys from their own environment variables
(`WANDB_PROJECT`, `WANDB_MODE`, `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, ...); a config only
names trackers. A resumed stage goes on in the same run; steps that were done twice are there twice.
"""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from dimo_jax.distributed import on_first
from dimo_jax.types import UInt8, UserError, choose
from dimo_jax.writers import Tracker, write_atomically

__all__ = ["IDS_FILE", "Stage", "check_trackers", "open_trackers"]

IDS_FILE = "trackers.json"  # in a stage's folder: the id of its run with every service


@dataclasses.dataclass(frozen=True)
class Stage:
  """What a tracker is told of the stage that it follows.

  Attributes:
    directory: the stage's folder.
    name: "teacher" or "distill".
    start_step: restored from a checkpoint; 0 at the beginning.
    config: every setting, by dotted name.
  """

  directory: Path
  name: str
  start_step: int
  config: Mapping[str, Any]

  @property
  def title(self) -> str:
    """What the run is called: its workdir and the stage."""
    return f"{self.directory.resolve().parent.name}/{self.name}"


class TensorBoard:
  """Event files in the stage's folder; what lies beyond a restored step is purged."""

  def __init__(self, stage: Stage):
    # A bounded queue would block for ever once a full disk has killed the thread that empties it.
    self._board = SummaryWriter(
      str(stage.directory / "tensorboard"),
      purge_step=stage.start_step + 1,
      max_queue=0,
      flush_secs=10,
      filename_suffix=f".{stage.start_step}",  # two within a second would have the same name
    )

  def metrics(self, step: int, values: Mapping[str, float]) -> None:
    """Scalars of one step."""
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """One picture of a step."""
    self._board.add_image(name, image, step, dataformats="HWC")

  def close(self) -> None:
    """Flushes and closes the file."""
    self._board.close()


class WeightsAndBiases:
  """A run of Weights & Biases; `step` is the horizontal axis of all its curves."""

  def __init__(self, stage: Stage):
    import wandb

    self._wandb = wandb
    self._run = wandb.init(
      id=_run_id(stage, "wandb"),
      resume="allow",
      name=stage.title,
      dir=str(stage.directory),
      config=dict(stage.config),
    )
    _keep_run_id(stage, "wandb", self._run.id)
    self._run.define_metric("*", step_metric="step")

  def metrics(self, step: int, values: Mapping[str, float]) -> None:
    """Scalars of one step."""
    self._run.log({"step": step, **values})

  def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """One picture of a step."""
    self._run.log({"step": step, name: self._wandb.Image(image)})

  def close(self) -> None:
    """Uploads what is left."""
    self._run.finish()


class MLflow:
  """A run of MLflow, in the experiment MLFLOW_EXPERIMENT_NAME ("dimo_jax" without one)."""

  def __init__(self, stage: Stage):
    from mlflow import MlflowClient

    self._client = MlflowClient()
    known = _run_id(stage, "mlflow")
    self._id = known or self._create(stage)
    self._client.update_run(self._id, "RUNNING")
    if not known:
      _keep_run_id(stage, "mlflow", self._id)
      for name, value in stage.config.items():
        self._client.log_param(self._id, name, value)

  def _create(self, stage: Stage) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "dimo_jax")
    found = self._client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else self._client.create_experiment(name)
    return self._client.create_run(experiment, run_name=stage.title).info.run_id

  def metrics(self, step: int, values: Mapping[str, float]) -> None:
    """Scalars of one step."""
    for name, value in values.items():
      self._client.log_metric(self._id, name, value, step=step)

  def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """One picture of a step."""
    self._client.log_image(self._id, image, artifact_file=f"{name}/step_{step:07d}.png")

  def close(self) -> None:
    """Marks the run as ended."""
    self._client.set_terminated(self._id)


_TRACKERS: dict[str, Callable[[Stage], Tracker]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


def _ids(stage: Stage) -> dict[str, str]:
  path = stage.directory / IDS_FILE
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _run_id(stage: Stage, tracker: str) -> str | None:
  return _ids(stage).get(tracker)


def _keep_run_id(stage: Stage, tracker: str, run_id: str) -> None:
  write_atomically(stage.directory / IDS_FILE, json.dumps(_ids(stage) | {tracker: run_id}))


def check_trackers(names: Sequence[str]) -> None:
  """Raises UserError where `log.trackers` names one that is unknown or not installed."""
  for name in names:
    choose(_TRACKERS, name, "log.trackers")
    if importlib.util.find_spec(name) is None:
      raise UserError(f"log.trackers={tuple(names)}: {name} is missing: pip install {name}")


def open_trackers(stage: Stage, names: Sequence[str]) -> list[Tracker]:
  """TensorBoard and the named ones, in process 0; none in the others.

  Raises:
    UserError: a service that cannot be reached, or that does not know the user.
  """
  trackers: list[Tracker] = []

  def open_all() -> None:
    stage.directory.mkdir(parents=True, exist_ok=True)
    trackers.append(TensorBoard(stage))
    for name in names:
      try:
        trackers.append(_TRACKERS[name](stage))
      except Exception as error:  # every service has its own
        line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"log.trackers={tuple(names)}: {name} does not open: {line}") from error

  on_first(open_all)
  return trackers
