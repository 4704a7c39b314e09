"""Adversarial losses, the critic's shape and published names, f-divergence weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimo_jax.convert import critic as convert
from dimo_jax.models.critic import Critic
from dimo_jax.objectives import adversarial
from dimo_jax.types import UserError

LOGITS = np.array([-30.0, -12.0, -1.0, 0.0, 0.7, 2.0, 12.0, 30.0])


def softplus(x):
  return np.logaddexp(0, np.asarray(x, np.float64))


def test_losses_are_the_closed_form():
  real, fake = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LOGITS[::-1] / 3, jnp.float32)
  np.testing.assert_allclose(
    adversarial.generator_loss(fake), softplus(-np.asarray(fake)).mean(), rtol=1e-6
  )
  wanted = softplus(np.asarray(fake)).mean() + softplus(-np.asarray(real)).mean()
  np.testing.assert_allclose(adversarial.critic_loss(real, fake), wanted, rtol=1e-6)


def test_the_better_side_lowers_its_loss():
  low, high = jnp.full(3, -1.0), jnp.full(3, 1.0)
  assert adversarial.generator_loss(high) < adversarial.generator_loss(low)
  assert adversarial.critic_loss(high, low) < adversarial.critic_loss(low, high)


def test_r1_is_the_gradient_norm_of_autodiff():
  """A small random perturbation against derivatives: sample by sample, and in expectation."""
  w = jax.random.normal(jax.random.key(0), (6, 5))
  x = jax.random.normal(jax.random.key(1), (6,))
  alpha = 1e-2

  def critic(x):
    return jnp.sum(jnp.tanh(x @ w))

  gradient = jax.grad(critic)(x)
  noise = jax.random.normal(jax.random.key(2), (4096, 6))
  logits = jnp.full(1, critic(x))
  for n in noise[:5]:
    ours = adversarial.approximate_r1(logits, jnp.stack([critic(x + alpha * n)]))
    slope = jax.jvp(critic, (x,), (n,))[1]
    np.testing.assert_allclose(ours, (alpha * slope) ** 2, rtol=0.2, atol=1e-6)
  perturbed = jax.vmap(lambda n: critic(x + alpha * n))(noise)
  ours = adversarial.approximate_r1(jnp.full(4096, critic(x)), perturbed)
  np.testing.assert_allclose(ours / alpha**2, jnp.sum(gradient**2), rtol=0.1)


# The head.


@pytest.mark.parametrize(
  ("size", "num_stages"), [(1, 1), (2, 1), (4, 1), (7, 2), (8, 2), (16, 3), (32, 4)]
)
def test_the_head_fits_every_bottleneck(size, num_stages):
  """On 8x8 the published head of ImageNet-64 and SD 1.5, on 32x32 that of SDXL."""
  head, features = Critic(num_groups=2), jnp.ones((3, size, size, 4), jnp.bfloat16)
  params = jax.jit(head.init)(jax.random.key(0), features)["params"]
  assert sum(name.startswith("conv") for name in params) == num_stages
  assert all(params[f"conv_{i}"]["kernel"].shape[:2] == (4, 4) for i in range(num_stages - 1))
  logits = head.apply({"params": params}, features)
  assert logits.shape == (3,) and logits.dtype == jnp.float32


def test_groups_must_divide_the_channels():
  with pytest.raises(UserError, match=r"dmd2\.critic_groups=32 must divide the 48 channels"):
    Critic().init(jax.random.key(0), jnp.ones((1, 4, 4, 48)))


def test_published_names_round_trip():
  head = Critic(num_groups=2)
  params = head.init(jax.random.key(0), jnp.ones((1, 32, 32, 4)))["params"]
  tensors = convert.to_published(jax.device_get(params))
  weights = {index for index in range(13) if f"{index}.weight" in tensors}
  assert weights == {0, 1, 3, 4, 6, 7, 9, 10, 12}  # SDXL's sequence; activations have no weights
  back = convert.from_published(tensors)
  jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(params))
  tensors.pop("4.bias")
  with pytest.raises(UserError, match=r"GAN head.*missing keys 4\.bias"):
    convert.from_published(tensors)


# f-divergence weights. With densities p (real) and q (generated), r = p / q.

CLOSED_FORMS = {
  "reverse_kl": lambda p, q: 1 + 0 * p,
  "forward_kl": lambda p, q: p / q,
  "jensen_shannon": lambda p, q: p / (p + q),
  "squared_hellinger": lambda p, q: np.sqrt(p / q),
  "jeffreys": lambda p, q: (p + q) / q,
  "softened_reverse_kl": lambda p, q: q / (p + q),
  "neyman": lambda p, q: q / p,
}


def test_every_divergence_is_tested():
  assert set(CLOSED_FORMS) == set(adversarial.F_DIVERGENCES)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_weights_are_the_closed_form(name):
  rng = np.random.default_rng(0)
  p, q = rng.uniform(0.2, 1.0, (2, 16))
  weights, bins = adversarial.divergence_weights(
    name,
    jnp.asarray(np.log(p / q), jnp.float32),
    jnp.zeros(16),
    adversarial.initial_ratio_bins(),
    normalize=False,
    rate=0.0,
  )
  wanted = CLOSED_FORMS[name](p, q)
  np.testing.assert_allclose(weights, wanted / wanted.mean(), rtol=2e-5)
  np.testing.assert_array_equal(bins, np.ones(10))


# The weight of an f-divergence is r^2 f''(r) over that of reverse KL, where D = E_q f(p / q).
GENERATORS = {
  "reverse_kl": lambda r: -jnp.log(r),
  "forward_kl": lambda r: r * jnp.log(r),
  "jensen_shannon": lambda r: r * jnp.log(r) - (r + 1) * jnp.log((r + 1) / 2),
  "squared_hellinger": lambda r: 1 - jnp.sqrt(r),
  "jeffreys": lambda r: (r - 1) * jnp.log(r),
  "softened_reverse_kl": lambda r: (r + 1) * jnp.log((r + 1) / (2 * r)),
  "neyman": lambda r: 1 / r - 1,
}


@pytest.mark.parametrize("name", GENERATORS)
def test_weights_come_from_the_divergence(name):
  """f-distill, theorem 1: the gradient of D_f is the score difference times r^2 f''(r)."""
  second = jax.vmap(jax.grad(jax.grad(GENERATORS[name])))
  r = jnp.linspace(0.2, 4.0, 12)
  ratio = r**2 * second(r) / adversarial.F_DIVERGENCES[name](r)
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)  # equal up to a constant


def plain_bins(logits, position, bins, rate):
  """Ratios over their bin's running mean, one sample at a time."""
  ratio = np.clip(np.exp(np.clip(logits, -10, 10)), 0.1, 20)
  index = np.minimum((position * 10).astype(int), 9)
  bins = bins.copy()
  for k in range(10):
    members = [r for r, i in zip(ratio, index, strict=True) if i == k]
    if members:
      bins[k] = rate * bins[k] + (1 - rate) * np.mean(members)
  return ratio / bins[index], bins


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_bins_are_the_plain_loop(rate):
  rng = np.random.default_rng(1)
  bins = np.ones(10)
  ours = adversarial.initial_ratio_bins()
  for _ in range(3):
    logits, position = rng.normal(0, 2, 20), rng.uniform(0, 1, 20)
    position[:2] = 0.0, 1.0
    ratio, bins = plain_bins(logits, position, bins, rate)
    weights, ours = jax.jit(
      lambda z, p, b: adversarial.divergence_weights(
        "jensen_shannon", z, p, b, normalize=True, rate=rate
      )
    )(jnp.asarray(logits, jnp.float32), jnp.asarray(position, jnp.float32), ours)
    np.testing.assert_allclose(ours, bins, rtol=1e-5)
    wanted = ratio / (1 + ratio)
    np.testing.assert_allclose(weights, wanted / wanted.mean(), rtol=1e-5)


def test_ratios_are_clipped_and_weights_have_mean_one():
  logits = jnp.asarray(LOGITS, jnp.float32)
  weights, _ = adversarial.divergence_weights(
    "forward_kl", logits, jnp.zeros(8), jnp.ones(10), normalize=False, rate=0.0
  )
  np.testing.assert_allclose(weights.max() / weights.min(), 20 / 0.1, rtol=1e-5)
  np.testing.assert_allclose(weights.mean(), 1, rtol=1e-5)
  gradient = jax.grad(
    lambda z: adversarial.divergence_weights(
      "forward_kl", z, jnp.zeros(8), jnp.ones(10), normalize=True, rate=0.0
    )[0].sum()
  )(logits)
  np.testing.assert_array_equal(gradient, 0)  # the weight is a constant of the loss
