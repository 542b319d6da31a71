"""Classifiers that mmpretrain lacks."""

from mmvim import _names

__getattr__, __dir__, __all__ = _names.lazily(__name__)
