"""The simple feature pyramid of ViTDet.

Li, Mao, Girshick and He: Exploring Plain Vision Transformer Backbones for Object Detection, ECCV
2022, https://arxiv.org/abs/2203.16527.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmvim._checks import check_number, check_positive
from mmvim.layers import LayerNorm2d
from mmvim.layers.norm import AutocastLayerNorm2d


class SimpleFPN(BaseModule):
    """Feature pyramid from one map.

    From a map of stride 16, branches of scale 4, 2, 1 and 1/2 make maps of stride 4, 8, 16 and 32
    (P2 .. P5) by transposed convolutions of stride 2, the identity, or max pooling over 2 x 2. Each
    map then passes through a 1 x 1 and a 3 x 3 convolution, each followed by a layer norm over the
    channels. Further levels halve the last one (P6).

    Args:
        in_channels (int): Channels of the map. Defaults to 192.
        out_channels (int): Channels of each level. Defaults to 256.
        num_outs (int): Number of levels, at least ``4 - start_level``. Defaults to 5.
        start_level (int): The first level, 0 (P2) to 3 (P5). RetinaNet's P3 .. P7 are
            ``start_level=1, num_outs=5``. Defaults to 0.
        norm_eps (float): Epsilon of the norms. Defaults to 1e-6.
        init_cfg (dict, optional): As in :class:`mmengine.model.BaseModule`.

    Raises:
        ValueError: If an argument is invalid.
    """

    def __init__(
        self,
        in_channels: int = 192,
        out_channels: int = 256,
        num_outs: int = 5,
        start_level: int = 0,
        norm_eps: float = 1e-6,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        check_positive(in_channels=in_channels, out_channels=out_channels, num_outs=num_outs)
        check_number('norm_eps', norm_eps, 0)
        if in_channels % 4:
            raise ValueError(f'in_channels={in_channels!r} must be a multiple of 4')
        if not isinstance(start_level, int) or not 0 <= start_level < 4:
            raise ValueError(f'start_level={start_level!r} must be 0, 1, 2 or 3')
        if num_outs < 4 - start_level:
            raise ValueError(f'num_outs={num_outs!r} must be at least {4 - start_level}')
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_outs = num_outs
        self.start_level = start_level
        half, quarter = in_channels // 2, in_channels // 4
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(in_channels, half, 2, stride=2),
                    LayerNorm2d(half, eps=norm_eps),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                ),
                nn.ConvTranspose2d(in_channels, half, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ][start_level:]
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, bias=False),
                AutocastLayerNorm2d(out_channels, eps=norm_eps),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels, eps=norm_eps),
            )
            for channels in (quarter, half, in_channels, in_channels)[start_level:]
        )

    def forward(self, x: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Build the pyramid.

        Args:
            x (Tensor | Sequence[Tensor]): The map (batch, in_channels, rows, columns), or a
                sequence that contains only it, as returned by a backbone.

        Returns:
            tuple[Tensor, ...]: ``num_outs`` maps (batch, out_channels, …), finest first.

        Raises:
            ValueError: If there is more than one map or its shape is wrong.
        """
        if not isinstance(x, Tensor):
            if len(x) != 1:
                raise ValueError(
                    f'SimpleFPN wants one map, got {len(x)}: set out_indices to one layer'
                )
            x = x[0]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'SimpleFPN wants (batch, {self.in_channels}, rows, columns), got {tuple(x.shape)}'
            )
        levels = [out(scale(x)) for scale, out in zip(self.scales, self.outputs, strict=True)]
        while len(levels) < self.num_outs:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return tuple(levels)
