"""VMamba: a hierarchy of two-dimensional selective scans.

Liu et al.: VMamba: Visual State Space Model, NeurIPS 2024, https://arxiv.org/abs/2401.10166 (code:
https://github.com/MzeroMiko/VMamba, MIT). This is a new implementation that reads the official
checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmvim._checks import check_choice, check_number
from mmvim.checkpoints.keys import keys_under, rename_keys
from mmvim.layers import SS2D, DropPath, Mlp
from mmvim.layers.drop import is_plain_drop_path
from mmvim.layers.fusion import is_hooked, parts
from mmvim.layers.norm import AutocastLayerNorm, StreamLayerNorm
from mmvim.layers.residual import ResidualBlock
from mmvim.ops._autocast import autocast_dtype
from mmvim.ops.branch import Body, ss2d_blocks

from .base import HierarchicalBackbone, Stage, TokenLayout

# Other names of official files; the first ones are those of the first release.
_RENAMED = (
    (r'^patch_embed\.proj\.', 'patch_embed.0.'),
    (r'^patch_embed\.norm\.', 'patch_embed.2.'),
    (r'\.ln_1\.', '.norm.'),
    (r'\.self_attention\.', '.op.'),
    (r'^classifier\.norm\.', 'norm.'),
    (r'\.op\.(x_proj|dt_projs)\.(weight|bias)$', r'.op.\1_\2'),
)
# Parameters that official files also store with one axis less, or as weights of 1x1 convolutions.
_RESHAPED = (
    r'\.(x_proj_weight|dt_projs_weight|dt_projs_bias|(in_proj|out_proj|fc1|fc2|reduction)\.weight)$'
)


class Permute(nn.Module):
    """Moves the axes of a tensor."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """Permute ``x``."""
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return str(self.dims)


def _to_last() -> Permute:
    return Permute(0, 2, 3, 1)


def _to_first() -> Permute:
    return Permute(0, 3, 1, 2)


def _stem(version: str, in_channels: int, dim: int) -> nn.Sequential:
    """Images (batch, in_channels, height, width) to maps (batch, rows, columns, dim)."""
    if version == 'v1':
        return nn.Sequential(nn.Conv2d(in_channels, dim, 4, 4), _to_last(), StreamLayerNorm(dim))
    half = dim // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, half, 3, 2, 1),
        _to_last(),
        AutocastLayerNorm(half),
        _to_first(),
        nn.GELU(),
        nn.Conv2d(half, dim, 3, 2, 1),
        _to_last(),
        StreamLayerNorm(dim),
    )


class PatchMerging(nn.Module):
    """Swin's downsampling of (batch, height, width, dim): 2x2 positions become one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = AutocastLayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample; odd sizes are padded with zeros."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


def _downsample(version: str, dim: int) -> nn.Module:
    if version == 'v1':
        return PatchMerging(dim)
    return nn.Sequential(
        _to_first(), nn.Conv2d(dim, 2 * dim, 3, 2, 1), _to_last(), StreamLayerNorm(2 * dim)
    )


class VSSBlock(ResidualBlock):
    """Pre-norm residual block of SS2D and, unless ``mlp_ratio`` is 0, an MLP."""

    _fused_parts = parts(norm=AutocastLayerNorm, op=SS2D, norm2=AutocastLayerNorm, mlp=Mlp)

    def __init__(self, dim: int, op: SS2D, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm = AutocastLayerNorm(dim)
        self.op = op
        self.norm2, self.mlp = None, None
        if mlp_ratio > 0:
            self.norm2 = AutocastLayerNorm(dim)
            # A fiftieth of the time of a training step for a fifth of its memory.
            self.mlp = Mlp(dim, int(mlp_ratio * dim), recompute=None)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (batch, height, width, dim)."""
        x = self._add_branch(x, 'norm', 'op')
        if self.mlp is None:
            return x
        return self._add_branch(x, 'norm2', 'mlp')

    def _branches(self, x: Tensor) -> list[tuple[tuple, float, Body]] | None:
        """Parameters of the norm, its eps and the body of each branch that adds to ``x``.

        None unless they are all that a call of the block means.
        """
        if (
            type(self) is not VSSBlock
            or VSSBlock.forward is not _FORWARD
            or 'forward' in self.__dict__
            or is_hooked(self)
            or self.training
            or not is_plain_drop_path(self.drop_path)
        ):
            return None
        names = [('norm', 'op')] if self.mlp is None else [('norm', 'op'), ('norm2', 'mlp')]
        found = []
        for norm, body in names:
            of_body = self._fused_body(x, norm, body, None)
            if of_body is None:
                return None
            module = self._modules[norm]
            found.append(((module.weight, module.bias), module.eps, of_body))
        return found


_FORWARD = VSSBlock.forward


# Devices on which the blocks of a stage may be one op where no gradient is wanted.
STAGE_DEVICES = ('cpu', 'cuda')


class ScanStage(Stage):
    """Blocks of one resolution, one op where no gradient is wanted and each of them may be one."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks, without the downsampling."""
        out = None
        if not self.training and x.device.type in STAGE_DEVICES and not torch.is_grad_enabled():
            out = self._run_at_once(x)
        return super().forward(x) if out is None else out

    def _run_at_once(self, x: Tensor) -> Tensor | None:
        parameters, options = [], []
        for block in self.blocks:
            branches = block._branches(x)
            if branches is None:
                return None
            options.append([(eps, body._replace(parameters=())) for _, eps, body in branches])
            for norm, _, body in branches:
                parameters += [*norm, *body.parameters]
        if not options or any(others != options[0] for others in options):
            return None
        (eps, scan), *rest = options[0]
        if any(other != eps for other, _ in rest):
            return None
        dtype = autocast_dtype(x) or x.dtype
        return ss2d_blocks(x, parameters, eps, dtype, scan, rest[0][1] if rest else None)


_VANILLA = {
    'd_state': 16, 'ssm_ratio': 2.0, 'conv_bias': True, 'mlp_ratio': 0.0, 'forward_type': 'v0',
    'patchembed_version': 'v1', 'downsample_version': 'v1',
}  # fmt: skip


class VMamba(HierarchicalBackbone):
    """VMamba backbone.

    Four stages at strides 4, 8, 16 and 32 of blocks that scan the map along four routes
    (:class:`mmvim.layers.SS2D`). Maps are channels-last inside; images of any size are accepted.
    Official checkpoints load as they are, those of the first release and of dense models included.

    Args:
        arch (str | dict): 'tiny', 'small' and 'base' are the official ``s1l8``, ``s1l20`` and
            ``s1l20``; 'tiny-s2l5', 'small-s2l15' and 'base-s2l15' have twice the inner channels
            and fewer blocks; 'vanilla-tiny', 'vanilla-small' and 'vanilla-base' are the models of
            the first release. Or a dict with ``depths`` and ``embed_dims`` (channels of the first
            stage, doubled by each further one) and, optionally, ``ssm_ratio`` (1), ``d_state`` (1),
            ``dt_rank`` ('auto'), ``d_conv`` (3), ``conv_bias`` (False), ``mlp_ratio`` (4; 0 means
            no MLP), ``forward_type`` ('v05_noz', or 'v0' with a gate), ``patchembed_version``
            ('v2', two convolutions of stride 2, or 'v1', one of stride 4, which leaves out rows
            and columns beyond a multiple of 4), ``downsample_version`` ('v3', a convolution, or
            'v1', Swin's merging of patches) and ``drop_path_rate`` (0). Defaults to 'tiny'.
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
            layer norm ``norm``, the others are unchanged (classification). 'separate': each passes
            through its own layer norm, ``outnorm{i}``, and there is no ``norm`` (the official
            detection and segmentation models). 'none': all are unchanged. Defaults to 'final'.
        drop_path_rate (float, optional): Largest stochastic-depth rate; rates grow linearly from 0
            over all blocks. Defaults to None, the arch's value, with which the released models
            were trained.
        routes (Sequence[str]): The route of each scan, from :data:`mmvim.ops.ROUTES`. Defaults to
            all four, as in all released models.
        discretization (str): One of :data:`mmvim.ops.DISCRETIZATIONS`; released checkpoints use
            'zoh'. Defaults to 'zoh'.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k > 0 the first k stages, their
            downsampling included, as well (and the output norms if these are all). Defaults to -1.
        with_cp (bool): Whether to recompute each block in the backward pass to save memory.
            Defaults to False.
        ops_backend (str): 'auto', 'compiled' or 'torch'. Defaults to 'auto'.
        init_cfg (dict, optional): As in :class:`mmengine.model.BaseModule`.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an argument is invalid, or a checkpoint does not fit.

    Example:
        >>> model = VMamba('tiny', out_type='featmap', out_indices=(0, 1, 2, 3))
        >>> [tuple(f.shape) for f in model(torch.randn(1, 3, 224, 224))]
        [(1, 96, 56, 56), (1, 192, 28, 28), (1, 384, 14, 14), (1, 768, 7, 7)]
    """

    arch_zoo: dict = {  # noqa: RUF012
        'tiny': {'embed_dims': 96, 'depths': (2, 2, 8, 2), 'drop_path_rate': 0.2},
        'small': {'embed_dims': 96, 'depths': (2, 2, 20, 2), 'drop_path_rate': 0.3},
        'base': {'embed_dims': 128, 'depths': (2, 2, 20, 2), 'drop_path_rate': 0.5},
        'tiny-s2l5': {
            'embed_dims': 96, 'depths': (2, 2, 5, 2), 'ssm_ratio': 2.0, 'drop_path_rate': 0.2,
        },
        'small-s2l15': {
            'embed_dims': 96, 'depths': (2, 2, 15, 2), 'ssm_ratio': 2.0, 'drop_path_rate': 0.3,
        },
        'base-s2l15': {
            'embed_dims': 128, 'depths': (2, 2, 15, 2), 'ssm_ratio': 2.0, 'drop_path_rate': 0.6,
        },
        'vanilla-tiny': {
            'embed_dims': 96, 'depths': (2, 2, 9, 2), 'drop_path_rate': 0.1, **_VANILLA,
        },
        'vanilla-small': {
            'embed_dims': 96, 'depths': (2, 2, 27, 2), 'drop_path_rate': 0.3, **_VANILLA,
        },
        'vanilla-base': {
            'embed_dims': 128, 'depths': (2, 2, 27, 2), 'drop_path_rate': 0.6, **_VANILLA,
        },
    }  # fmt: skip
    arch_optional = {  # noqa: RUF012
        'ssm_ratio': 1.0, 'd_state': 1, 'dt_rank': 'auto', 'd_conv': 3, 'conv_bias': False,
        'mlp_ratio': 4.0, 'forward_type': 'v05_noz', 'patchembed_version': 'v2',
        'downsample_version': 'v3', 'drop_path_rate': 0.0,
    }  # fmt: skip
    channels_last = True
    _head_keys = ('classifier.head.weight', 'classifier.head.bias', 'head.weight', 'head.bias')

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        out_type: str = 'avg_featmap',
        out_indices: int | Sequence[int] = -1,
        out_norm: str = 'final',
        drop_path_rate: float | None = None,
        routes: Sequence[str] = ('rows', 'columns', 'rows_reversed', 'columns_reversed'),
        discretization: str = 'zoh',
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
        self.patch_embed = _stem(self.arch['patchembed_version'], in_channels, self.embed_dims[0])
        rates = self._drop_path_rates()
        scan = ('d_state', 'ssm_ratio', 'dt_rank', 'd_conv', 'conv_bias', 'forward_type')
        mixer = {key: self.arch[key] for key in scan}
        mixer.update(routes=routes, discretization=discretization, ops_backend=ops_backend)
        self.layers = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(self.embed_dims, self.depths, strict=True)):
            blocks = [
                VSSBlock(dim, SS2D(dim, **mixer), self.arch['mlp_ratio'], next(rates))
                for _ in range(depth)
            ]
            downsample = None
            if i + 1 < self.num_stages:
                downsample = _downsample(self.arch['downsample_version'], dim)
            self.layers.append(ScanStage(blocks, downsample, with_cp))
        if self.arch['patchembed_version'] == 'v1':
            self._least_side = 4
        self._finish(StreamLayerNorm, StreamLayerNorm)

    def _parse_arch(self, arch: str | dict) -> dict:
        arch = super()._parse_arch(arch)
        for name, allowed in (('patchembed_version', ('v2', 'v1')),
                              ('downsample_version', ('v3', 'v1'))):  # fmt: skip
            check_choice(f"arch['{name}']", arch[name], allowed)
        check_number("arch['mlp_ratio']", arch['mlp_ratio'], 0)
        if arch['embed_dims'] % 2:
            raise ValueError(f"arch['embed_dims']={arch['embed_dims']} must be even")
        return arch

    def token_layout(self, shape: Sequence[int], layer: str) -> TokenLayout:
        """Return the layout of a layer's tokens in the images."""
        match = re.search(r'layers\.(\d+)', layer)
        if match is None:
            raise ValueError(f'{layer!r} is in no stage: layers.0 to layers.{self.num_stages - 1}')
        floor = self.arch['patchembed_version'] == 'v1'
        size = (side // 4 if floor else -(-side // 4) for side in shape[-2:])
        return TokenLayout(tuple(-(-side // 2 ** int(match[1])) for side in size))

    def _describe(self) -> str:
        keys = ('ssm_ratio', 'd_state', 'forward_type')
        return ', '.join([super()._describe(), *(f'{key}={self.arch[key]}' for key in keys)])

    def _check_structure(self, keys: list[str]) -> None:
        super()._check_structure(keys)
        has_mlp = any('.mlp.' in key for key in keys)
        if has_mlp != (self.arch['mlp_ratio'] > 0):
            self._reject(f'its blocks have {"" if has_mlp else "no "}MLPs')

    def _translate(self, state_dict: MutableMapping[str, Any], prefix: str) -> None:
        """Give parameters of other official files this model's names and shapes."""
        merging = ((r'\.downsample\.1\.', '.downsample.norm.'),
                   (r'\.downsample\.2\.', '.downsample.reduction.'))  # fmt: skip
        rules = (*_RENAMED, *(merging if self.arch['downsample_version'] == 'v1' else ()))
        names = {}
        for key in keys_under(state_dict, prefix):
            new = key
            for pattern, replacement in rules:
                new = re.sub(pattern, replacement, new)
            if new != key:
                if prefix + new in state_dict:
                    self._reject(f'it has both {prefix}{key} and {prefix}{new}')
                names[prefix + key] = prefix + new
        rename_keys(state_dict, names)
        own = {name: value.shape for name, value in self.named_parameters()}
        for key in keys_under(state_dict, prefix):
            given = state_dict[prefix + key]
            if key not in own or not re.search(_RESHAPED, key) or not isinstance(given, Tensor):
                continue
            shape = own[key]
            rows = (shape[:-1].numel(), shape[-1])
            if given.shape != shape and tuple(given.shape) in (
                rows,
                (*rows, 1, 1),
                (*shape, 1, 1),
                (shape.numel(),),
            ):
                state_dict[prefix + key] = given.reshape(shape)
