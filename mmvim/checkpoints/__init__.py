"""Checkpoints: finding, reading, matching to a model, writing."""
