"""What each of two processes with two devices sees; run by test_distributed.py, prints JSON."""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from dimo_jax import distributed, sharding
from dimo_jax.preemption import STOP
from dimo_jax.types import UserError
from tests import judged


def refusal(call) -> str:
  """What a call refuses, "" if nothing."""
  try:
    call()
  except UserError as error:
    return str(error)
  return ""


def refuse():
  raise UserError("process 0 says no")


def main() -> None:
  address, process_id, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
  STOP.install()
  distributed.initialize(address, 2, process_id)
  STOP.share()
  mesh = sharding.make_mesh(2)
  seen: dict = {"is_first": distributed.is_first()}
  value = {"text": "é" * 2000, "number": 0.1 + process_id, "none": None}
  seen["from_first"] = distributed.from_first(value) == value | {"number": 0.1}
  seen["in_any"] = [distributed.in_any(process_id == 1), distributed.in_any(False)]
  seen["on_first"] = refusal(lambda: distributed.on_first(refuse))
  path = folder / "file"
  existed = distributed.exists(path)
  distributed.on_first(path.touch)
  seen["exists"] = [existed, path.exists(), distributed.exists(path)]
  own = folder / f"own_{process_id}"
  own.mkdir()
  seen["not_shared"] = refusal(lambda: distributed.check_shared(own))
  distributed.check_shared(folder)

  rows = sharding.local_rows(8, mesh)
  whole = np.arange(16, dtype=np.float32).reshape(2, 8)
  batch = sharding.shard_batch({"x": whole[:, rows]}, mesh, 1)["x"]
  seen["local_rows"] = rows.tolist()
  seen["batch"] = batch.shape == whole.shape and bool((sharding.fetch(batch) == whole).all())
  tree = {"split": whole, "scalar": 3, "key": jax.random.key(7)}
  placed = sharding.put(tree, sharding.state_sharding(tree, mesh))
  seen["split"] = placed["split"].addressable_shards[0].data.shape
  seen["fetched"] = bool((sharding.fetch(placed)["split"] == whole).all())
  seen["sum"] = float(jax.jit(lambda t: t["split"].sum() + t["scalar"])(placed))
  seen["draw"] = float(jax.jit(lambda t: jax.random.uniform(t["key"]))(placed))

  seen["rows"] = judged.evaluate(mesh, folder / "judged")

  print("ready", flush=True)
  for step in range(10_000):
    if STOP.is_set():
      seen["stopped_at"] = step
      break
    time.sleep(0.01 if process_id else 0.013)  # they are never at the same call by chance
    distributed.in_any(False)  # as a training's sums: no process gets far ahead
  seen["still_set"] = STOP.is_set()
  print(json.dumps(seen), flush=True)


if __name__ == "__main__":
  main()
