"""Samplers: from a network and a condition to tokens or images."""
