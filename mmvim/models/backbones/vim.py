"""Vision Mamba (Vim).

Zhu, Liao, Zhang, Wang, Liu and Wang: Vision Mamba: Efficient Visual Representation Learning with
Bidirectional State Space Model, ICML 2024, https://arxiv.org/abs/2401.09417. Official code:
https://github.com/hustvl/Vim (Apache-2.0). This is a new implementation that reads the official
checkpoints.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmvim._checks import check_choice, check_flags, check_positive
from mmvim.layers import CLS_TOKEN_PLACES, apply_rotary, rotary_table_2d, token_positions

from .base import PlainBackbone


class Vim(PlainBackbone):
    """Vision Mamba backbone.

    Patches and a class token pass through a stack of pre-norm bidirectional Mamba blocks. Images of
    any size from one patch on are accepted, square or not: the position embedding is resized.
    Official checkpoints load as they are (raw, or wrapped in ``{'model': …}``), including those
    trained at other image sizes.

    Args:
        arch (str | dict): 'tiny', 'small', 'base', or a dict with ``embed_dims`` and ``depth``
            and, optionally, ``d_state`` (16), ``d_conv`` (4), ``expand`` (2) and ``dt_rank``
            ('auto'). Defaults to 'tiny'.
        img_size (int | tuple): Native height and width of the position embedding, in pixels.
            Defaults to 224.
        patch_size (int | tuple): Side of a patch in pixels. Defaults to 16.
        stride (int | tuple, optional): Distance between patches, for instance 8 with patches of 16.
            Defaults to None: ``patch_size``.
        in_channels (int): Channels of the image. Defaults to 3.
        adapt_channels (bool): Whether a checkpoint's first convolution is fitted to another
            ``in_channels``, as timm does: repeated and rescaled, for one channel summed. Defaults
            to False: such a checkpoint is refused.
        cls_token (str): Place of the class token: 'middle', 'head', 'tail', 'double' (one at each
            end) or 'none'. Defaults to 'middle'.
        out_type (str): Kind of each output. 'cls_token': (batch, channels), the class token (the
            mean of the two of 'double'), or the patches pooled by ``pool`` if there is none.
            'featmap': (batch, channels, rows, columns) without class tokens. 'avg_featmap':
            (batch, channels), the mean of the patches. 'raw': (batch, length, channels), all
            tokens in order. Defaults to 'cls_token'.
        out_indices (int | Sequence[int]): Layers whose outputs are returned, ascending; negative
            ones count from the end. Layers after the last of them are not run. Defaults to -1.
        pool (str, optional): Pooling of ``out_type='cls_token'`` where there is no class token:
            'mean', 'max' (over the features; the official model takes the maximum of the logits
            instead), 'last' (the last patch) or 'all' (no pooling). Defaults to None:
            'mean'. Must be None where nothing is pooled.
        out_norm (str): Norm of the outputs. An output is the residual stream after its layer,
            hidden state plus residual. 'final': that of the last layer passes through ``norm_f``,
            the others are unchanged. 'shared': all pass through ``norm_f``. 'separate': that of
            the last layer passes through ``norm_f``, the output of layer i through its own norm,
            ``norm{i}``. 'none': all are unchanged and there is no ``norm_f`` (the paper's detection
            recipe). Defaults to 'final'.
        abs_pos_embed (bool): Whether to add a learnt position embedding. Defaults to True.
        rope (bool): Whether to rotate the hidden state by a 2-D rotary embedding before each
            layer. Each patch is rotated by its own row and column, whatever the position of the
            class token, the stride and the image size. Defaults to False.
        rope_residual (bool): Whether to rotate the residual stream as well. Defaults to False.
        rope_pt_size (int): Rows and columns of the grid to which the angles are scaled (the
            official ``pt_hw_seq_len``). Defaults to 14.
        interpolate_mode (str): Interpolation for resizing the position embedding. Defaults to
            'bicubic'.
        bimamba (str): 'v2' (own convolution, projections and state matrix for the backward
            branch), 'v1' (own state matrix only) or 'none' (one direction). Defaults to 'v2'.
        merge (str, optional): 'mean' or 'sum' of the directions. Defaults to None, as in the
            official model: 'mean' for v2, 'sum' for v1 and for ``if_bidirectional``.
        if_bidirectional (bool): Whether layers form pairs, whose second layer reads the sequence
            from its end and whose hidden states and residuals are merged. Defaults to False.
        norm (str): 'RMSNorm' or 'LayerNorm'. Defaults to 'RMSNorm'.
        norm_eps (float): Epsilon of the norms. Defaults to 1e-5.
        residual_in_fp32 (bool): Whether the residual stream is kept in float32. Defaults to True.
        layer_scale (float, optional): Initial value of a learnt scale of each mixer's output.
            Defaults to None: no scale.
        drop_rate (float): Dropout after the position embedding. Defaults to 0.
        drop_path_rate (float): Largest stochastic-depth rate; rates grow linearly from 0 over the
            layers, and the last layer's output has the largest. Defaults to 0.
        discretization (str): One of :data:`mmvim.ops.DISCRETIZATIONS`; released checkpoints use
            'zoh'. Defaults to 'zoh'.
        dt_init (str): 'proper' initialises Δ of both directions in [1e-3, 0.1]; 'official' leaves
            the backward Δ of v2 near 0.69, as the official code does. Defaults to 'proper'.
        frozen_stages (int): -1 freezes nothing, 0 the patch embedding, the tokens and the
            position embedding, k > 0 the first k layers as well (and ``norm_f`` if these are
            all). Defaults to -1.
        with_cp (bool): Whether to recompute each layer in the backward pass to save memory.
            Defaults to False.
        recompute (bool, optional): Whether the mixers recompute most of their intermediates in the
            backward pass (see :class:`mmvim.layers.BiMamba`). Defaults to None: on CUDA devices,
            unless ``with_cp``.
        ops_backend (str): 'auto', 'compiled' or 'torch'. Defaults to 'auto'.
        init_cfg (dict, optional): As in :class:`mmengine.model.BaseModule`.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an argument is invalid, or a checkpoint does not fit.

    Example:
        >>> model = Vim(arch='tiny', out_type='featmap', out_indices=(5, 11, 17, 23))
        >>> [tuple(f.shape) for f in model(torch.randn(1, 3, 224, 224))]
        [(1, 192, 14, 14), (1, 192, 14, 14), (1, 192, 14, 14), (1, 192, 14, 14)]
    """

    arch_zoo: dict = {  # noqa: RUF012
        'tiny': {'embed_dims': 192, 'depth': 24},
        'small': {'embed_dims': 384, 'depth': 24},
        'base': {'embed_dims': 768, 'depth': 24},
    }
    OUT_TYPES = ('cls_token', 'featmap', 'avg_featmap', 'raw')

    def __init__(
        self,
        arch: str | dict = 'tiny',
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        cls_token: str = 'middle',
        out_type: str = 'cls_token',
        out_indices: int | Sequence[int] = -1,
        pool: str | None = None,
        out_norm: str = 'final',
        abs_pos_embed: bool = True,
        rope: bool = False,
        rope_residual: bool = False,
        rope_pt_size: int = 14,
        interpolate_mode: str = 'bicubic',
        bimamba: str = 'v2',
        merge: str | None = None,
        if_bidirectional: bool = False,
        norm: str = 'RMSNorm',
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        discretization: str = 'zoh',
        dt_init: str = 'proper',
        frozen_stages: int = -1,
        with_cp: bool = False,
        recompute: bool | None = None,
        ops_backend: str = 'auto',
        init_cfg: dict | list[dict] | None = None,
        adapt_channels: bool = False,
    ) -> None:
        check_choice('cls_token', cls_token, CLS_TOKEN_PLACES)
        check_choice('pool', pool, (None, 'mean', 'max', 'last', 'all'))
        check_choice('bimamba', bimamba, ('v1', 'v2', 'none'))
        check_flags(rope=rope, rope_residual=rope_residual, if_bidirectional=if_bidirectional)
        check_positive(rope_pt_size=rope_pt_size)
        if pool is not None and (cls_token != 'none' or out_type != 'cls_token'):
            raise ValueError(
                f'pool={pool!r} has no effect with cls_token={cls_token!r} and '
                f"out_type={out_type!r}; it is for cls_token='none' and out_type='cls_token'"
            )
        if merge is not None and bimamba == 'none' and not if_bidirectional:
            raise ValueError(f"merge={merge!r} has no effect with bimamba='none'")
        if rope_residual and not rope:
            raise ValueError('rope_residual=True needs rope=True')
        if discretization == 'rk4' and dt_init == 'official' and bimamba == 'v2':
            print_log(
                "Vim: discretization='rk4' grows without bound for a large Δ, and "
                "dt_init='official' starts the backward branch with one; use dt_init='proper'",
                logger='current',
                level=logging.WARNING,
            )
        super().__init__(
            arch,
            img_size,
            patch_size,
            stride,
            in_channels,
            cls_token=cls_token,
            out_type=out_type,
            out_indices=out_indices,
            out_norm=out_norm,
            abs_pos_embed=abs_pos_embed,
            interpolate_mode=interpolate_mode,
            bimamba=bimamba,
            merge=merge,
            reverse_odd=if_bidirectional,
            norm=norm,
            norm_eps=norm_eps,
            residual_in_fp32=residual_in_fp32,
            layer_scale=layer_scale,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            discretization=discretization,
            dt_init=dt_init,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            recompute=recompute,
            ops_backend=ops_backend,
            adapt_channels=adapt_channels,
            init_cfg=init_cfg,
        )
        if rope and self.embed_dims % 4:
            raise ValueError(
                f'rope=True needs embed_dims to be a multiple of 4, not {self.embed_dims}'
            )
        if if_bidirectional and self.num_layers % 2:
            raise ValueError(f'if_bidirectional=True needs an even depth, not {self.num_layers}')
        if if_bidirectional and any(i % 2 == 0 for i in self.out_indices):
            raise ValueError(
                f'out_indices={out_indices!r}: with if_bidirectional=True layers (0, 1), (2, 3) … '
                'form pairs and only the second of a pair, an odd index, has an output'
            )
        self.pool = pool or 'mean'
        self.rope = rope
        self.rope_residual = rope_residual
        self.rope_pt_size = rope_pt_size
        self.merge = merge
        self.if_bidirectional = if_bidirectional
        self._finish()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features.

        Args:
            x (Tensor): (batch, in_channels, height, width).

        Returns:
            tuple[Tensor, ...]: One output of kind ``out_type`` for each of ``out_indices``.

        Raises:
            ValueError: If the shape is wrong or the image is smaller than a patch.
        """
        if not (self.rope or self.if_bidirectional):
            return super().forward(x)
        hidden, grid = self._embed(x)
        residual, table, outputs = None, None, []
        if self.rope:
            positions = token_positions(self.cls_token_place, math.prod(grid))
            table = rotary_table_2d(
                self.embed_dims, grid, self.rope_pt_size, positions, device=x.device
            )
        step = 2 if self.if_bidirectional else 1
        if step == 1:
            hidden = self.layers[0].drop_path(hidden)
        for last in range(step - 1, self.out_indices[-1] + 1, step):
            if table is not None:
                hidden = apply_rotary(hidden, *table)
                if self.rope_residual and residual is not None:
                    residual = apply_rotary(residual, *table)
            if self.if_bidirectional:
                hidden, residual = self._run_pair(last, hidden, residual)
            else:
                hidden, residual = self._run_layers(last, last, hidden, residual)
                hidden = self._drop_path_after(last)(hidden)
            if last in self.out_indices:
                # The layers of a pair draw drop path for their inputs themselves, separately.
                out = self._drop_path_after(last)(hidden) if self.if_bidirectional else hidden
                outputs.append(self._output(self._stream(last, out, residual), grid))
        return tuple(outputs)

    def _run_pair(
        self, second: int, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the layer before ``second`` and ``second`` itself, from the end, and merge both."""
        (hidden, residual), (hidden_b, residual_b) = (
            self._run_layers(i, i, self.layers[i].drop_path(hidden), residual)
            for i in (second - 1, second)
        )
        hidden, residual = hidden + hidden_b, residual + residual_b
        return (hidden / 2, residual / 2) if self.merge == 'mean' else (hidden, residual)

    def _output(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.out_type == 'raw':
            return x
        if self.out_type == 'cls_token' and self.num_extra_tokens:
            positions = token_positions(self.cls_token_place, math.prod(grid))
            tokens = [x[:, p] for p in positions]
            return tokens[0] if len(tokens) == 1 else (tokens[0] + tokens[1]) / 2
        patches, _ = self._split(x)
        if self.out_type == 'featmap':
            return patches.transpose(1, 2).unflatten(2, grid)
        pool = 'mean' if self.out_type == 'avg_featmap' else self.pool
        if pool == 'mean':
            return patches.mean(dim=1)
        if pool == 'max':
            return patches.amax(dim=1)
        return patches[:, -1] if pool == 'last' else patches

    def _fit_own(
        self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: Mapping
    ) -> None:
        """Drop the tables of rotary angles, which are computed here, after checking them."""
        super()._fit_own(state_dict, prefix, local_metadata)
        cos = state_dict.pop(f'{prefix}rope.freqs_cos', None)
        state_dict.pop(f'{prefix}rope.freqs_sin', None)
        if cos is None:
            return
        if not self.rope:
            self._reject('it has a rotary embedding (rope.freqs_cos), and here rope=False')
        side = math.isqrt(cos.shape[0])
        if cos.shape[1] != self.embed_dims or side * side != cos.shape[0]:
            self._reject(f'{prefix}rope.freqs_cos is {tuple(cos.shape)}')
        expected, _ = rotary_table_2d(self.embed_dims, (side, side), self.rope_pt_size)
        if not torch.allclose(cos.float().cpu()[:, ::2], expected.cpu(), atol=1e-3):
            self._reject(f'its rotary angles were not made with rope_pt_size={self.rope_pt_size}')


VisionMamba = Vim
