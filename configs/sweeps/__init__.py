"""Sweeps: settings run over several seeds, beside the presets they start from."""
