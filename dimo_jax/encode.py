"""The codes of a data set's training images, once, for teachers that are trained on tokens:

python -m dimo_jax.encode --config=configs/imagenet256_teacher.py --codes=CODES \\
  --config.data.path=DATA --config.tokenizer.path=last.ckpt

A training with --config.data.tokens=CODES reads them in place of the images. The same command goes
on where it was interrupted.
"""

import contextlib
import fcntl
import json
import time
from pathlib import Path

import grain
import numpy as np
from absl import flags

from dimo_jax import cli, prepare
from dimo_jax.build import Experiment, build
from dimo_jax.data.tokens import MANIFEST, TOKENS, read_manifest
from dimo_jax.evaluation.generation import encode_images
from dimo_jax.preemption import STOP
from dimo_jax.types import UserError
from dimo_jax.writers import clock, say, write_atomically

_CODES = flags.DEFINE_string("codes", "", "Folder to write; the same command goes on in it.")
_SECONDS_BETWEEN_LINES = 5


def encode(experiment: Experiment, out: str, batch_size: int = 64) -> None:
  """Writes the codes of the training images, each as it is and mirrored, to the folder `out`.

  Raises:
    UserError: no images, a tokenizer that is fitted on them or makes no codes, or an `out` that
      holds something else or cannot be written.
    Preempted: a signal came; what was encoded is kept.
  """
  prepare.check_encodable(experiment)
  if not out:
    raise UserError("--codes is missing; name a folder, such as --codes=data/codes")
  source, tokenizer = experiment.source("train"), experiment.tokenizer
  params = tokenizer.fit(None, experiment.config.seed)
  settings = prepare.codes_settings(experiment, params)
  folder = Path(out)
  with contextlib.ExitStack() as stack:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      stream = stack.enter_context(open(folder / "lock", "a"))
      fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
      done, codes = _open(folder, settings, tokenizer.codebook_size)
    except BlockingIOError as error:
      raise UserError(f"--codes={out!r}: another process is writing there") from error
    except OSError as error:
      raise UserError(f"--codes={out!r} cannot be written: {error.strerror or error}") from error
    if done == len(source):
      say(f"{out} is ready already: data.tokens={out!r}")
      return
    if done:
      say(f"{done} of {len(source)} images were encoded before")

    def keep(num: int) -> None:
      codes.flush()
      write_atomically(folder / MANIFEST, json.dumps(settings | {"num_done": num}, indent=1) + "\n")

    began = last = time.perf_counter()
    options = grain.ReadOptions(experiment.config.data.num_read_threads)
    images = grain.MapDataset.source(source)[done:].batch(batch_size).to_iter_dataset(options)
    num = done
    for batch in images:
      both = np.concatenate([batch["image"], batch["image"][:, :, ::-1]])
      found = encode_images(tokenizer, params, both, experiment.mesh)
      size = len(batch["image"])
      codes[num : num + size, 0], codes[num : num + size, 1] = found[:size], found[size:]
      num += size
      now = time.perf_counter()
      if now - last > _SECONDS_BETWEEN_LINES or STOP.is_set():
        last = now
        keep(num)
        rate = (num - done) / (now - began)
        say(f"{num}/{len(source)} images  {rate:.1f}/s  ETA {clock((len(source) - num) / rate)}")
      STOP.raise_if_set()
    keep(num)
  say(f"{out} is ready: data.tokens={out!r}")


def _open(folder: Path, settings: dict, codebook_size: int) -> tuple[int, np.memmap]:
  """(images done, the codes to write) of a new or an interrupted folder."""
  shape = (settings["num_images"], 2, settings["num_tokens"])
  path = folder / TOKENS
  if (folder / MANIFEST).exists():
    field = f"--codes={str(folder)!r}"
    manifest = read_manifest(folder, field)
    if {k: v for k, v in manifest.items() if k != "num_done"} != settings:
      raise UserError(f"{field} holds codes of other images or another tokenizer; name a new one")
    return manifest["num_done"], np.lib.format.open_memmap(path, mode="r+")
  dtype = np.uint16 if codebook_size <= 2**16 else np.int32
  codes = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
  write_atomically(folder / MANIFEST, json.dumps(settings | {"num_done": 0}, indent=1) + "\n")
  return 0, codes


def _dispatch() -> None:
  config = cli.CONFIG.value
  if config.data.tokens:
    raise UserError(
      f"data.tokens={config.data.tokens!r} must be empty: --codes says where to write"
    )
  encode(build(config), _CODES.value)


def main() -> None:
  """Runs the command line."""
  cli.run(_dispatch)


if __name__ == "__main__":
  main()
