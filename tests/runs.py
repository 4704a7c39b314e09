"""Workdirs of distillations that nobody ran: random weights, with all that a run records."""

import json
import pathlib

import jax
import numpy as np

from configs import debug
from dimo_jax import prepare, records
from dimo_jax.build import Experiment, build
from dimo_jax.checkpoint import BEST_METRIC, Checkpoints, check_record, params_hash, save_params
from dimo_jax.start import initial_state

STEPS = (10, 20)  # its checkpoints; the first is the best
RESULTS = [
  {"model": "real", "sampler": "test split", "steps": 0, "frechet_distance": 2.5},
  {"model": "teacher", "sampler": "Heun", "steps": 4, "frechet_distance": 2.75},
  {
    "model": "student",
    "sampler": "one step",
    "steps": 1,
    "frechet_distance": 3.25,
    "recall": 0.75,
    "num_images": 96,
    "classifier_sha256": "ab" * 32,
  },
]


def perturbed(params, scale: float):
  """Weights that differ from others in every array."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: x + scale * rng.standard_normal(x.shape).astype(np.float32), params)


def make(workdir: pathlib.Path, variant: str = "dimo", **sections) -> Experiment:
  """Makes the workdir of a run of `configs/debug.py`; `sections` are changed fields by section."""
  config = debug.get_config(variant)
  for section, fields in sections.items():
    config[section].update(fields)
  experiment = build(config)
  teacher = experiment.teacher.init(jax.random.key(0))
  (workdir / "distill").mkdir(parents=True)
  (workdir / "tokenizer").mkdir()
  (workdir / "teacher").mkdir()
  codebook = {}
  if experiment.has_pictures and experiment.tokenizer.codebook_size:
    shape = (config.tokenizer.codebook_size, config.tokenizer.patch_size**2)
    codebook = {"codebook": np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)}
    save_params(workdir / "tokenizer" / "tokenizer.safetensors", codebook, {})
  recipe = prepare.recipe(experiment)
  recipe.save(workdir)
  fields = records.teacher_fields(experiment)
  file = workdir / "teacher" / prepare.TEACHER_FILE
  prepare.save_teacher(file, teacher, codebook, fields, recipe)
  check_record(workdir / "distill", records.distill_fields(experiment, teacher))
  state = initial_state(experiment, teacher)()
  checkpoints = Checkpoints(workdir / "distill" / "checkpoints", keep=2)
  for step in STEPS:
    trained = state.replace(
      generator=state.generator.replace(
        step=np.int32(step), params=perturbed(state.generator.params, 0.1 + 0.01 * step)
      ),
      ema=perturbed(state.ema, 0.007 * step),
      clock=np.int32(step * experiment.objective.fake_rounds),
    )
    checkpoints.save(step, trained, {BEST_METRIC: float(step)})
  checkpoints.close()
  *others, student = RESULTS
  evaluated = {"step": STEPS[-1], "weights_sha256": params_hash(trained.ema_params)}
  (workdir / "results.json").write_text(json.dumps([*others, student | evaluated]))
  return experiment
