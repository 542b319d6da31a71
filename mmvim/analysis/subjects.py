"""Models and pictures for the analysis tools."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from PIL import Image, ImageOps
from torch import Tensor, nn

from mmvim.apis.inferencers.common import find_images
from mmvim.apis.inferencers.pipeline import InferencePipeline, displayable
from mmvim.apis.inputs import DEFAULT_SIDE
from mmvim.apis.model_zoo import get_model
from mmvim.apis.videos import SUFFIXES as VIDEO_SUFFIXES
from mmvim.apis.videos import find_videos
from mmvim.datasets.video import open_video, uniform_indices
from mmvim.errors import UserError
from mmvim.models.backbones.base import Backbone


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


def read_subject(
    cfg: Config,
    model: nn.Module,
    path: str,
    shape: Sequence[int] | None = None,
    frames: int | None = None,
) -> tuple[np.ndarray, Tensor]:
    """Read what a model is to look at, as ``tools/test.py`` does.

    Args:
        cfg: The model's config, whose test pipeline is run.
        model: The model, whose data preprocessor is run.
        path: An image; for a video model a video, or an image used as a still video.
        shape: Height and width to which the image or the frames are resized instead of what the
            pipeline makes of them.
        frames: Evenly spread frames of a video. Defaults to None: ``path`` is an image.

    Returns:
        The picture as the model sees it, before normalisation, RGB uint8 (height, width, 3), or
        (frames, height, width, 3) with ``frames``; and the model's input, (1, channels, height,
        width) or (1, channels, frames, height, width).

    Raises:
        mmvim.errors.SampleError: The file cannot be read.
        mmvim.errors.UserError: It is a folder of several.
    """
    if frames is not None:
        picture = _read_frames(path, size_for(model, shape), frames)
        data = {'inputs': [torch.from_numpy(picture).permute(3, 0, 1, 2)]}
        return picture, _preprocessed(model, data)
    found = _only(find_images(path), path)
    data = InferencePipeline(cfg, size_for(model, shape) if shape else None)(found)
    inputs = _preprocessed(model, pseudo_collate([data]))
    seen = data['inputs']
    # Data preprocessors of detectors and segmentors pad on the right and below.
    missing = [side - given for side, given in zip(inputs.shape[-2:], seen.shape[-2:], strict=True)]
    seen = torch.nn.functional.pad(seen, (0, missing[1], 0, missing[0]))
    return displayable(seen.permute(1, 2, 0).numpy())[..., ::-1].copy(), inputs


def _read_frames(path: str, size: tuple[int, int], frames: int) -> np.ndarray:
    import cv2

    if Path(path).suffix.lower() in VIDEO_SUFFIXES or Path(path).is_dir():
        found = _only(find_videos(path), path)
        with open_video(found) as video:
            taken = uniform_indices(len(video), frames, num_clips=1)[0]
            pictures = video.frames(taken).permute(0, 2, 3, 1).numpy()
    else:
        found = _only(find_images(path), path)
        with Image.open(found) as image:
            pictures = [np.asarray(ImageOps.exif_transpose(image).convert('RGB'))] * frames
    resized = [
        cv2.resize(np.ascontiguousarray(x), size[::-1], interpolation=cv2.INTER_AREA)
        for x in pictures
    ]
    return np.stack(resized)


def _only(found: list, path: str) -> str:
    if len(found) > 1:
        raise UserError(f'{path!r} has {len(found)} files: name one, such as {str(found[0])!r}')
    return found[0]


def _preprocessed(model: nn.Module, data: dict) -> Tensor:
    inputs = model.data_preprocessor(data, False)['inputs']
    return torch.stack(list(inputs)) if isinstance(inputs, (list, tuple)) else inputs
