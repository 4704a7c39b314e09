"""Di[M]O on digits with a divergence of our own, the Bhattacharyya distance."""

from jax import nn

from configs import digits
from dimo_jax.objectives.divergences import DIVERGENCES


def bhattacharyya(fake_logits, teacher_logits):  # [b, l, v] of both -> [b, l]
  return -nn.logsumexp((nn.log_softmax(fake_logits) + nn.log_softmax(teacher_logits)) / 2, axis=-1)


DIVERGENCES["bhattacharyya"] = lambda jeffreys_beta: bhattacharyya


def get_config():
  config = digits.get_config()
  config.dimo.divergence = "bhattacharyya"
  return config
