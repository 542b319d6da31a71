"""Hooks of the training and test loops."""

from .checkpoint import CheckpointHook
from .compile import CompileHook
from .data_check import DataCheckHook
from .mesa import MesaHook
from .non_finite import NonFiniteHook
from .termination import Terminated, TerminationHook
from .weights import WeightsHook

__all__ = [
    'CheckpointHook',
    'CompileHook',
    'DataCheckHook',
    'MesaHook',
    'NonFiniteHook',
    'Terminated',
    'TerminationHook',
    'WeightsHook',
]
