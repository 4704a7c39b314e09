"""Train states: networks with their trainable and frozen parts, and the whole of each stage."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util
from flax.training import train_state

from dimo_jax.types import Array, Bool, Condition, Int, Params, UserError, check_pattern


def split(params: Params, frozen: Sequence[str]) -> tuple[Params, Params]:
  """Splits a tree into (trainable, frozen) by regexes on the leaves' `a/b/c` paths.

  Raises:
    UserError: a regex matches nothing, or nothing is left to train.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  for pattern in frozen:
    check_pattern(pattern, "optim.frozen")
    if not any(re.search(pattern, path) for path in flat):
      raise UserError(
        f"optim.frozen={pattern!r} matches no parameter; paths look like {next(iter(flat))}"
      )
  is_frozen = {path: any(re.search(pattern, path) for pattern in frozen) for path in flat}
  if all(is_frozen.values()):
    raise UserError(f"optim.frozen={tuple(frozen)} leaves nothing to train")
  trainable = {path: leaf for path, leaf in flat.items() if not is_frozen[path]}
  rest = {path: leaf for path, leaf in flat.items() if is_frozen[path]}
  return traverse_util.unflatten_dict(trainable, sep="/"), traverse_util.unflatten_dict(
    rest, sep="/"
  )


def merge(trainable: Params, frozen: Params) -> Params:
  """The inverse of `split`."""
  flat = traverse_util.flatten_dict(trainable) | traverse_util.flatten_dict(frozen)
  return traverse_util.unflatten_dict(flat)


class NetworkState(train_state.TrainState):
  """A Flax TrainState whose `params` are the trainable part; `frozen` has neither gradient nor
  moments.

  Attributes:
    apply_fn: `(params, inputs, condition, **options) -> outputs`, with the whole parameter tree.
      Masked: a token grid to logits. Gaussian: a `Noised` to x0, or with output="bottleneck" to the
      encoder's features, with "both" to the pair. Other options are random draws.
    null_fn: the network's own unconditional condition, given a condition.
    autoencoder: parameters of the tokenizer or autoencoder (the teacher's state only).
    skipped, skipped_in_a_row: updates left out so far, and since the last one that was not.
  """

  frozen: Params = struct.field(default_factory=dict)
  autoencoder: Params = struct.field(default_factory=dict)
  null_fn: Callable[[Condition], Condition] = struct.field(pytree_node=False, default=lambda c: c)
  skipped: Int[Array, ""] | int = 0
  skipped_in_a_row: Int[Array, ""] | int = 0

  @property
  def all_params(self) -> Params:
    """Trainable and frozen parameters in one tree."""
    return merge(self.params, self.frozen)

  def predict(self, inputs: Any, condition: Condition, **options: Any) -> Array:
    """Applies the network with this state's parameters to tokens or a noised image."""
    return self.apply_fn(self.all_params, inputs, condition, **options)

  def apply_gradients(  # type: ignore[override] # schedules need the clock
    self,
    *,
    grads: Params,
    clock: Int[Array, ""] | int,
    sound: Bool[Array, ""] | bool = True,
    **kwargs: Any,
  ) -> "NetworkState":
    """One optimiser update at a clock (see `optim.scale_by_clock`).

    One that is not `sound` is skipped: parameters and moments stay, `step` moves on.
    """
    updates, opt_state = self.tx.update(grads, self.opt_state, self.params, clock=clock)
    new = optax.apply_updates(self.params, updates), opt_state
    params, opt_state = optax.tree.where(sound, new, (self.params, self.opt_state))
    return self.replace(
      step=self.step + 1,
      params=params,
      opt_state=opt_state,
      skipped=jnp.where(sound, self.skipped, self.skipped + 1),
      skipped_in_a_row=jnp.where(sound, 0, self.skipped_in_a_row + 1),
      **kwargs,
    )


class Nets(struct.PyTreeNode):
  """The three networks that an objective's losses see."""

  generator: NetworkState
  fake_score: NetworkState
  teacher: NetworkState


class PretrainState(struct.PyTreeNode):
  """The teacher's pre-training: network, average, updates done (`network.step`)."""

  network: NetworkState
  ema: Params

  @classmethod
  def create(cls, network: NetworkState) -> "PretrainState":
    """That of step 0."""
    return cls(network, copy_tree(network.params))


class DistillState(struct.PyTreeNode):
  """What one distillation iteration changes, and a checkpoint holds.

  Attributes:
    generator, fake_score: the two trained networks; `generator.step` counts generator updates.
    ema: average of the generator's trainable parameters, float32.
    clock: fake-score updates done; every schedule follows it.
    extra: the objective's own small state; empty for most.
  """

  generator: NetworkState
  fake_score: NetworkState
  ema: Params
  clock: Int[Array, ""]
  extra: Any

  @classmethod
  def create(cls, generator: NetworkState, fake_score: NetworkState, extra: Any) -> "DistillState":
    """That of step 0."""
    return cls(
      generator=generator,
      fake_score=fake_score,
      ema=copy_tree(generator.params),
      clock=jnp.zeros((), jnp.int32),
      extra=extra,
    )

  @property
  def ema_params(self) -> Params:
    """The averaged generator, whole."""
    return merge(self.ema, self.generator.frozen)


class FirstStage(NamedTuple):
  """Weights that a distillation starts from, in place of the teacher's."""

  generator: Params
  score: Params


def all_finite(tree: Any) -> Bool[Array, ""]:
  """Whether a tree of numbers holds neither NaN nor infinity."""
  finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
  return functools.reduce(jnp.logical_and, finite, jnp.asarray(True))


def copy_tree(tree: Any) -> Any:
  """A tree with buffers of its own: donation must never meet one buffer twice."""
  return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
