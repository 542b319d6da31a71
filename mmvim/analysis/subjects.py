"""Models and pictures for the analysis tools."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmvim.apis.inferencers.common import find_images, read_image
from mmvim.apis.model_zoo import get_model
from mmvim.apis.videos import SUFFIXES as VIDEO_SUFFIXES
from mmvim.apis.videos import find_videos
from mmvim.models.backbones.base import Backbone

DEFAULT_SIDE = 224


def backbone_of(model: nn.Module) -> Backbone:
    """The backbone of a model of a task library, or the model itself.

    Raises:
        ValueError: It is not a backbone of mmvim.
    """
    backbone = getattr(model, 'backbone', model)
    if not isinstance(backbone, Backbone):
        raise ValueError(f'{type(backbone).__name__} is no backbone of mmvim')
    return backbone


def open_model(cfg: Config, weights: Any = None, **backbone: Any) -> nn.Module:
    """Build the model of a config for analysis, with changes to its backbone.

    Args:
        cfg: A config.
        weights: Path or URL of a checkpoint. Defaults to None: random weights.
        **backbone: Arguments of the backbone to change.

    Raises:
        ValueError: The backbone is not one of mmvim's.
    """
    model = get_model(cfg, weights or False, **({'backbone': backbone} if backbone else {}))
    backbone_of(model)
    return model


def size_for(model: nn.Module, shape: Sequence[int] | None = None) -> tuple[int, int]:
    """Height and width of the pictures: as requested, else the backbone's native size."""
    if shape:
        return shape[0], shape[-1]
    return getattr(backbone_of(model), 'img_size', (DEFAULT_SIDE, DEFAULT_SIDE))


def read_picture(path: str, size: tuple[int, int], frames: int | None = None) -> np.ndarray:
    """Read an image, or evenly spread frames of a video, and resize.

    Args:
        path: A file.
        size: Height and width.
        frames: Number of frames of a video. Defaults to None: ``path`` is an image.

    Returns:
        RGB (height, width, 3), or (frames, height, width, 3), uint8.

    Raises:
        mmvim.errors.SampleError: The file cannot be read.
    """
    import cv2

    height, width = size
    if frames is None:
        (found,) = find_images(path)
        pictures = [read_image(found)[..., ::-1]]
    elif Path(path).suffix.lower() in VIDEO_SUFFIXES:
        from mmvim.datasets.video import VideoReader, uniform_indices

        (found,) = find_videos(path)
        with VideoReader(found) as video:
            taken = uniform_indices(len(video), frames, num_clips=1)[0]
            pictures = video.frames(taken).permute(0, 2, 3, 1).numpy()
    else:
        pictures = [read_picture(path, size)] * frames
    resized = [
        cv2.resize(np.ascontiguousarray(x), (width, height), interpolation=cv2.INTER_AREA)
        for x in pictures
    ]
    return resized[0] if frames is None else np.stack(resized)


def to_input(model: nn.Module, picture: np.ndarray) -> Tensor:
    """Preprocess a picture of :func:`read_picture` as the model's data preprocessor does."""
    pixels = torch.from_numpy(np.ascontiguousarray(picture))
    if picture.ndim == 4:
        data = {'inputs': [pixels.permute(3, 0, 1, 2)]}
    else:
        # Image pipelines produce BGR.
        data = {'inputs': [pixels.flip(-1).permute(2, 0, 1)]}
    inputs = model.data_preprocessor(data, False)['inputs']
    return torch.stack(list(inputs)) if isinstance(inputs, list | tuple) else inputs
