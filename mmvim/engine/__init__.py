"""Launcher, hooks and optimizer parts for mmpretrain, mmdet and mmsegmentation alike."""

from .hooks import CheckpointHook, DataCheckHook, MesaHook
from .optim import CPUAmpOptimWrapper, LayerDecayOptimizerConstructor

__all__ = [
    'CPUAmpOptimWrapper',
    'CheckpointHook',
    'DataCheckHook',
    'LayerDecayOptimizerConstructor',
    'MesaHook',
]
