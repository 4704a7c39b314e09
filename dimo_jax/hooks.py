"""What a distillation shows as it goes: the student's figures, and pictures of all networks."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dimo_jax.build import Experiment
from dimo_jax.distributed import from_first, on_first
from dimo_jax.evaluation import pictures
from dimo_jax.evaluation.generation import Generated, generate, sample_images
from dimo_jax.evaluation.protocols import Reference
from dimo_jax.preemption import STOP
from dimo_jax.samplers import Sampler
from dimo_jax.sharding import fetch
from dimo_jax.state import DistillState, NetworkState
from dimo_jax.types import Params
from dimo_jax.writers import Writer


def sampling_network(experiment: Experiment, params: Params, tokenizer: Params) -> NetworkState:
  """A network for sampling alone: whole parameters, no optimiser."""
  return experiment.teacher.frozen_state(params, tokenizer)


def protocol_labels(experiment: Experiment, reference: Reference) -> np.ndarray:
  """The classes that the protocol asks for, int32 [n]."""
  protocol = reference.protocol
  return protocol.labels(experiment.source(protocol.reference_split).labels)


def sample_protocol(
  experiment: Experiment,
  sampler: Sampler,
  network: NetworkState,
  labels: np.ndarray,
  *,
  interruptible: bool = True,
) -> Generated:
  """One sample per label, with the evaluation's seed and batch size.

  Raises:
    Preempted: a signal came, and it is interruptible. In a training it is not: there the figures
      must be on disk before the checkpoint of their step.
  """
  evaluation = experiment.config.evaluation
  return generate(
    sampler,
    experiment.tokenizer,
    network,
    labels,
    seed=evaluation.seed,
    batch_size=evaluation.batch_size,
    mesh=experiment.mesh,
    between_batches=STOP.raise_if_set if interruptible else None,
  )


def evaluate_sampler(
  experiment: Experiment,
  reference: Reference,
  sampler: Sampler,
  network: NetworkState,
  *,
  interruptible: bool = True,
) -> dict[str, float | int | None]:
  """The protocol's metrics of a network under a sampler, with `images_per_second`.

  Processes that run together compute them alike, and take process 0's.

  Raises:
    Preempted: a signal came, and it is interruptible.
  """
  labels = protocol_labels(experiment, reference)
  samples = sample_protocol(experiment, sampler, network, labels, interruptible=interruptible)
  row = reference.evaluate(
    samples.images, labels, samples.tokens, experiment.tokenizer.codebook_size or None
  )
  return from_first(row | {"images_per_second": samples.images_per_second})


def draw_pictures(
  experiment: Experiment,
  state: DistillState,
  teacher: NetworkState,
  directory: Path,
  writer: Writer,
) -> dict[str, float]:
  """Writes one grid of generator, teacher and fake score, same classes and keys side by side.

  Returns:
    generator/brightness and generator/contrast: mean and standard deviation of the generator's
    pixels in [-1, 1].
  """
  step = int(state.generator.step)
  num = experiment.config.log.num_pictures
  condition = {"class_id": jnp.arange(num, dtype=jnp.int32) % experiment.config.data.num_classes}
  key = jax.random.key(experiment.config.evaluation.seed)
  student = sampling_network(experiment, state.ema_params, teacher.autoencoder)
  score = experiment.objective.score_params(state.fake_score.all_params)
  fake_score = sampling_network(experiment, score, teacher.autoencoder)
  decoding = experiment.decoding
  num_steps = experiment.student_sampler.num_steps
  generator = f"generator, {num_steps} step{'s' if num_steps > 1 else ''}"
  runs = (
    (generator, experiment.student_sampler.at(int(state.clock)), student),
    (f"teacher, {decoding.num_steps} steps", decoding, teacher),
    (f"fake score, {decoding.num_steps} steps", decoding, fake_score),
  )
  panels = {}
  for caption, sampler, network in runs:
    drawn, _ = sample_images(
      sampler, experiment.tokenizer, network, condition, key, experiment.mesh
    )
    panels[caption] = fetch(drawn)
  pixels = pictures.side_by_side(panels)
  on_first(lambda: pictures.save_png(directory / f"step_{step:07d}.png", pixels))
  writer.picture(step, "samples", pixels)
  generated = panels[generator]
  return {
    "generator/brightness": float(generated.mean()),
    "generator/contrast": float(generated.std()),
  }
