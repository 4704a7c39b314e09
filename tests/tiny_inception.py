"""A small linear network in Inception's place: a handful of features, and no weights to fetch."""

import jax
import jax.numpy as jnp
import numpy as np

from dimo_jax.evaluation import extraction, inception

SIZES = {"2048": 6, "spatial": 5, "logits_unbiased": 4}


def network(side: int) -> inception.Inception:
  """Its weights, for RGB images of `side` pixels."""
  random = np.random.default_rng(7)
  params = {name: random.normal(size=(side * side * 3, size)) / 20 for name, size in SIZES.items()}
  return inception.Inception(params, "abc", published=True)


def features(params, levels, resize_name, taps):
  """In place of `extraction._features`."""
  del resize_name
  rows = levels.reshape(len(levels), -1).astype(jnp.float32) / 255
  return {tap: jnp.tanh(rows @ params[tap].astype(jnp.float32)) for tap in taps}


def install(monkeypatch) -> None:
  """Puts it in place for one test."""
  for name, size in SIZES.items():
    monkeypatch.setitem(inception.TAPS, name, size)
  monkeypatch.setattr(extraction, "_features", jax.jit(features, static_argnums=(2, 3)))
