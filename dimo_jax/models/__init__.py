"""Flax linen networks. No training logic and no device names."""
