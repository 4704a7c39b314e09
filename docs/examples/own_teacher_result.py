import sys

import numpy as np
import own_teacher  # noqa: F401 (registers what is loaded)

import dimo_jax

labels = np.arange(1000) % 2
for name, steps in (("teacher", 1), ("teacher", 8), ("", 1)):
  images = dimo_jax.load(f"{sys.argv[1]}/{name}").sample(labels, seed=0, steps=steps)
  grey = np.round(images.reshape(-1, 4) * (7 / 255)).astype(int)
  is_one = (grey == grey[:, :1]).all(axis=1) & (grey[:, 0] // 4 == labels)
  print(f"{name or 'student'}, {steps} steps: {is_one.mean():.1%} are of one grey")
