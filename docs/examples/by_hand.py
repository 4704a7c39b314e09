"""Di[M]O's iterations, one after the other: `dimo_jax.train.distill` without its files."""

import jax

from configs import debug
from dimo_jax import prepare
from dimo_jax.build import build
from dimo_jax.start import (
  base_key,
  distill_batches,
  initial_state,
  jit_distill_step,
  place,
  teacher_state,
)

experiment = build(debug.get_config())
teacher_params = prepare.random_teacher(experiment)  # or prepare.load_teacher(experiment, path)[0]
teacher = teacher_state(experiment, teacher_params, tokenizer_params={})
make_state = initial_state(experiment, teacher_params)
step_fn = jit_distill_step(experiment, jax.eval_shape(make_state), teacher)
state = place(make_state(), experiment.mesh, experiment.config.mesh.rules)
for batch in distill_batches(experiment, start=0, num_steps=3):
  state, metrics = step_fn(state, teacher, batch, base_key(experiment))
  print({name: float(f"{value:.3g}") for name, value in metrics.items()})
