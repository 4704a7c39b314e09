"""DMD2 on real 8x8 digits, on a CPU: a continuous teacher into a one-step generator.

    python -m dimo_jax.main --config=configs/digits_dmd2.py --workdir=runs/dmd2
    python -m dimo_jax.main --config=configs/digits_dmd2.py:four_step --workdir=runs/dmd2_four

Departures from the published ImageNet-64 settings (base.py), each for a reason:

* An MLP without dropout, 256 wide with 4 blocks: a convolutional U-Net costs ten times as much for
  a gradient at this size.
* Teacher of 6000 updates at batch 128, Adam (0.9, 0.999) at 1e-3 with a cosine to a twentieth and
  an average of 0.999: minutes, not days. Eight Heun steps are enough for its pictures.
* The matching's table ends at 10: of the levels up to 80 half lie above 2.5, where 8x8 digits give
  little more than class means. The student still starts at 80, as published.
* Learning rates of 1e-3 with a cosine to a tenth and a warm-up of 50, hundreds of times the
  published ones: 750 generator updates at batch 128, not 80,000 at 280.
* Four steps at 80, 1, 0.4 and 0.15, a quarter of the noise of SDXL's published timesteps 749, 499
  and 249 (4.1, 1.6, 0.69): a level hides as much of an 8x8 image as a higher one of a big image.
* Four steps learn at 3e-4 for 1500 updates: an update trains one of the steps, and one fake score
  follows the mixture of all their outputs.
* Adam (0, 0.99) without weight decay: as in digits.py, where momentum loses modes.
* Averages of 0.99 of the generator, which the paper does not take: they even out the large steps.

As published are the GAN and its weights, five fake-score updates for each of the generator's and
clipping at 10.
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = ("one_step", "four_step")


def get_config(variant: str = "one_step") -> ConfigDict:
  """Overrides of the base config; `variant` is what follows the colon."""
  if variant not in VARIANTS:
    raise ValueError(f"configs/digits_dmd2.py:{variant} is unknown; known: {', '.join(VARIANTS)}")
  config = base.get_config()
  config.objective = "dmd2"
  config.data.update(name="digits", num_classes=10)
  config.tokenizer.name = "pixels"
  config.process.sigma_max = 10.0
  config.denoiser.update(name="mlp", hidden_dim=256, num_blocks=4, dropout=0.0)

  config.teacher.name = "edm"
  config.teacher.pretrain.update(num_steps=6000, batch_size=128, ema_decay=0.999, dropout=False)
  config.teacher.pretrain.optim.update(
    name="adam", learning_rate=1e-3, b2=0.999, weight_decay=0.0, schedule="cosine"
  )
  config.teacher.pretrain.optim.final_fraction = 0.05
  config.teacher.sampling.num_steps = 8

  for optimizer in (config.optim.generator, config.optim.fake_score):
    optimizer.update(learning_rate=1e-3, b1=0.0, b2=0.99, clip_norm=10.0)
    optimizer.update(schedule="cosine", num_warmup=50, final_fraction=0.1)
  config.optim.frozen = ()
  config.train.update(num_steps=750, batch_size=128, ema_decay=0.99)
  config.tested.update(batch_size=(128, 128), learning_rate=(3e-4, 1e-3))
  if variant == "four_step":
    config.dmd2.student_sigmas = (80.0, 1.0, 0.4, 0.15)
    config.optim.generator.learning_rate = 3e-4
    config.train.num_steps = 1500

  config.log.update(
    every_steps=25, pictures_every_steps=250, evaluate_every_steps=250, checkpoint_every_steps=100
  )
  config.evaluation.update(protocol="digits", batch_size=512, teacher_steps=(2, 4, 8, 18))
  return config
