"""VideoMamba.

Li, Li, Wang, He, Wang, Wang and Qiao: VideoMamba: State Space Model for Efficient Video
Understanding, ECCV 2024, https://arxiv.org/abs/2403.06977. Official code:
https://github.com/OpenGVLab/VideoMamba (Apache-2.0). This is a new implementation that reads the
official checkpoints.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmvim._checks import check_choice, check_flags, check_positive
from mmvim.checkpoints.keys import keys_under, rename_keys, strip_prefixes
from mmvim.layers import (
    PatchEmbed,
    TubeletEmbed,
    insert_tokens,
    resize_temporal_pos_embed,
    split_tokens,
    token_positions,
)

from .base import PlainBackbone

_PATCH_WEIGHT = 'patch_embed.proj.weight'
_TEMPORAL = 'temporal_pos_embedding'
#: The backbone of official multimodal models.
VISION_ENCODER = 'vision_encoder.'
# What official files hold besides the encoder: heads of classification and of self-distillation,
# masked pretraining's decoder, and the other parts of multimodal models.
_COMPANIONS = (
    'head.', 'distill_head.', 'clip_decoder.', 'text_encoder.', 'text_proj.', 'vision_proj.',
    'itm_head.', 'clip_teacher.',
)  # fmt: skip


def is_companion(key: str) -> bool:
    """Whether official files have ``key`` besides those of the encoder."""
    return key == 'temp' or key.startswith(_COMPANIONS)


class VideoMamba(PlainBackbone):
    """VideoMamba backbone, for images or for videos.

    A class token and the patches, frame by frame and each frame in raster order, pass through a
    stack of pre-norm bidirectional Mamba blocks whose directions are summed. Images and videos of
    any size and length are accepted: the position embeddings are resized, over space by
    ``interpolate_mode`` and over time linearly.

    Official checkpoints load as they are (raw or under 'model', 'module' or 'state_dict', with
    ``module.``, ``backbone.``, ``encoder.`` or ``vision_encoder.`` before their keys), including
    those of masked and multimodal pretraining and of other image sizes or numbers of frames. A
    video model also loads the weights of an image model: see ``inflation``. Its temporal position
    embedding is then zero.

    Args:
        arch (str | dict): 'tiny', 'small', 'middle', 'base', or a dict with ``embed_dims`` and
            ``depth`` and, optionally, ``d_state`` (16), ``d_conv`` (4), ``expand`` (2) and
            ``dt_rank`` ('auto'). Defaults to 'tiny'.
        img_size (int | tuple): Native height and width of the position embedding, in pixels.
            Defaults to 224.
        patch_size (int | tuple): Side of a patch in pixels. Defaults to 16.
        stride (int | tuple, optional): Distance between patches. Defaults to None:
            ``patch_size``.
        in_channels (int): Channels of the image. Defaults to 3.
        adapt_channels (bool): Whether a checkpoint's first convolution is fitted to another
            ``in_channels``, as timm does: repeated and rescaled, for one channel summed. Defaults
            to False: such a checkpoint is refused.
        num_frames (int, optional): Native number of frames of the temporal position embedding, a
            multiple of ``tubelet_size``. Defaults to None: an image model.
        tubelet_size (int): Frames that are embedded together; T frames are T / ``tubelet_size``
            time steps. Must be 1 in an image model. Defaults to 1.
        inflation (str): Use of an image model's patch embedding in a video model: 'center' puts it
            into the middle frame of the tubelet and zeros into the others, 'average' spreads it
            evenly. Defaults to 'center'.
        cls_token (str): Place of the class token: 'head' or 'none'. Defaults to 'head'.
        out_type (str): Kind of each output. 'pooled': (batch, channels), see ``pool``. 'featmap':
            (batch, channels, rows, columns), for videos (batch, channels, steps, rows, columns).
            'frame_featmap', for videos only: (batch * steps, channels, rows, columns), the steps of
            a video one after another, for 2-D necks and heads. 'raw': (batch, length, channels),
            all tokens in order. Defaults to 'pooled'.
        pool (str, optional): Pooling of ``out_type='pooled'``: 'cls' (the class token), 'avg' (the
            mean of the patches), 'cls+avg' (their sum) or 'cls_cat_avg' (both, with twice the
            channels). Defaults to None: 'cls', or 'avg' where there is no class token or only
            one direction. Must be None where nothing is pooled.
        keep_temporal (bool): Whether 'avg' is taken within each time step, so that pooled outputs
            are (batch, steps, channels). Defaults to False.
        out_indices (int | Sequence[int]): Layers whose outputs are returned, ascending; negative
            ones count from the end. Layers after the last of them are not run. Defaults to -1.
        out_norm (str): Norm of the outputs, as in :class:`mmvim.models.Vim`: 'final', 'shared',
            'separate' or 'none'. Defaults to 'final'.
        interpolate_mode (str): Interpolation for resizing the spatial position embedding. Defaults
            to 'bicubic'.
        bimamba (str): 'v2' (both directions) or 'none' (one). One direction excludes pooling by the
            class token, because a token at the head then sees nothing. Defaults to 'v2'.
        merge (str, optional): 'sum' or 'mean' of the directions. Defaults to None:
            'sum', as in the official model.
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
        dt_init (str): Initialisation of Δ; everything else is initialised as in the official model.
            'proper' initialises Δ in [1e-3, 0.1]. 'official' treats its projection as the official
            code treats every linear layer: weights of standard deviation 0.02 and zero biases,
            which leaves Δ near 0.69. Defaults to 'proper'.
        frozen_stages (int): -1 freezes nothing, 0 the patch embedding, the class token and the
            position embeddings, k > 0 the first k layers as well (and ``norm_f`` if these are
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
        >>> model = VideoMamba(arch='tiny', num_frames=8)
        >>> model(torch.randn(1, 3, 8, 224, 224))[0].shape
        torch.Size([1, 192])
    """

    arch_zoo: dict = {  # noqa: RUF012
        'tiny': {'embed_dims': 192, 'depth': 24},
        'small': {'embed_dims': 384, 'depth': 24},
        'middle': {'embed_dims': 576, 'depth': 32},
        'base': {'embed_dims': 768, 'depth': 24},
    }
    OUT_TYPES = ('pooled', 'featmap', 'frame_featmap', 'raw')
    POOLS = ('cls', 'avg', 'cls+avg', 'cls_cat_avg')
    _stem = (*PlainBackbone._stem, _TEMPORAL)
    _released_cls_token = 'head'

    def __init__(
        self,
        arch: str | dict = 'tiny',
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        num_frames: int | None = None,
        tubelet_size: int = 1,
        inflation: str = 'center',
        cls_token: str = 'head',
        out_type: str = 'pooled',
        pool: str | None = None,
        keep_temporal: bool = False,
        out_indices: int | Sequence[int] = -1,
        out_norm: str = 'final',
        interpolate_mode: str = 'bicubic',
        bimamba: str = 'v2',
        merge: str | None = None,
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
        check_choice('inflation', inflation, ('center', 'average'))
        check_choice('cls_token', cls_token, ('head', 'none'))
        check_choice('pool', pool, (None, *self.POOLS))
        check_choice('bimamba', bimamba, ('v2', 'none'))
        check_flags(keep_temporal=keep_temporal)
        if merge is not None and bimamba == 'none':
            raise ValueError(f"merge={merge!r} has no effect with bimamba='none'")
        if num_frames is not None:
            check_positive(num_frames=num_frames)
        elif tubelet_size != 1:
            raise ValueError(f'tubelet_size={tubelet_size!r} needs num_frames, which is None')
        elif out_type == 'frame_featmap':
            raise ValueError("out_type='frame_featmap' needs num_frames, which is None")
        if discretization == 'rk4' and dt_init == 'official':
            print_log(
                "VideoMamba: discretization='rk4' grows without bound for a large Δ, and "
                "dt_init='official' starts with one; use dt_init='proper'",
                logger='current',
                level=logging.WARNING,
            )
        super().__init__(
            arch,
            img_size,
            patch_size,
            stride,
            in_channels,
            patch_embed=partial(
                _patch_embed, tubelet_size=None if num_frames is None else tubelet_size
            ),
            cls_token=cls_token,
            out_type=out_type,
            out_indices=out_indices,
            out_norm=out_norm,
            interpolate_mode=interpolate_mode,
            bimamba=bimamba,
            merge=merge or 'sum',
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
        self.num_frames = num_frames
        self.tubelet_size = tubelet_size
        self.inflation = inflation
        self.pool = self._parse_pool(pool)
        self.keep_temporal = self._parse_keep_temporal(keep_temporal)
        if self.is_video:
            self.num_steps = self.patch_embed.steps(num_frames)
            self.temporal_pos_embedding = nn.Parameter(
                torch.zeros(1, self.num_steps, self.embed_dims)
            )
        self._reset_projections(dt_init)
        self._finish()

    @property
    def is_video(self) -> bool:
        """Whether the input has frames."""
        return self.num_frames is not None

    def _parse_pool(self, pool: str | None) -> str:
        if pool is not None and self.out_type != 'pooled':
            raise ValueError(f'pool={pool!r} has no effect with out_type={self.out_type!r}')
        blind = self.cls_token_place == 'none' or self.bimamba == 'none'
        if pool is None:
            return 'avg' if blind else 'cls'
        if pool != 'avg' and self.cls_token_place == 'none':
            raise ValueError(f"pool={pool!r} needs a class token, and cls_token='none'")
        if pool != 'avg' and blind:
            raise ValueError(
                f"pool={pool!r} with bimamba='none': the class token at the head sees nothing of "
                "the input in one direction; use pool='avg'"
            )
        return pool

    def _parse_keep_temporal(self, keep_temporal: bool) -> bool:
        if keep_temporal and not self.is_video:
            raise ValueError('keep_temporal=True needs num_frames, which is None')
        if keep_temporal and (self.out_type != 'pooled' or self.pool == 'cls'):
            raise ValueError(
                f'keep_temporal=True has no effect with out_type={self.out_type!r} and '
                f'pool={self.pool!r}'
            )
        return keep_temporal

    def _reset_projections(self, dt_init: str) -> None:
        """Initialise linear layers as the official model does, that of Δ only on request."""
        for name, module in self.layers.named_modules():
            is_delta = name.endswith(('.dt_proj', '.dt_proj_b'))
            if isinstance(module, nn.Linear) or (is_delta and dt_init == 'official'):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _finish(self) -> None:
        super()._finish()
        if self.cls_token_place != 'none':
            nn.init.zeros_(self.cls_token)
        if self.is_video:
            nn.init.zeros_(self.temporal_pos_embedding)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        patches, grid = self.patch_embed(x)
        temporal = None
        if self.is_video:
            temporal = resize_temporal_pos_embed(self.temporal_pos_embedding, patches.shape[1])
        return self._with_positions(patches, grid, temporal), grid

    def _with_positions(
        self,
        patches: Tensor,
        grid: tuple[int, int],
        temporal: Tensor | None,
        with_token: bool = True,
    ) -> Tensor:
        """Make tokens (batch, length, channels) from patches (batch, [steps,] patches, channels).

        ``temporal`` is (1, steps, channels), ``with_token`` whether the class token comes first.
        """
        positions = token_positions(self.cls_token_place, math.prod(grid))
        spatial, of_tokens = split_tokens(self._resized_pos_embed(grid), positions)
        hidden = patches + spatial
        if temporal is not None:
            hidden = hidden + temporal.unsqueeze(2)
        hidden = hidden.flatten(1, -2)
        if with_token:
            tokens = [(self.cls_token + x).to(hidden.dtype) for x in of_tokens]
            hidden = insert_tokens(hidden, tokens, positions)
        return self.drop_after_pos(hidden.contiguous())

    def _output(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.out_type == 'raw':
            return x
        patches, tokens = self._split(x)
        if self.out_type == 'pooled':
            return self._pooled(patches, tokens, grid)
        patches = patches.transpose(1, 2)
        if not self.is_video:
            return patches.unflatten(2, grid)
        maps = patches.unflatten(2, (-1, *grid))
        return maps if self.out_type == 'featmap' else maps.transpose(1, 2).flatten(0, 1)

    def _pooled(self, patches: Tensor, tokens: list[Tensor], grid: tuple[int, int]) -> Tensor:
        if self.pool == 'cls':
            return tokens[0].squeeze(1)
        if self.keep_temporal:
            mean = patches.unflatten(1, (-1, math.prod(grid))).mean(dim=2)
        else:
            mean = patches.mean(dim=1)
        if self.pool == 'avg':
            return mean
        token = tokens[0].expand(-1, mean.shape[1], -1) if self.keep_temporal else tokens[0][:, 0]
        return token + mean if self.pool == 'cls+avg' else torch.cat((token, mean), dim=-1)

    def _unwrap(self, state_dict: MutableMapping[str, Any]) -> None:
        super()._unwrap(state_dict)
        strip_prefixes(state_dict, ('encoder.', VISION_ENCODER))

    def _translate(self, state_dict: MutableMapping[str, Any], prefix: str) -> None:
        if not prefix:
            strip_prefixes(state_dict, ('backbone.',))
        # The pretraining models' name of the last norm.
        names = {f'{prefix}norm.{k}': f'{prefix}norm_f.{k}' for k in ('weight', 'bias')}
        rename_keys(state_dict, {a: b for a, b in names.items() if a in state_dict})

    def _is_dropped(self, key: str) -> bool:
        return is_companion(key) or key.startswith('pool_norm.') or super()._is_dropped(key)

    def _describe(self) -> str:
        frames = f', num_frames={self.num_frames}, tubelet_size={self.tubelet_size}'
        return super()._describe() + (frames if self.is_video else '')

    def _fit_own(
        self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: Mapping
    ) -> None:
        """Inflate an image model's weights; resize a temporal position embedding."""
        super()._fit_own(state_dict, prefix, local_metadata)
        weight = state_dict.get(prefix + _PATCH_WEIGHT)
        temporal = state_dict.get(prefix + _TEMPORAL)
        if not self.is_video:
            if temporal is not None or (weight is not None and weight.dim() == 5):
                self._reject("it is a video model's, and num_frames=None makes an image model")
            return
        if weight is not None and weight.dim() == 4:
            state_dict[prefix + _PATCH_WEIGHT] = self._inflate(weight)
            if temporal is None and self._has_blocks(keys_under(state_dict, prefix)):
                state_dict[prefix + _TEMPORAL] = torch.zeros_like(self.temporal_pos_embedding)
            self._log(
                f"inflated an image model's weights ({self.inflation}) to tubelets of "
                f'{self.tubelet_size} frames'
            )
        if temporal is None or temporal.dim() != 3 or temporal.shape[2] != self.embed_dims:
            return  # reported with the other sizes
        if temporal.shape[1] != self.num_steps:
            state_dict[prefix + _TEMPORAL] = resize_temporal_pos_embed(temporal, self.num_steps)
            self._log(
                f'resized the temporal position embedding from {temporal.shape[1]} to '
                f'{self.num_steps} steps'
            )

    def _inflate(self, weight: Tensor) -> Tensor:
        """Extend (channels, in_channels, height, width) over the frames of a tubelet."""
        frames = self.tubelet_size
        if self.inflation == 'average':
            return weight.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
        inflated = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
        inflated[:, :, frames // 2] = weight
        return inflated


def _patch_embed(*sizes: Any, tubelet_size: int | None) -> PatchEmbed:
    embed = PatchEmbed(*sizes) if tubelet_size is None else TubeletEmbed(*sizes, tubelet_size)
    # torch's own initialisation, as the official model leaves it.
    embed.proj.reset_parameters()
    return embed
