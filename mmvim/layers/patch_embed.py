"""Patch embedding of images."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmvim._checks import check_positive
from mmvim.ops._autocast import autocast_dtype

from .fusion import Fusable, parts


def to_2tuple(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Return ``value`` as (height, width); raises ValueError unless both are positive."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in pair):
        raise ValueError(f'{name}={value!r} must be a positive integer or a pair of them')
    return pair


def _matrix_product(x: Tensor, proj: nn.Conv2d | nn.Conv3d) -> Tensor:
    size = proj.kernel_size
    steps = [side // step for side, step in zip(x.shape[2:], size, strict=True)]
    for axis, (count, step) in enumerate(zip(steps, size, strict=True), start=2):
        x = x.narrow(axis, 0, count * step)
    x = x.reshape(*x.shape[:2], *(n for pair in zip(steps, size, strict=True) for n in pair))
    axes = range(2, x.dim())
    x = x.permute(0, *axes[::2], 1, *axes[1::2])
    # One pass casts and gathers.
    patches = torch.empty(x.shape, dtype=autocast_dtype(x) or x.dtype, device=x.device).copy_(x)
    return F.linear(patches.flatten(1 + len(size)), proj.weight.flatten(1), proj.bias)


class PatchEmbed(Fusable):
    """Division of an image into patches, each embedded by one linear map.

    Patches do not extend beyond the image: rows and columns that do not fill a patch are ignored,
    so a side of ``n`` pixels yields ``(n - patch_size) // stride + 1`` patches.

    Args:
        in_channels (int): Channels of the image. Defaults to 3.
        embed_dims (int): Channels of a patch's embedding. Defaults to 192.
        patch_size (int | tuple): Side of a patch in pixels. Defaults to 16.
        stride (int | tuple, optional): Distance between patches, which overlap if it is smaller
            than ``patch_size``. Defaults to None: ``patch_size``.
    """

    _fused_parts = parts(proj=nn.Conv2d)

    def __init__(
        self,
        in_channels: int = 3,
        embed_dims: int = 192,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, embed_dims=embed_dims)
        self.in_channels = in_channels
        self.patch_size = to_2tuple('patch_size', patch_size)
        self.stride = self.patch_size if stride is None else to_2tuple('stride', stride)
        self.proj = nn.Conv2d(in_channels, embed_dims, self.patch_size, self.stride)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LeCun-normal weight and zero bias, as in the official Vim."""
        # Truncation at two standard deviations leaves 0.8796 of the deviation.
        fan_in = self.in_channels * math.prod(self.patch_size)
        std = fan_in**-0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.proj.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.proj.bias)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of ``height`` x ``width`` pixels.

        Raises:
            ValueError: If the image is smaller than a patch.
        """
        size, patch, stride = (height, width), self.patch_size, self.stride
        if height < patch[0] or width < patch[1]:
            raise ValueError(
                f'the image is {height}x{width} pixels, smaller than a patch of '
                f'{patch[0]}x{patch[1]}'
            )
        rows, columns = ((size[i] - patch[i]) // stride[i] + 1 for i in range(2))
        return rows, columns

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed images.

        Args:
            x (Tensor): (batch, in_channels, height, width).

        Returns:
            tuple: Tokens (batch, rows * columns, embed_dims) in raster order, and (rows, columns).

        Raises:
            ValueError: If the shape is wrong or the image is smaller than a patch.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'the input must be (batch, {self.in_channels}, height, width), '
                f'got {tuple(x.shape)}'
            )
        grid = self.grid(x.shape[2], x.shape[3])
        return self._embed(x).flatten(1, 2), grid

    def _is_plain(self, *names: str) -> bool:
        proj = self.proj
        return (
            super()._is_plain(*names)
            and proj.kernel_size == proj.stride
            and not any(proj.padding)
            and set(proj.dilation) == {1}
            and proj.groups == 1
        )

    def _embed(self, x: Tensor) -> Tensor:
        """Apply the convolution to (batch, channels, …) as a layer of tokens (batch, …, channels).

        On a CUDA device a convolution whose windows neither overlap nor skip is one matrix product:
        for patches of 16 pixels cuDNN's choices take several times as long.
        """
        proj = self.proj
        if x.is_cuda and self._is_plain():
            return _matrix_product(x, proj)
        return proj(x).movedim(1, -1)
