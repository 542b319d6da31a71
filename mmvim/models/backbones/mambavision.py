"""MambaVision: convolutions at high resolution, Mamba and attention in windows at low resolution.

Hatamizadeh and Kautz: MambaVision: A Hybrid Mamba-Transformer Vision Backbone, CVPR 2025,
https://arxiv.org/abs/2407.08083. This is a new implementation that reads the official checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmvim._checks import check_flags, check_number, check_positive, is_positive
from mmvim.checkpoints.keys import keys_under
from mmvim.layers import (
    Attention,
    DropPath,
    LayerNorm2d,
    MambaVisionMixer,
    Mlp,
    window_partition,
    window_reverse,
)
from mmvim.layers.drop import add_dropped
from mmvim.layers.fusion import Fusable, Parts, parts
from mmvim.layers.patch_embed import to_2tuple
from mmvim.layers.residual import ResidualBlock

from .base import HierarchicalBackbone, Stage, TokenLayout

_NUM_STAGES = 4
_NUM_CONV_STAGES = 2
_DT_BIAS_KEY = r'levels\.\d+\.blocks\.\d+\.mixer\.dt_proj\.bias$'
_SINGLE_DT_BIAS = 'single_dt_bias'
_ENCODER = 'encoder.'

Window = tuple[int, int] | None


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)


def _scale(dim: int, initial: float | None) -> nn.Parameter | None:
    return None if initial is None else nn.Parameter(torch.full((dim,), float(initial)))


class Stem(nn.Module):
    """Two convolutions of stride 2: a quarter of the image's height and width."""

    def __init__(self, in_channels: int, stem_dims: int, embed_dims: int) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            _conv3x3(in_channels, stem_dims, stride=2),
            nn.BatchNorm2d(stem_dims, eps=1e-4),
            nn.ReLU(),
            _conv3x3(stem_dims, embed_dims, stride=2),
            nn.BatchNorm2d(embed_dims, eps=1e-4),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embed images (batch, in_channels, height, width)."""
        return self.conv_down(x)


class Downsample(nn.Module):
    """Halves height and width and doubles the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(_conv3x3(dim, 2 * dim, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        """Downsample (batch, dim, height, width)."""
        return self.reduction(x)


def _without_bias(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """``norm(conv(x))`` with the convolution's bias subtracted from the mean, not added."""
    x = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    bias = conv.bias.detach().to(norm.running_mean.dtype)
    mean = norm.running_mean - bias
    if not norm.training:
        return F.batch_norm(x, mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    # A norm over the batch removes constants: the bias has a gradient, which is zero.
    beta = norm.bias + 0 * conv.bias
    before = mean.clone()
    out = F.batch_norm(x, mean, norm.running_var, norm.weight, beta, True, momentum, norm.eps)
    norm.running_mean.add_(mean - before)
    return out


class ConvBlock(Fusable):
    """Residual block of two convolutions."""

    _fused_parts = parts(
        conv1=nn.Conv2d, norm1=nn.BatchNorm2d, conv2=nn.Conv2d, norm2=nn.BatchNorm2d
    )

    def __init__(self, dim: int, drop_path: float, layer_scale: float | None) -> None:
        super().__init__()
        self.conv1 = _conv3x3(dim, dim, bias=True)
        self.norm1 = nn.BatchNorm2d(dim)
        self.act = nn.GELU(approximate='tanh')
        self.conv2 = _conv3x3(dim, dim, bias=True)
        self.norm2 = nn.BatchNorm2d(dim)
        self.gamma = _scale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (batch, dim, height, width)."""
        fuse = x.is_cuda and self._is_plain()
        out = self.act(self._conv_norm(x, self.conv1, self.norm1, fuse))
        out = self._conv_norm(out, self.conv2, self.norm2, fuse)
        if self.gamma is not None:
            out = out * self.gamma[:, None, None]
        return add_dropped(self.drop_path, x, out)

    def _conv_norm(self, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, fuse: bool) -> Tensor:
        """``norm(conv(x))``; fused without the pass that adds the convolution's bias."""
        if not fuse or not norm.track_running_stats:
            return norm(conv(x))
        # With fixed statistics in training the bias has a gradient, which would be lost in the
        # mean.
        if norm.training or not (torch.is_grad_enabled() and conv.bias.requires_grad):
            return _without_bias(x, conv, norm)
        return norm(conv(x))


_PARTS = {
    kind: parts(norm1=nn.LayerNorm, mixer=kind, norm2=nn.LayerNorm, mlp=Mlp)
    for kind in (MambaVisionMixer, Attention)
}


class TokenBlock(ResidualBlock):
    """Pre-norm residual block of a mixer (Mamba or attention) and an MLP."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.gamma_1 = _scale(dim, layer_scale)
        self.gamma_2 = _scale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (batch, length, dim)."""
        x = self._add_branch(x, 'norm1', 'mixer', self.gamma_1)
        return self._add_branch(x, 'norm2', 'mlp', self.gamma_2)

    @property
    def _fused_parts(self) -> Parts:
        # Of any other mixer, parts that it is not.
        return _PARTS.get(type(self._modules['mixer']), _PARTS[Attention])


class WindowedStage(Stage):
    """A stage of tokens, window by window.

    Arguments are those of :class:`Stage`, and:

    Args:
        window (tuple, optional): Rows and columns of a window. None: the whole map is one window,
            whatever its size.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        downsample: nn.Module | None,
        with_cp: bool,
        window: Window,
    ) -> None:
        super().__init__(blocks, downsample, with_cp)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Transform (batch, dim, height, width), without the downsampling."""
        batch, _, *size = x.shape
        window = self.window or tuple(size)
        tokens = super().forward(window_partition(x, window))
        return window_reverse(tokens, window, batch, tuple(size))


class MambaVision(HierarchicalBackbone):
    """MambaVision backbone.

    A convolutional stem, two stages of convolutions and two stages of tokens, in which the first
    blocks are Mamba mixers and the last ``depth // 2`` attention; strides are 4, 8, 16 and 32. The
    token stages work in windows without shift; images of any size are accepted, since maps are
    padded with zeros to a multiple of the window. Official checkpoints load as they are (raw, or
    wrapped in ``{'state_dict': …}`` or ``{'model': …}``).

    Args:
        arch (str | dict): 'tiny', 'tiny2', 'small', 'base', 'large', 'large2', 'large3', or a dict
            with ``depths`` (four), ``embed_dims`` (channels of the first stage, doubled by each
            further one), ``stem_dims`` and ``num_heads`` and, optionally, ``window_sizes``
            ((14, 7)), ``mlp_ratio`` (4), ``drop_path_rate`` (0), ``layer_scale`` (None),
            ``d_state`` (8), ``d_conv`` (3) and ``expand`` (1). ``num_heads`` are those of the two
            token stages, or four as the official configs write them, of which the first two stand
            for the convolutional stages and mean nothing. Defaults to 'tiny'.
        window_sizes (Sequence, optional): Windows of the two token stages, in tokens: each an
            integer, a pair (rows, columns), or None for the whole map as one window without
            padding. Four, as the official configs write them, are accepted as for ``num_heads``.
            Defaults to None, which means those of the arch: (16, 8) for 'large3' (the released
            large3 for images of 256), else (14, 7). Released models for images of 512 ('large2'
            and 'large3') need (32, 16).
        in_channels (int): Channels of the image. Defaults to 3.
        adapt_channels (bool): Whether a checkpoint's first convolution is fitted to another
            ``in_channels``, as timm does: repeated and rescaled, for one channel summed. Defaults
            to False: such a checkpoint is refused.
        out_type (str): Kind of each output. 'avg_featmap': (batch, channels), the mean of the map
            after the norm; for the last stage, the input of the official classification head.
            'featmap': (batch, channels, height, width). Defaults to 'avg_featmap'.
        out_indices (int | Sequence[int]): Stages whose outputs, before their downsampling, are
            returned, ascending; negative ones count from the end. Stages after the last of them
            are not run. Defaults to -1.
        out_norm (str): Norm of the outputs. 'final': that of the last stage passes through the
            batch norm ``norm``, the others are unchanged (classification). 'separate': each passes
            through its own layer norm over channels, ``outnorm{i}``, and there is no ``norm`` (the
            official detection and segmentation models). 'none': all are unchanged. Defaults to
            'final'.
        layer_scale (float | str, optional): Initial value of the learnt scales of the token
            blocks' branches; None means no scales. Defaults to 'auto', the arch's value: 1e-5
            from 'base' on, none below.
        layer_scale_conv (float, optional): The same for the convolutional blocks. Defaults to
            None, as in all released models.
        drop_path_rate (float, optional): Largest stochastic-depth rate; rates grow linearly from 0
            over all blocks. A window counts as a sample. Defaults to None, the arch's value:
            0.2 ('tiny' to 'small'), 0.3 ('base' to 'large2') or 0.5 ('large3'). The official
            detection and segmentation models were trained with these, whatever their configs say.
        double_dt_bias (bool): Whether the bias of Δ is added twice, as in the official code and as
            released weights require. With False it is added once; checkpoints of the other kind
            are converted on loading (a checkpoint made with False has the key
            ``single_dt_bias``, official ones do not). Defaults to True.
        discretization (str): One of :data:`mmvim.ops.DISCRETIZATIONS`; released checkpoints use
            'zoh'. Defaults to 'zoh'.
        dt_init (str): 'official' starts with Δ near 0.69, as the official model does because a
            later initialisation overwrites the intended one; the published results were reached
            with it. 'proper' starts with Δ in [1e-3, 0.1], as was intended. Defaults to 'official'.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k > 0 the first k stages, their
            downsampling included, as well (and the output norms if these are all). Defaults to -1.
        with_cp (bool): Whether to recompute each block in the backward pass to save memory. The
            running statistics of batch norms count each batch once. Defaults to False.
        ops_backend (str): 'auto', 'compiled' or 'torch'. Defaults to 'auto'.
        init_cfg (dict, optional): As in :class:`mmengine.model.BaseModule`.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an argument is invalid, or a checkpoint does not fit.

    Example:
        >>> model = MambaVision('tiny', out_type='featmap', out_indices=(0, 1, 2, 3))
        >>> [tuple(f.shape) for f in model(torch.randn(1, 3, 224, 224))]
        [(1, 80, 56, 56), (1, 160, 28, 28), (1, 320, 14, 14), (1, 640, 7, 7)]
    """

    arch_zoo: dict = {  # noqa: RUF012
        'tiny': {
            'depths': (1, 3, 8, 4), 'embed_dims': 80, 'stem_dims': 32, 'num_heads': (8, 16),
            'drop_path_rate': 0.2,
        },
        'tiny2': {
            'depths': (1, 3, 11, 4), 'embed_dims': 80, 'stem_dims': 32, 'num_heads': (8, 16),
            'drop_path_rate': 0.2,
        },
        'small': {
            'depths': (3, 3, 7, 5), 'embed_dims': 96, 'stem_dims': 64, 'num_heads': (8, 16),
            'drop_path_rate': 0.2,
        },
        'base': {
            'depths': (3, 3, 10, 5), 'embed_dims': 128, 'stem_dims': 64, 'num_heads': (8, 16),
            'drop_path_rate': 0.3, 'layer_scale': 1e-5,
        },
        'large': {
            'depths': (3, 3, 10, 5), 'embed_dims': 196, 'stem_dims': 64, 'num_heads': (16, 32),
            'drop_path_rate': 0.3, 'layer_scale': 1e-5,
        },
        'large2': {
            'depths': (3, 3, 12, 5), 'embed_dims': 196, 'stem_dims': 64, 'num_heads': (16, 32),
            'drop_path_rate': 0.3, 'layer_scale': 1e-5,
        },
        'large3': {
            'depths': (3, 3, 20, 10), 'embed_dims': 256, 'stem_dims': 64, 'num_heads': (16, 32),
            'window_sizes': (16, 8), 'drop_path_rate': 0.5, 'layer_scale': 1e-5,
        },
    }  # fmt: skip
    arch_required = ('depths', 'embed_dims', 'stem_dims', 'num_heads')
    arch_optional = {  # noqa: RUF012
        'window_sizes': (14, 7), 'mlp_ratio': 4, 'drop_path_rate': 0.0, 'layer_scale': None,
        'd_state': 8, 'd_conv': 3, 'expand': 1,
    }  # fmt: skip
    _stages = 'levels'
    _block_parameter = 'norm1.weight'

    def __init__(
        self,
        arch: str | dict = 'tiny',
        window_sizes: Sequence[int | tuple[int, int] | None] | None = None,
        in_channels: int = 3,
        out_type: str = 'avg_featmap',
        out_indices: int | Sequence[int] = -1,
        out_norm: str = 'final',
        layer_scale: float | str | None = 'auto',
        layer_scale_conv: float | None = None,
        drop_path_rate: float | None = None,
        double_dt_bias: bool = True,
        discretization: str = 'zoh',
        dt_init: str = 'official',
        frozen_stages: int = -1,
        with_cp: bool = False,
        ops_backend: str = 'auto',
        init_cfg: dict | list[dict] | None = None,
        adapt_channels: bool = False,
    ) -> None:
        super().__init__(
            arch,
            in_channels,
            drop_path_rate,
            out_type=out_type,
            out_indices=out_indices,
            out_norm=out_norm,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            adapt_channels=adapt_channels,
            init_cfg=init_cfg,
        )
        check_flags(double_dt_bias=double_dt_bias)
        if layer_scale == 'auto':
            layer_scale = self.arch['layer_scale']
        for name, value in (('layer_scale', layer_scale), ('layer_scale_conv', layer_scale_conv)):
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ValueError(f'{name}={value!r} must be a number or None')
        if window_sizes is None:
            window_sizes = self.arch['window_sizes']
        self.window_sizes = self._parse_windows(window_sizes)
        self.layer_scale = layer_scale
        self.double_dt_bias = double_dt_bias

        self.patch_embed = Stem(in_channels, self.arch['stem_dims'], self.embed_dims[0])
        rates = self._drop_path_rates()
        mixer = {key: self.arch[key] for key in ('d_state', 'd_conv', 'expand')}
        mixer.update(
            double_dt_bias=double_dt_bias,
            discretization=discretization,
            dt_init=dt_init,
            ops_backend=ops_backend,
        )
        self.levels = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(self.embed_dims, self.depths, strict=True)):
            downsample = Downsample(dim) if i + 1 < _NUM_STAGES else None
            if i < _NUM_CONV_STAGES:
                blocks = [ConvBlock(dim, next(rates), layer_scale_conv) for _ in range(depth)]
                self.levels.append(Stage(blocks, downsample, with_cp))
                continue
            heads = self.arch['num_heads'][i - _NUM_CONV_STAGES]
            mixers = [
                Attention(dim, heads) if j >= depth - depth // 2 else MambaVisionMixer(dim, **mixer)
                for j in range(depth)
            ]
            ratio = self.arch['mlp_ratio']
            blocks = [TokenBlock(dim, m, ratio, next(rates), layer_scale) for m in mixers]
            window = self.window_sizes[i - _NUM_CONV_STAGES]
            self.levels.append(WindowedStage(blocks, downsample, with_cp, window))
        if not double_dt_bias:
            # Only the key matters: it tells how the biases of a checkpoint are meant.
            self.register_buffer(_SINGLE_DT_BIAS, torch.ones((), dtype=torch.long))
        self._finish(nn.BatchNorm2d, LayerNorm2d)

    def _parse_arch(self, arch: str | dict) -> dict:
        arch = super()._parse_arch(arch)
        check_positive(**{"arch['stem_dims']": arch['stem_dims']})
        if not _is_sequence(arch['depths'], _NUM_STAGES):
            raise ValueError(f"arch['depths']={arch['depths']!r} must be {_NUM_STAGES} integers")
        heads = _of_token_stages("arch['num_heads']", arch['num_heads'])
        if not all(map(is_positive, heads)):
            raise ValueError(f"arch['num_heads']={arch['num_heads']!r} must be positive integers")
        check_number("arch['mlp_ratio']", arch['mlp_ratio'], 0)
        if int(arch['mlp_ratio'] * arch['embed_dims']) < 1:
            raise ValueError(f"arch['mlp_ratio']={arch['mlp_ratio']!r} leaves the MLPs no channel")
        return {**arch, 'num_heads': heads}

    def _parse_windows(self, window_sizes: Sequence) -> tuple[Window, ...]:
        return tuple(
            None if window is None else to_2tuple('window_sizes', window)
            for window in _of_token_stages('window_sizes', window_sizes)
        )

    def token_layout(self, shape: Sequence[int], layer: str) -> TokenLayout:
        """Return the layout of a layer's tokens in the images; convolutional stages have none."""
        match = re.search(r'levels\.(\d+)', layer)
        stage = int(match[1]) if match else -1
        if stage < 0 or not isinstance(self.levels[stage], WindowedStage):
            raise ValueError(f'{layer!r} is in no stage that has tokens: levels.2 or levels.3')
        size = tuple(-(-side // 2 ** (2 + stage)) for side in shape[-2:])
        return TokenLayout(size, window=self.levels[stage].window or size)

    def _unwrap(self, state_dict: MutableMapping[str, Any]) -> None:
        """Keep only the encoder of a model that has one."""
        super()._unwrap(state_dict)
        keys = keys_under(state_dict, _ENCODER)
        if self._has_blocks(keys):
            weights = {key: state_dict[_ENCODER + key] for key in keys}
            state_dict.clear()
            state_dict.update(weights)

    def _describe(self) -> str:
        return f'{super()._describe()}, layer_scale={self.layer_scale}'

    def _check_structure(self, keys: list[str]) -> None:
        super()._check_structure(keys)
        scaled = any(k.endswith('.gamma_1') for k in keys)
        if scaled != (self.layer_scale is not None):
            self._reject(f'it has {"a" if scaled else "no"} layer scale')

    def _translate(self, state_dict: MutableMapping[str, Any], prefix: str) -> None:
        """Convert the biases of Δ between single and double addition."""
        key = prefix + _SINGLE_DT_BIAS
        double = key not in state_dict
        if double == self.double_dt_bias:
            return
        if self.double_dt_bias:
            del state_dict[key]
        biases = [k for k in keys_under(state_dict, prefix) if re.match(_DT_BIAS_KEY, k)]
        if not biases:
            return
        if not self.double_dt_bias:
            state_dict[key] = torch.ones((), dtype=torch.long)
        factor = 2.0 if double else 0.5
        for name in biases:
            state_dict[prefix + name] = state_dict[prefix + name] * factor
        self._log(
            f'the checkpoint adds the bias of Δ {"twice" if double else "once"} and this model '
            f'{"once" if double else "twice"}; its biases are multiplied by {factor:g}'
        )


def _is_sequence(value: object, *lengths: int) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) in lengths


def _of_token_stages(name: str, values: Sequence) -> tuple:
    """Return the two values of the token stages, of two or of four."""
    if not _is_sequence(values, _NUM_STAGES - _NUM_CONV_STAGES, _NUM_STAGES):
        raise ValueError(
            f'{name}={values!r} must be two values, of the last two stages, or four, of all stages'
        )
    return tuple(values)[-(_NUM_STAGES - _NUM_CONV_STAGES) :]
