"""The continuous teacher of DMD2 on ImageNet-64: EDM's ADM network, trained as EDM trained it.

The images, once:

    python -m dimo_jax.data.prepare --source=IMAGENET --size=64 --out=DATA
    python -m dimo_jax.main --config=configs/imagenet64_teacher.py --workdir=runs/edm \\
      --mode=teacher --config.data.path=DATA

Then evaluate it, and distil it:

    python -m dimo_jax.evaluate checkpoint runs/edm/teacher --protocol=edm-imagenet64 \\
      --steps=256 --out=teacher.jsonl --inception=... --statistics=...
    python -m dimo_jax.main --config=configs/imagenet64.py --workdir=runs/imagenet64 \\
      --config.data.path=DATA --config.teacher.path=runs/edm/teacher

Published (arXiv:2206.00364 and its release): 296 M parameters, 2500 million images at batch 4096,
which are 610,352 updates, about 13 days on 32 A100 of 80 GB; FID 1.36 by stochastic sampling in 256
steps (511 network calls). Not run here. Every override is the release's: Adam (0.9, 0.999) at 1e-4
after a warm-up over 10 million images, neither decay nor clipping, dropout 0.1, classes never
dropped, images not mirrored, an average with a half-life of 50 million images. Departures: the
average sets in by `(1 + k) / (10 + k)`, not by a twentieth of the images seen, and compute is in
bfloat16, not in scaled float16. There is no accumulation: 4096 images must fit the devices at once.

What to look at: no loss is published. Derived: `teacher/loss` starts at 1 for images whose mean
square is 0.25, as the preconditioning assumes, whatever the noise levels (the last layer starts at
0), and falls from there; a loss that stays at 1 has learnt nothing.
"""

from ml_collections import ConfigDict

from configs import imagenet64

NUM_IMAGES, NUM_WARMUP_IMAGES, HALF_LIFE = 2_500_000_000, 10_000_000, 50_000_000
BATCH_SIZE = 4096


def get_config() -> ConfigDict:
  """Overrides of the config that distils it."""
  config = imagenet64.get_config()
  config.data.update(flip=False, num_read_threads=8)
  config.teacher.pretrain.update(
    num_steps=-(-NUM_IMAGES // BATCH_SIZE),
    batch_size=BATCH_SIZE,
    condition_drop_rate=0.0,
    ema_decay=0.5 ** (BATCH_SIZE / HALF_LIFE),
  )
  config.teacher.pretrain.optim.update(
    name="adam",
    b2=0.999,
    weight_decay=0.0,
    clip_norm=0.0,
    num_warmup=NUM_WARMUP_IMAGES // BATCH_SIZE,
  )
  config.teacher.sampling.update(num_steps=256, s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003)
  config.log.checkpoint_every_steps = 5000
  return config
