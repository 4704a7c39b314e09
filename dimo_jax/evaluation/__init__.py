"""What a sample is worth: feature network, metrics, the protocols that fix them, the report."""
