"""DMD2 on ImageNet-64: a one-step generator from EDM's ADM teacher, in the two published stages.

    python -m dimo_jax.main --config=configs/imagenet64.py --workdir=runs/imagenet64 \\
      --config.teacher.path=edm-imagenet-64x64-cond-adm.safetensors \\
      --config.data.path=imagenet64.npz

The original ImageNet, scaled and cropped as EDM's teacher saw it: `--config.data.name=folder
--config.data.path=imagenet --config.data.image_size=64` (or `tfds` with
`--config.data.tfds_name=imagenet2012`).

Published (arXiv:2405.14867, batch 280 on 7 GPUs): FID 2.61 without the GAN, 1.51 with it from
scratch, 1.28 in two stages. Not run to the end here: two iterations with random weights are.

`configs/imagenet64.py:no_gan` is the first stage (410k fake updates), the plain config the training
with the GAN from scratch (200k). Published step counts are fake updates; `train.num_steps` counts
generator updates, one in five.
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = ("gan", "no_gan")


def get_config(variant: str = "gan") -> ConfigDict:
  """Overrides of the base config; `variant` is what follows the colon."""
  if variant not in VARIANTS:
    raise ValueError(f"configs/imagenet64.py:{variant} is unknown; known: {', '.join(VARIANTS)}")
  config = base.get_config()
  config.objective = "dmd2"
  config.data.update(name="arrays", flip=True)
  config.tokenizer.name = "pixels"
  config.teacher.name = "edm"
  for optimizer in (config.optim.generator, config.optim.fake_score):
    optimizer.update(name="adamw", learning_rate=2e-6, weight_decay=0.01, clip_norm=10.0)
    optimizer.num_warmup = 500
  config.optim.frozen = ()
  config.train.update(num_steps=40_000, batch_size=280, ema_decay=0.0)
  if variant == "no_gan":
    config.dmd2.update(gan_generator_weight=0.0, gan_critic_weight=0.0)
    config.train.num_steps = 82_000
  return config
