"""Sources of labelled images, and batches as a function of seed and step."""
