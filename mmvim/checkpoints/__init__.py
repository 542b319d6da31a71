"""Checkpoints: found, read, matched to a model, written."""
