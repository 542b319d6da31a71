"""Patch embedding and temporal position embedding of videos."""

import torch.nn.functional as F
from torch import Tensor, nn

from mmvim._checks import check_positive
from mmvim.ops._library import as_compute_dtype

from .fusion import parts
from .patch_embed import PatchEmbed


class TubeletEmbed(PatchEmbed):
    """Division of a video into tubelets, each embedded by one linear map.

    A tubelet is ``tubelet_size`` frames long and as wide and high as a patch. Tubelets do not
    overlap in time.

    Args:
        in_channels (int): Channels of a frame. Defaults to 3.
        embed_dims (int): Channels of a tubelet's embedding. Defaults to 192.
        patch_size (int | tuple): Side of a tubelet in pixels. Defaults to 16.
        stride (int | tuple, optional): Distance between patches. Defaults to None:
            ``patch_size``.
        tubelet_size (int): Frames of a tubelet. Defaults to 1.
    """

    _fused_parts = parts(proj=nn.Conv3d)

    def __init__(
        self,
        in_channels: int = 3,
        embed_dims: int = 192,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        tubelet_size: int = 1,
    ) -> None:
        super().__init__(in_channels, embed_dims, patch_size, stride)
        check_positive(tubelet_size=tubelet_size)
        self.tubelet_size = tubelet_size
        self.proj = nn.Conv3d(
            in_channels,
            embed_dims,
            (tubelet_size, *self.patch_size),
            (tubelet_size, *self.stride),
        )

    def reset_parameters(self) -> None:
        """Initialise as :class:`torch.nn.Conv3d` does, as in the official VideoMamba."""
        self.proj.reset_parameters()

    def steps(self, frames: int) -> int:
        """Tubelets along ``frames`` frames.

        Raises:
            ValueError: If the frames do not fill the tubelets.
        """
        if frames < 1 or frames % self.tubelet_size:
            raise ValueError(
                f'the video has {frames} frames, which is no positive multiple of '
                f'tubelet_size={self.tubelet_size}'
            )
        return frames // self.tubelet_size

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed videos.

        Args:
            x (Tensor): (batch, in_channels, frames, height, width).

        Returns:
            tuple: Tokens (batch, frames / tubelet_size, rows * columns, embed_dims), each frame in
            raster order, and (rows, columns).

        Raises:
            ValueError: If the shape is wrong, a frame is smaller than a patch, or the number of
                frames is not a multiple of ``tubelet_size``.
        """
        if x.dim() != 5 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'the input must be (batch, {self.in_channels}, frames, height, width), '
                f'got {tuple(x.shape)}'
            )
        self.steps(x.shape[2])
        grid = self.grid(x.shape[3], x.shape[4])
        return self._embed(x).flatten(2, 3), grid


def resize_temporal_pos_embed(pos_embed: Tensor, length: int) -> Tensor:
    """Resize a temporal position embedding (1, steps, dim) to ``length`` steps, linearly.

    Returns:
        Tensor: (1, length, dim) in the dtype of ``pos_embed``.
    """
    if pos_embed.shape[1] == length:
        return pos_embed
    series = as_compute_dtype(pos_embed).transpose(1, 2)
    series = F.interpolate(series, size=length, mode='linear', align_corners=False)
    return series.transpose(1, 2).to(pos_embed.dtype)
