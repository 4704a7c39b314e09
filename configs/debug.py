"""Every stage of a run at a size that proves nothing but the wiring; most of it is compilation.

python -m dimo_jax.main --config=configs/debug.py --workdir=/tmp/debug
python -m dimo_jax.main --config=configs/debug.py:dmd2 --workdir=/tmp/debug_dmd2
"""

from ml_collections import ConfigDict

from configs import digits, digits_dmd2


def get_config(variant: str = "dimo") -> ConfigDict:
  """Overrides of the digits configs; `variant` is what follows the colon."""
  if variant not in ("dimo", "dmd2"):
    raise ValueError(f"configs/debug.py:{variant} is unknown; known: dimo, dmd2")
  config = digits.get_config() if variant == "dimo" else digits_dmd2.get_config("four_step")
  config.model.update(hidden_dim=16, num_layers=1, num_heads=2, mlp_dim=32)
  config.denoiser.update(hidden_dim=32, num_blocks=2)
  config.dmd2.fake_rounds = 2
  config.tokenizer.codebook_size = 32
  config.teacher.pretrain.update(num_steps=20, batch_size=32)
  config.teacher.pretrain.optim.num_warmup = 4
  config.teacher.decoding.num_steps = 4
  config.teacher.sampling.num_steps = 4
  config.optim.generator.num_warmup = 4
  config.optim.fake_score.num_warmup = 4
  config.train.update(num_steps=20, batch_size=32)
  config.tested.update(batch_size=(), learning_rate=())
  config.log.update(
    every_steps=5,
    pictures_every_steps=10,
    evaluate_every_steps=10,
    checkpoint_every_steps=5,
    num_pictures=20,
  )
  config.evaluation.update(protocol="debug", batch_size=48, teacher_steps=(1, 4))
  return config
