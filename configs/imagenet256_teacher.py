"""The masked teacher of Di[M]O on ImageNet-256: MaskGIT, trained as its PyTorch reproduction was.

The images, once; the tokenizer is taming-transformers' VQGAN (`last.ckpt`, `model.yaml` beside it):

    python -m dimo_jax.data.prepare --source=IMAGENET --size=256 --out=DATA
    python -m dimo_jax.main --config=configs/imagenet256_teacher.py --workdir=runs/maskgit \\
      --mode=teacher --config.data.path=DATA --config.tokenizer.path=last.ckpt

Codes computed once spare the tokenizer's encoder at every update (1.3 GB; mirrored images too):

    python -m dimo_jax.encode --config=configs/imagenet256_teacher.py --codes=CODES \\
      --config.data.path=DATA --config.tokenizer.path=last.ckpt

and `--config.data.tokens=CODES` in the training. Then evaluate it, and distil it:

    python -m dimo_jax.evaluate checkpoint runs/maskgit/teacher --protocol=adm-imagenet256 \\
      --steps=8,16 --out=teacher.jsonl --inception=... --statistics=...
    python -m dimo_jax.main --config=configs/imagenet256.py --workdir=runs/imagenet256 \\
      --config.tokenizer.name=vqgan --config.tokenizer.path=last.ckpt \\
      --config.teacher.path=runs/maskgit/teacher

Published (arXiv:2310.14400 and its release, v1.0): 174.2 M parameters, 755,200 updates at batch
512, which it counts as 300 epochs, about 768 GPU hours on 8 A100; FID 6.80, IS 214.0, precision
0.82, recall 0.51 in 8 steps. Not run here. The settings are the release's: AdamW (0.9, 0.96) at a
constant 1e-4 without warm-up, weight decay 1e-5, clipping at 1, Bernoulli masks and the loss on all
positions, smoothed by 0.1, classes dropped by 0.1, dropout 0.1, mirrored images, no average.
Departures: images are cropped at the centre, not at random, and compute is in bfloat16, not in
float16.

What to look at: neither loss nor accuracy is published. Derived: `teacher/loss` starts near
ln 1025 = 6.93, that of the uniform distribution, and cannot pass below 1.02, the entropy of a
smoothed target, which the visible positions (0.36 of all on average) come to first: a network that
only copies these has 0.36 * 1.02 + 0.64 * 6.93 = 4.78. `teacher/token_accuracy` is of the masked
positions alone and starts near 0.001.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Overrides of the base config."""
  config = base.get_config()
  config.data.update(name="prepared", flip=True, num_read_threads=8)
  config.tokenizer.name = "vqgan"
  config.precision.compute_dtype = "bfloat16"
  config.teacher.pretrain.update(
    num_steps=755_200, batch_size=512, mask_kind="bernoulli", loss_positions="all", ema_decay=0.0
  )
  config.teacher.pretrain.optim.num_warmup = 0
  config.teacher.decoding.num_steps = 8
  config.log.checkpoint_every_steps = 5000
  return config
