"""Where in an image the tokens of a scan come from."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmvim.layers import split_tokens, token_positions, window_reverse
from mmvim.models.backbones import MambaVision
from mmvim.models.utils.backbone import MambaBackbone


@dataclass(frozen=True)
class Layout:
    """How the tokens of a layer lie in the images.

    Attributes:
        size: Rows and columns of tokens.
        steps: Steps in time, None for images.
        class_tokens: Places of class tokens in the sequence.
        window: Rows and columns of the windows that are sequences of their own, or None.
    """

    size: tuple[int, int]
    steps: int | None = None
    class_tokens: tuple[int, ...] = ()
    window: tuple[int, int] | None = None

    def to_map(self, values: Tensor) -> Tensor:
        """Lay values of tokens (sequences, length) out as (batch, [steps,] rows, columns)."""
        if self.window is not None:
            windows = math.prod(-(-s // w) for s, w in zip(self.size, self.window, strict=True))
            batch = values.shape[0] // windows
            return window_reverse(values.unsqueeze(-1), self.window, batch, self.size)[:, 0]
        values, _ = split_tokens(values.unsqueeze(-1), self.class_tokens)
        steps = () if self.steps is None else (self.steps,)
        return values[..., 0].unflatten(1, (*steps, *self.size))

    def to_rows(self, matrices: Tensor) -> Tensor:
        """One value for each token out of (sequences, length, length), outputs by inputs.

        Where there are class tokens, what they read (their mean); else what is read on average.
        """
        if self.class_tokens:
            return matrices[:, list(self.class_tokens)].mean(1)
        return matrices.mean(1)


def backbone_of(model: nn.Module) -> nn.Module:
    """The backbone of a model of a task library, or the model itself.

    Raises:
        ValueError: It is none of mmvim's.
    """
    backbone = getattr(model, 'backbone', model)
    if not isinstance(backbone, MambaBackbone | MambaVision):
        raise ValueError(f'{type(backbone).__name__} is no backbone of mmvim')
    return backbone


def layout_of(backbone: nn.Module, shape: Sequence[int], layer: str) -> Layout:
    """The layout of a layer.

    Args:
        backbone: Vim, VideoMamba or MambaVision.
        shape: Of the backbone's input, (batch, channels, [frames,] height, width).
        layer: Name of a module in it.

    Raises:
        ValueError: The layer of a MambaVision is in none of its stages of windows.
    """
    height, width = shape[-2:]
    if isinstance(backbone, MambaVision):
        match = re.search(r'levels\.(\d+)', layer)
        stage = int(match[1]) if match else -1
        if stage < 0 or not backbone.levels[stage].windowed:
            raise ValueError(f'{layer!r} is in no stage that has tokens: levels.2 or levels.3')
        size = (height, width)
        for _ in range(2 + stage):
            size = tuple((side + 1) // 2 for side in size)
        return Layout(size, window=backbone.levels[stage].window or size)
    size = backbone.patch_embed.grid(height, width)
    steps = backbone.patch_embed.steps(shape[2]) if len(shape) == 5 else None
    patches = math.prod(size) * (steps or 1)
    return Layout(size, steps, token_positions(backbone.cls_token_place, patches))


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (..., rows, columns) bilinearly to an image's height and width."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    large = torch.nn.functional.interpolate(flat, size, mode='bilinear', align_corners=False)
    return large.reshape(*maps.shape[:-2], *size)
