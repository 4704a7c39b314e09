"""Several processes as one run: how they find each other, and how they agree.

Every process runs the same program over one global mesh. What is computed on the host is computed
by all of them alike; process 0 alone writes it, and the others wait until it is whole.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dimo_jax.types import UserError

_SHUTDOWN_S = 60  # how long a process that has ended waits for the others


def initialize(
  coordinator_address: str = "",
  num_processes: int | None = None,
  process_id: int | None = None,
  distributed: bool | None = None,
) -> None:
  """Joins the processes of this run; to be called before JAX touches a device.

  Args:
    coordinator_address: "host:port" at which process 0 listens; "" where the cluster knows.
    num_processes, process_id: with an address, and only then.
    distributed: whether to ask the cluster (TPU pods, GKE, Slurm, Open MPI), waiting for its other
      processes; None where its environment says that there are several.

  Raises:
    UserError: flags that do not go together, or an address without a port.
  """
  given = {
    "--coordinator_address": coordinator_address or None,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < len(given):
    raise UserError(f"{', '.join(missing)} missing: an address, a number and an id go together")
  if missing:
    if distributed or (distributed is None and _has_peers(os.environ)):
      jax.distributed.initialize(shutdown_timeout_seconds=_SHUTDOWN_S)
    return
  assert num_processes is not None and process_id is not None  # nothing is missing
  if not coordinator_address.rpartition(":")[2].isdigit():
    raise UserError(f"--coordinator_address={coordinator_address!r} must be HOST:PORT")
  if not 0 <= process_id < num_processes:
    raise UserError(
      f"--process_id={process_id} must lie in 0 .. {num_processes - 1} (--num_processes)"
    )
  jax.distributed.initialize(
    coordinator_address,
    num_processes,
    process_id,
    cluster_detection_method="deactivate",
    shutdown_timeout_seconds=_SHUTDOWN_S,
  )


def _has_peers(environment: Mapping[str, str]) -> bool:
  """Whether Slurm's srun, Open MPI or GKE's TPUs started this process as one of several."""
  counts = [environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
  return counts != ["1", "1"] or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def check_joined() -> None:
  """Raises UserError where the devices of other processes are seen without knowing those."""
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise UserError(f"this is one of {jax.process_count()} processes: add --distributed")


def keep_compiled_programs() -> None:
  """Lets a restarted run on GPUs or TPUs find its compiled program on this host, in
  ~/.cache/dimo_jax; to be called before anything is compiled.

  JAX_COMPILATION_CACHE_DIR names another folder. Not on CPUs, whose programs JAX warns of when it
  reads them again.
  """
  if jax.default_backend() != "cpu" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = Path.home() / ".cache" / "dimo_jax"
    jax.config.update("jax_compilation_cache_dir", str(folder))


def is_first() -> bool:
  """Whether this is process 0, which writes what people read."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def from_first(value: Any) -> Any:
  """Process 0's value (what JSON can hold) in every process, once all are here."""
  if jax.process_count() == 1:
    return value
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  buffer = np.zeros(-(-size // 1024) * 1024, np.uint8)  # few sizes: each is compiled once
  if jax.process_index() == 0:
    buffer[:size] = data
  return json.loads(multihost_utils.broadcast_one_to_all(buffer)[:size].tobytes())


def in_any(value: bool) -> bool:
  """Whether it is true in any process."""
  if jax.process_count() == 1:
    return value
  return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


def exists(path: Path) -> bool:
  """Whether a file exists, asked before any process goes on to write it."""
  return bool(from_first(path.exists()))


def on_first(action: Callable[[], Any]) -> None:
  """Process 0 does it while the others wait.

  Raises:
    UserError: in every process, what process 0 refuses.
  """
  refusal = None
  if is_first():
    try:
      action()
    except UserError as error:
      if jax.process_count() == 1:
        raise
      refusal = str(error)
  refusal = from_first(refusal)
  if refusal is not None:
    raise UserError(refusal)


def check_shared(directory: Path) -> None:
  """Raises UserError, in every process, where one does not see what process 0 writes there."""
  if jax.process_count() == 1:
    return
  marker = directory / f".{os.urandom(8).hex()}"
  if is_first():
    marker.touch()
  marker = directory / from_first(marker.name)
  unseen = in_any(not marker.exists())
  if is_first():
    marker.unlink()
  if unseen:
    raise UserError(
      f"--workdir={str(directory)!r} is not one folder for all processes: name one on a file system"
      " that all hosts share"
    )
