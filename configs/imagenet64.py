"""DMD2 on ImageNet-64: a one-step generator from EDM's ADM teacher.

The images, once, from a folder with train and val or ImageNet's tar files:

    python -m dimo_jax.data.prepare --source=IMAGENET --size=64 --out=DATA

The two published stages, without the GAN and then with it from the first one's best weights:

    python -m dimo_jax.main --config=configs/imagenet64.py:no_gan --workdir=runs/stage1 \\
      --config.teacher.path=edm-imagenet-64x64-cond-adm.pkl --config.data.path=DATA
    python -m dimo_jax.main --config=configs/imagenet64.py:second_stage --workdir=runs/stage2 \\
      --config.teacher.path=edm-imagenet-64x64-cond-adm.pkl --config.data.path=DATA \\
      --config.train.start_from=runs/stage1

Without a variant: one stage with the GAN from scratch. The images are scaled as the teacher's
were; those of tfds's `imagenet_resized/64x64` are not.

With `--config.evaluation.inception=pt_inception-2015-12-05-6726825d.pth` and
`--config.evaluation.statistics=imagenet-64x64.npz` the teacher is evaluated first, at 18 and 40
steps (`--config.evaluation.teacher_first=False` skips it), then the student every 5000 updates; a
second stage may then begin at the first one's best (`--config.train.start_from_best=True`).

Published (arXiv:2405.14867, batch 280 on 7 GPUs): FID 2.61 after the first stage (410k fake-score
updates), 1.28 after the second (140k more), 1.51 from scratch (200k). Not run here beyond
building the networks. `train.num_steps` counts generator updates, one in five.

Every override is the published setting: bfloat16 networks over float32 parameters, AdamW at 2e-6
(second stage 5e-7) with weight decay 0.01, clipping at 10 and a warm-up of 500, batch 280, mirrored
images, no average of the generator, nothing frozen.
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = ("gan", "no_gan", "second_stage")


def get_config(variant: str = "gan") -> ConfigDict:
  """Overrides of the base config; `variant` is what follows the colon."""
  if variant not in VARIANTS:
    raise ValueError(f"configs/imagenet64.py:{variant} is unknown; known: {', '.join(VARIANTS)}")
  config = base.get_config()
  config.objective = "dmd2"
  config.data.update(name="prepared", image_size=64, flip=True)
  config.tokenizer.name = "pixels"
  config.teacher.name = "edm"
  config.precision.compute_dtype = "bfloat16"
  for optimizer in (config.optim.generator, config.optim.fake_score):
    optimizer.update(name="adamw", learning_rate=2e-6, weight_decay=0.01, clip_norm=10.0)
    optimizer.num_warmup = 500
  config.optim.frozen = ()
  config.train.update(num_steps=40_000, batch_size=280, ema_decay=0.0)
  config.train.start_from_best = False
  config.tested.update(batch_size=(280, 280), learning_rate=(5e-7, 2e-6))
  config.evaluation.update(protocol="edm-imagenet64", teacher_steps=(18, 40))
  if variant == "second_stage":
    config.optim.generator.learning_rate = config.optim.fake_score.learning_rate = 5e-7
    config.train.num_steps = 28_000
  if variant == "no_gan":
    config.dmd2.update(gan_generator_weight=0.0, gan_critic_weight=0.0)
    config.train.num_steps = 82_000
  return config
