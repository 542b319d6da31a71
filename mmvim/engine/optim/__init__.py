"""Optimizers, their wrappers and constructors, and averages of weights."""

from .averaging import ExponentialMovingAverage
from .cpu_amp import CPUAmpOptimWrapper
from .lamb import Lamb
from .layer_decay import LayerDecayOptimizerConstructor

__all__ = [
    'CPUAmpOptimWrapper',
    'ExponentialMovingAverage',
    'Lamb',
    'LayerDecayOptimizerConstructor',
]
