"""Hooks, loops and optimizer parts for mmpretrain, mmdet and mmsegmentation."""

from .hooks import (
    CheckpointHook,
    CompileHook,
    DataCheckHook,
    MesaHook,
    NonFiniteHook,
    TerminationHook,
)
from .loops import EpochBasedTrainLoop, IterBasedTrainLoop
from .optim import CPUAmpOptimWrapper, LayerDecayOptimizerConstructor

__all__ = [
    'CPUAmpOptimWrapper',
    'CheckpointHook',
    'CompileHook',
    'DataCheckHook',
    'EpochBasedTrainLoop',
    'IterBasedTrainLoop',
    'LayerDecayOptimizerConstructor',
    'MesaHook',
    'NonFiniteHook',
    'TerminationHook',
]
