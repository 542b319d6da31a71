"""Inferencers: those of the three libraries for mmvim's models, and one for videos."""

from typing import Any

from mmvim import _names
from mmvim.compat import require

_SCOPES = {
    'mmpretrain': ('classification', 'ClassificationInferencer'),
    'mmdet': ('detection', 'DetectionInferencer'),
    'mmseg': ('segmentation', 'SegmentationInferencer'),
}
_NAMES = {name: f'{__name__}.{module}' for module, name in _SCOPES.values()}
_NAMES['VideoInferencer'] = f'{__name__}.video'
# Only the library whose inferencer is used is imported.
__getattr__, __dir__, __all__ = _names.lazily(__name__, _NAMES)
__all__ += ['make_inferencer']


def make_inferencer(model: Any, weights: Any = None, device: Any = None) -> Any:
    """Make the inferencer of a config's task library, or the one for videos if it reads them.

    Args:
        model: A name from the model zoo, the path of a config, or a config.
        weights: Path or URL of a checkpoint; True takes the authors' weights of the model. Defaults
            to None: random weights, with a warning.
        device: The device. Defaults to None: the first accelerator, else the CPU.

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
        from .pipeline import reads_videos
        from .video import VideoInferencer

        if reads_videos(cfg):
            return VideoInferencer(model, weights, device)
    return __getattr__(name)(model, weights, device=device)
