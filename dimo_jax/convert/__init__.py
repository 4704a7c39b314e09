"""Published checkpoints to and from linen trees, one file per family. Never executes a pickle."""
