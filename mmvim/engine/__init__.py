"""Hooks, loops and optimizer parts for mmpretrain, mmdet and mmsegmentation."""

from . import hooks, optim
from .hooks import *  # noqa: F403
from .loops import EpochBasedTrainLoop, IterBasedTrainLoop
from .optim import *  # noqa: F403

__all__ = [*hooks.__all__, *optim.__all__, 'EpochBasedTrainLoop', 'IterBasedTrainLoop']
