"""Hooks of the training and test loops."""

from .checkpoint import CheckpointHook
from .data_check import DataCheckHook
from .mesa import MesaHook

__all__ = ['CheckpointHook', 'DataCheckHook', 'MesaHook']
