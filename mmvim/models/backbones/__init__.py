"""Backbones: one file per paper."""

from .mambavision import MambaVision
from .videomamba import VideoMamba
from .vim import Vim

__all__ = ['MambaVision', 'VideoMamba', 'Vim']
