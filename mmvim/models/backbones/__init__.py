"""Backbones: one file per paper."""

from .vim import Vim

__all__ = ['Vim']
