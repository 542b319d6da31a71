"""Backbones: one file per paper."""

from .mambavision import MambaVision
from .vim import Vim

__all__ = ['MambaVision', 'Vim']
