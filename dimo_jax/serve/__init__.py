"""A page to draw with: what is asked for, how it is batched, and the web application."""
