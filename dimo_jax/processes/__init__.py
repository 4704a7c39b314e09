"""Corruption processes: schedules, masks, noise. Pure mathematics, no networks."""
