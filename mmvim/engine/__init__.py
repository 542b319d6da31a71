"""Hooks, loops and optimizer parts for mmpretrain, mmdet and mmsegmentation."""

from .hooks import (
    AverageWarmupHook,
    CheckpointHook,
    CompileHook,
    DataCheckHook,
    GraphHook,
    MesaHook,
    NonFiniteHook,
    ParameterGroupsHook,
    RunAheadHook,
    TerminationHook,
)
from .loops import EpochBasedTrainLoop, IterBasedTrainLoop
from .optim import (
    CPUAmpOptimWrapper,
    ExponentialMovingAverage,
    Lamb,
    LayerDecayOptimizerConstructor,
)

__all__ = [
    'AverageWarmupHook',
    'CPUAmpOptimWrapper',
    'CheckpointHook',
    'CompileHook',
    'DataCheckHook',
    'EpochBasedTrainLoop',
    'ExponentialMovingAverage',
    'GraphHook',
    'IterBasedTrainLoop',
    'Lamb',
    'LayerDecayOptimizerConstructor',
    'MesaHook',
    'NonFiniteHook',
    'ParameterGroupsHook',
    'RunAheadHook',
    'TerminationHook',
]
