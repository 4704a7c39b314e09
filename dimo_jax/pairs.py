"""Noise-image pairs of a teacher, for the regression loss: `--mode=pairs`."""

import time
from pathlib import Path

import jax
import numpy as np

from dimo_jax import prepare, records, start, train
from dimo_jax.build import NUM_SEEDS, Experiment
from dimo_jax.checkpoint import params_hash
from dimo_jax.distributed import on_first
from dimo_jax.preemption import STOP
from dimo_jax.samplers.edm import Heun
from dimo_jax.sharding import fetch, local_rows, shard_batch
from dimo_jax.types import UserError
from dimo_jax.writers import say


def make_pairs(
  experiment: Experiment, workdir: Path, num_pairs: int, seed: int, out_text: str
) -> None:
  """Writes unit noise and what the teacher's deterministic sampler makes of it, to a .npz file.

  The sampler is that of `teacher.sampling`; classes are uniform. The teacher is trained first where
  none is given or trained. Without a file's name in `out_text` it is `pairs.npz` in the workdir.

  Raises:
    UserError: no continuous teacher, a stochastic sampler, bad flags, or an unwritable file.
  """
  sampler, config = experiment.decoding, experiment.config
  if not isinstance(sampler, Heun):
    raise UserError(
      f"--mode=pairs needs a continuous teacher; teacher.name={config.teacher.name!r}"
    )
  if sampler.s_churn:
    raise UserError(f"teacher.sampling.s_churn={sampler.s_churn} must be 0 for pairs")
  if num_pairs < 1:
    raise UserError(f"--num_pairs={num_pairs} must be 1 or more")
  if not 0 <= seed < NUM_SEEDS:
    raise UserError(f"--seed={seed} must lie in 0 .. {NUM_SEEDS - 1}")
  out = Path(out_text or workdir / "pairs.npz")
  if out.suffix != ".npz":
    raise UserError(f"--out={str(out)!r} must end in .npz")
  on_first(lambda: records.forget_if_fruitless(workdir))
  prepare.check_workdir(experiment, workdir)
  tokenizer_params = prepare.fit_tokenizer(experiment, workdir)
  params, tokenizer_params = train.train_teacher(experiment, workdir, tokenizer_params)
  teacher = start.teacher_state(experiment, params, tokenizer_params)

  @jax.jit
  def sample(teacher, class_id, key):
    draws = sampler.draw(key, len(class_id))
    return draws.start, sampler.integrate(teacher, {"class_id": class_id}, draws)

  b = config.evaluation.batch_size
  num_batches = -(-num_pairs // b)
  labels = np.random.default_rng(seed).integers(config.data.num_classes, size=num_batches * b)
  labels = labels.astype(np.int32)
  rows = local_rows(b, experiment.mesh)
  noise, images = [], []
  began = time.perf_counter()
  for i in range(num_batches):
    class_id = shard_batch(labels[i * b + rows], experiment.mesh)
    made = sample(teacher, class_id, jax.random.fold_in(jax.random.key(seed), i))
    noise.append(fetch(made[0]))
    images.append(fetch(made[1]))
    rate = b * (i + 1) / (time.perf_counter() - began)
    say(f"pairs {min(b * (i + 1), num_pairs)}/{num_pairs}  {rate:.0f} images/s")
    STOP.raise_if_set()

  def write() -> None:
    try:
      out.parent.mkdir(parents=True, exist_ok=True)
      np.savez(
        out,
        noise=np.concatenate(noise)[:num_pairs],
        image=np.concatenate(images)[:num_pairs],
        class_id=labels[:num_pairs],
        teacher_sha256=np.array(params_hash(params)),
      )
    except OSError as error:
      raise UserError(f"--out={str(out)!r} cannot be written: {error.strerror}") from error

  on_first(write)
  say(f"{num_pairs} pairs in {out}")
