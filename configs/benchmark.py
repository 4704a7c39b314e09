"""The speed comparison with the reference implementation: 7.62 M parameters, batch 4, float32.

python -m dimo_jax.benchmark --config=configs/benchmark.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Overrides of the base config."""
  config = base.get_config()
  config.model.update(
    hidden_dim=256, num_layers=8, num_heads=8, mlp_dim=1024, dropout=0.0, scan_layers=False
  )
  config.train.batch_size = 4
  return config
