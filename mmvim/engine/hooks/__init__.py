"""Hooks of the training and test loops."""

from .average_warmup import AverageWarmupHook
from .checkpoint import CheckpointHook
from .compile import CompileHook
from .data_check import DataCheckHook
from .graph import GraphHook
from .mesa import MesaHook
from .non_finite import NonFiniteHook
from .parameter_groups import ParameterGroupsHook
from .run_ahead import RunAheadHook
from .termination import Terminated, TerminationHook
from .weights import WeightsHook

__all__ = [
    'AverageWarmupHook',
    'CheckpointHook',
    'CompileHook',
    'DataCheckHook',
    'GraphHook',
    'MesaHook',
    'NonFiniteHook',
    'ParameterGroupsHook',
    'RunAheadHook',
    'Terminated',
    'TerminationHook',
    'WeightsHook',
]
