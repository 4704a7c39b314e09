"""ml_collections config files: base.py holds every field once, presets only override."""
