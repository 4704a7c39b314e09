"""The speed comparisons with the reference implementations, float32 and without dropout.

    python -m dimo_jax.benchmark --config=configs/benchmark.py
    python -m dimo_jax.benchmark --config=configs/benchmark.py:dmd2

Di[M]O: 7.62 M parameters, batch 4. DMD2: an ADM of 12.25 M parameters on 32x32 noise, batch 8.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "dimo") -> ConfigDict:
  """Overrides of the base config; `variant` is what follows the colon."""
  if variant not in ("dimo", "dmd2"):
    raise ValueError(f"configs/benchmark.py:{variant} is unknown; known: dimo, dmd2")
  config = base.get_config()
  config.tested.update(batch_size=(), learning_rate=())
  if variant == "dimo":
    config.model.update(
      hidden_dim=256, num_layers=8, num_heads=8, mlp_dim=1024, dropout=0.0, scan_layers=False
    )
    config.train.batch_size = 4
    return config
  config.objective = "dmd2"
  config.data.update(name="noise", image_size=32, num_classes=10)
  config.tokenizer.name = "pixels"
  config.teacher.name = "edm"
  config.denoiser.update(
    model_channels=64, channel_mult=(1, 2, 3), num_blocks=2, attn_resolutions=(16, 8), dropout=0.0
  )
  for optimizer in (config.optim.generator, config.optim.fake_score):
    optimizer.update(name="adamw", learning_rate=2e-6, weight_decay=0.01, clip_norm=10.0)
  config.optim.frozen = ()
  config.train.update(batch_size=8, ema_decay=0.0)
  config.dmd2.fake_rounds = 2  # not 5: a further round adds its time, and compilation is long
  return config
