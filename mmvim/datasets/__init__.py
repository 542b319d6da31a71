"""Data sets and data generation, in formats that the mm libraries' own loaders read."""

import importlib.util

# The quickstart data need neither mmengine nor torch.
if importlib.util.find_spec('mmengine') is not None:
    from .random_resized_crop import RandomResizedCrop
    from .skip_failures import SkipFailures
    from .video import VideoDataset

    __all__ = ['RandomResizedCrop', 'SkipFailures', 'VideoDataset']
