"""Hooks of the training and test loops."""

from .checkpoint import CheckpointHook
from .data_check import DataCheckHook

__all__ = ['CheckpointHook', 'DataCheckHook']
