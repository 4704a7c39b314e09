"""Divergences between token distributions; the generator's gradient is their derivative.

To add one: a function with this signature, a row in DIVERGENCES that makes it from
`dimo.jeffreys_beta`, a closed-form test.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dimo_jax.types import Array, Float, choose

Divergence = Callable[[Float[Array, "b l v"], Float[Array, "b l v"]], Float[Array, "b l"]]


def forward_kl(
  fake_logits: Float[Array, "b l v"], teacher_logits: Float[Array, "b l v"]
) -> Float[Array, "b l"]:
  """KL(teacher || fake) per token, in nats; covers modes.

  Logits already include guidance and temperature; the caller applies the mask.
  Source: Di[M]O, arXiv:2503.15457, section 3.
  """
  return reverse_kl(teacher_logits, fake_logits)


def reverse_kl(
  fake_logits: Float[Array, "b l v"], teacher_logits: Float[Array, "b l v"]
) -> Float[Array, "b l"]:
  """KL(fake || teacher) per token, in nats; seeks modes.

  Logits already include guidance and temperature; the caller applies the mask.
  Source: Di[M]O, arXiv:2503.15457, section 3.
  """
  log_fake = jax.nn.log_softmax(fake_logits)
  log_teacher = jax.nn.log_softmax(teacher_logits)
  return jnp.sum(jnp.exp(log_fake) * (log_fake - log_teacher), axis=-1)


def jeffreys(beta: float) -> Divergence:
  """`(1 - beta) forward + beta reverse` per token; beta may be negative (the paper's best: -0.2).

  Source: Di[M]O, arXiv:2503.15457, section 3.
  """

  def divergence(fake_logits, teacher_logits):
    forward = forward_kl(fake_logits, teacher_logits)
    return (1 - beta) * forward + beta * reverse_kl(fake_logits, teacher_logits)

  return divergence


# Each makes its divergence from `dimo.jeffreys_beta`, which only "jeffreys" has a use for.
DIVERGENCES: dict[str, Callable[[float], Divergence]] = {
  "forward_kl": lambda beta: forward_kl,
  "reverse_kl": lambda beta: reverse_kl,
  "jeffreys": jeffreys,
}


def divergence_fn(name: str, jeffreys_beta: float) -> Divergence:
  """The divergence of a config.

  Raises:
    UserError: no such divergence.
  """
  return choose(DIVERGENCES, name, "dimo.divergence", extensible=True)(jeffreys_beta)


def logit_gradient(
  divergence: Divergence, fake_logits: Float[Array, "b l v"], teacher_logits: Float[Array, "b l v"]
) -> Float[Array, "b l v"]:
  """Derivative of the divergence with respect to the fake logits."""
  return jax.grad(lambda logits: jnp.sum(divergence(logits, teacher_logits)))(fake_logits)
