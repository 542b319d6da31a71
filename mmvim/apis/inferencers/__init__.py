"""Inference: the three libraries' inferencers, for mmvim's models and checkpoints, and videos."""

from typing import Any

from mmvim.compat import require

_SCOPES = {
    'mmpretrain': ('classification', 'ClassificationInferencer'),
    'mmdet': ('detection', 'DetectionInferencer'),
    'mmseg': ('segmentation', 'SegmentationInferencer'),
}
_MODULES = {name: module for module, name in _SCOPES.values()} | {'VideoInferencer': 'video'}
__all__ = [
    'ClassificationInferencer',
    'DetectionInferencer',
    'SegmentationInferencer',
    'VideoInferencer',
    'make_inferencer',
]


def __getattr__(name: str) -> object:
    """Import the library whose inferencer is used, and no other."""
    if name in _MODULES:
        import importlib

        return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def make_inferencer(model: Any, weights: Any = None, device: Any = None) -> Any:
    """Make the inferencer that a config's task library needs, or one for videos if it reads them.

    Args:
        model: A name of the model zoo, the path of a config, or a config.
        weights: Path or URL of a checkpoint; True takes the authors' weights of a name. Defaults to
            None: random weights, with a warning.
        device: Defaults to None: the first accelerator, else the CPU.

    Raises:
        ValueError: The config's ``default_scope`` is none of the three libraries.
        ImportError: The library is not installed.
    """
    from ..model_zoo import load_config

    cfg = load_config(model)
    scope = cfg.get('default_scope')
    if scope not in _SCOPES:
        raise ValueError(
            f'default_scope of the config is {scope!r}; there are inferencers for '
            f'{", ".join(_SCOPES)}'
        )
    module, name = _SCOPES[scope]
    require(scope, f'{module} inference')
    if scope == 'mmpretrain':
        from .video import VideoInferencer, reads_videos

        if reads_videos(cfg):
            return VideoInferencer(model, weights, device)
    return __getattr__(name)(model, weights, device=device)
