"""Two teachers of our own, one of tokens, one of pixels; `:dimo` or `:dmd2` says which to distil.

The data are images of 2x2 pixels, all of one grey: 0 .. 3 in class 0, 4 .. 7 in class 1.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from configs import digits, digits_dmd2
from dimo_jax.data.sources import SOURCES, ArraySource, Row
from dimo_jax.processes.gaussian import Edm, preconditioning
from dimo_jax.teachers import TEACHERS
from dimo_jax.teachers.network import GaussianNetwork, MaskedNetwork


def mlp(x, class_id, num_outputs):
  x = jnp.concatenate([x.reshape(len(x), -1), nn.one_hot(class_id, 2)], axis=1)
  x = nn.gelu(nn.Dense(256)(nn.gelu(nn.Dense(256)(x))))
  return nn.Dense(num_outputs)(x)


class TokenNet(nn.Module):
  @nn.compact
  def __call__(self, tokens, class_id):
    return mlp(nn.one_hot(tokens, 9), class_id, 4 * 9).reshape(-1, 4, 9)  # 8 greys and the mask


@dataclasses.dataclass(frozen=True)
class TokenTeacher(MaskedNetwork):
  network = TokenNet()
  num_tokens, codebook_size, null_class = 4, 8, 2


class PixelNet(nn.Module):
  @nn.compact
  def __call__(self, noised, class_id):
    c_skip, c_out, c_in, c_noise = (c[:, None] for c in preconditioning(noised.sigma, 0.6))
    xt = noised.xt.reshape(-1, 4)
    output = mlp(jnp.concatenate([c_in * xt, c_noise], axis=1), class_id, 4)
    return (c_skip * xt + c_out * output).reshape(noised.xt.shape)


class LogUniform(Edm):  # a process: EDM's with another table of noise levels
  def sigmas(self):
    return np.geomspace(self.sigma_min, self.sigma_max, self.num_levels, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class PixelTeacher(GaussianNetwork):
  network, process = PixelNet(), LogUniform(sigma_data=0.6)
  image_shape, null_class = (2, 2, 1), 2


def greys(split):
  grey = np.arange(8, dtype=np.int32).repeat(128)
  images = np.broadcast_to(grey[:, None, None, None], (1024, 2, 2, 1)).astype(np.uint8)
  return ArraySource(images, grey // 4, num_classes=2, num_levels=8)


SOURCES["greys"] = Row(greys)
TEACHERS["tokens"] = lambda config, tokenizer: TokenTeacher()
TEACHERS["pixels"] = lambda config, tokenizer: PixelTeacher()


def get_config(objective="dimo"):
  config = (digits if objective == "dimo" else digits_dmd2).get_config()
  config.teacher.name = "tokens" if objective == "dimo" else "pixels"
  config.data.update(name="greys", num_classes=2)
  config.tokenizer.update(patch_size=1, grid_size=2, codebook_size=8)
  config.dimo.sigma, config.optim.frozen = 0.0, ()
  config.dmd2.update(gan_generator_weight=0.0, gan_critic_weight=0.0)
  config.teacher.pretrain.num_steps, config.train.num_steps = 1500, 800
  config.evaluation.protocol, config.log.pictures_every_steps = "none", 0
  config.teacher.pretrain.dropout = False
  return config
