"""Native input shapes of a config's model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope
from torch import nn
from torch.nn.modules.conv import _ConvNd

from mmvim._configs import type_name

from .inferencers.pipeline import InferencePipeline, transforms_of

DEFAULT_SIDE = 224
# Pictures of two shapes: a pipeline with one size for both has it for all.
_TRIALS = ((96, 160), (192, 128))


def input_channels(model: nn.Module) -> int:
    """Channels of a model's images: those of its backbone's first convolution, else 3."""
    modules = getattr(model, 'backbone', model).modules()
    return next((m.in_channels for m in modules if isinstance(m, _ConvNd)), 3)


def input_frames(model: nn.Module) -> int | None:
    """Frames of a video model's clips; None for an image model."""
    return getattr(getattr(model, 'backbone', model), 'num_frames', None)


def input_size(cfg: Config, model: nn.Module) -> tuple[int, int]:
    """Height and width of a model's images.

    The size to which the config's test pipeline resizes every picture; if pictures keep their own
    sizes, the backbone's ``img_size`` or the data preprocessor's ``size``; else 224.
    """
    sizes = [_size_after(cfg, model, shape) for shape in _TRIALS]
    if sizes[0] is not None and sizes[0] == sizes[1]:
        return sizes[0]
    backbone = getattr(model, 'backbone', model)
    size = getattr(backbone, 'img_size', None)
    return size or getattr(model.data_preprocessor, 'size', None) or (DEFAULT_SIDE, DEFAULT_SIDE)


def input_shape(
    cfg: Config,
    model: nn.Module,
    *,
    size: Sequence[int] | None = None,
    frames: int | None = None,
) -> tuple[int, ...]:
    """Shape of a model's input without the batch: (channels, [frames,] height, width).

    Args:
        cfg: The model's config.
        model: The model.
        size: Height and width, or one side of a square. Defaults to None: :func:`input_size`.
        frames: Frames of a video. Defaults to None: :func:`input_frames`.
    """
    frames = frames or input_frames(model)
    height, width = (size[0], size[-1]) if size else input_size(cfg, model)
    return (input_channels(model), *((frames,) if frames else ()), height, width)


def _size_after(cfg: Config, model: nn.Module, shape: tuple[int, int]) -> tuple[int, int] | None:
    """Height and width of a picture of a shape after the test pipeline; None without one."""
    transforms = transforms_of(cfg)
    preprocess = getattr(model, 'data_preprocessor', None)
    if not transforms or preprocess is None:
        return None
    channels = input_channels(model)
    if type_name(transforms[0]) == 'LoadVideo':
        frames = input_frames(model) or 1
        clip = torch.zeros(1, frames, channels, *shape, dtype=torch.uint8)
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            sample: Any = Compose(transforms[1:])({'frames': clip, 'img_path': ''})
    else:
        sample = InferencePipeline(cfg)(np.zeros((*shape, channels), np.uint8))
    inputs = preprocess(pseudo_collate([sample]), False)['inputs']
    return tuple((inputs[0] if isinstance(inputs, (list, tuple)) else inputs).shape[-2:])
