"""One-step generators by distribution-matching distillation, in JAX and Flax."""
