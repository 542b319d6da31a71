"""Base classes: of every backbone, of hierarchical ones, and of plain stacks of Mamba blocks."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mmvim._checks import (
    check_choice,
    check_flags,
    check_indices,
    check_number,
    check_positive,
    is_positive,
)
from mmvim.checkpoints.keys import (
    Fitting,
    fitting,
    keys_under,
    layer_count,
    rename_keys,
    size_mismatches,
    unwrap_state_dict,
)
from mmvim.layers import (
    DropPath,
    MambaBlock,
    PatchEmbed,
    build_norm,
    drop_path_rates,
    insert_tokens,
    resize_pos_embed,
    split_tokens,
    token_positions,
    window_reverse,
)
from mmvim.layers.patch_embed import to_2tuple
from mmvim.layers.position import RESIZE_MODES
from mmvim.layers.recomputation import recomputed
from mmvim.layers.stack import run_blocks


@dataclass(frozen=True)
class TokenLayout:
    """Layout of a layer's tokens in the images.

    Attributes:
        size: Rows and columns of tokens.
        steps: Steps in time, None for images.
        class_tokens: Positions of the class tokens in the sequence.
        window: Rows and columns of the windows that form separate sequences, or None.
    """

    size: tuple[int, int]
    steps: int | None = None
    class_tokens: tuple[int, ...] = ()
    window: tuple[int, int] | None = None

    def to_map(self, values: Tensor) -> Tensor:
        """Arrange values of tokens (sequences, length) as (batch, [steps,] rows, columns)."""
        if self.window is not None:
            windows = math.prod(-(-s // w) for s, w in zip(self.size, self.window, strict=True))
            batch = values.shape[0] // windows
            return window_reverse(values.unsqueeze(-1), self.window, batch, self.size)[:, 0]
        values, _ = split_tokens(values.unsqueeze(-1), self.class_tokens)
        steps = () if self.steps is None else (self.steps,)
        return values[..., 0].unflatten(1, (*steps, *self.size))

    def to_rows(self, matrices: Tensor) -> Tensor:
        """One value per token from (sequences, length, length), outputs by inputs.

        The rows of the class tokens (their mean), or, without class tokens, the mean of all rows.
        """
        if self.class_tokens:
            return matrices[:, list(self.class_tokens)].mean(1)
        return matrices.mean(1)


class Backbone(BaseModule):
    """Base of all backbones: a stem, stages whose outputs are returned, and final modules.

    A subclass names its parts by the class attributes below, passes the arguments that all
    backbones have to this constructor, builds its modules, and calls :meth:`_finish` at the end of
    its own. It defines ``forward``, which returns a tuple of one output for each of
    ``out_indices``, and :meth:`token_layout`.

    The stages are one :class:`torch.nn.ModuleList`; in a hierarchical model each has ``blocks`` and
    may have a ``downsample``. Frozen parts, layer depths and the match of a checkpoint follow from
    that.

    Args:
        arch (str | dict): A name in :attr:`arch_zoo`, or a dict with :attr:`arch_required` and, if
            wanted, :attr:`arch_optional`.
        out_type (str): Kind of the outputs, one of :attr:`OUT_TYPES`.
        out_indices (int | Sequence[int]): Stages whose outputs are returned, ascending; negative
            ones count from the end.
        out_norm (str): Norm of the outputs, one of :attr:`OUT_NORMS`.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k > 0 the first k stages as well, and
            what follows the stages if these are all.
        with_cp (bool): Whether blocks are recomputed in the backward pass to save memory.
        init_cfg (dict, optional): As in :class:`mmengine.model.BaseModule`.
        adapt_channels (bool): Whether a checkpoint's first convolution is fitted to another number
            of channels. Defaults to False.

    Raises:
        TypeError: If ``arch`` is neither a name nor a dict.
        ValueError: If an argument is invalid.
    """

    #: Architectures by name.
    arch_zoo: dict[str, dict] = {}  # noqa: RUF012
    #: Keys that an ``arch`` must have, ``depths`` among them: the number of blocks of each stage.
    arch_required: tuple[str, ...] = ('embed_dims', 'depths')
    #: Further keys that it may have, and their defaults.
    arch_optional: dict[str, Any] = {}  # noqa: RUF012
    OUT_TYPES: tuple[str, ...] = ('featmap',)
    OUT_NORMS: tuple[str, ...] = ('final', 'separate', 'none')
    #: Whether maps are (batch, rows, columns, channels) inside.
    channels_last = False
    # Prefixes of the names of the stem's modules and parameters.
    _stem: tuple[str, ...] = ('patch_embed',)
    # The stages.
    _stages = 'layers'
    # Pixels that the stem needs in either direction.
    _least_side = 1
    # The classification head of official checkpoints.
    _head_keys: tuple[str, ...] = ('head.weight', 'head.bias')
    # A parameter that each block has.
    _block_parameter = 'norm.weight'

    def __init__(
        self,
        arch: str | dict,
        *,
        out_type: str,
        out_indices: int | Sequence[int],
        out_norm: str,
        frozen_stages: int,
        with_cp: bool,
        init_cfg: dict | list[dict] | None,
        adapt_channels: bool = False,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        check_choice('out_type', out_type, self.OUT_TYPES)
        check_choice('out_norm', out_norm, self.OUT_NORMS)
        check_flags(with_cp=with_cp, adapt_channels=adapt_channels)
        self.arch = self._parse_arch(arch)
        self.depths: tuple[int, ...] = self._parse_depths()
        self.out_type = out_type
        self.out_indices = self._parse_out_indices(out_indices)
        self.out_norm = out_norm
        is_index = isinstance(frozen_stages, int) and not isinstance(frozen_stages, bool)
        if not is_index or not -1 <= frozen_stages <= self.num_stages:
            raise ValueError(f'frozen_stages={frozen_stages!r} must be in -1 .. {self.num_stages}')
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.adapt_channels = adapt_channels

    @property
    def num_stages(self) -> int:
        """Number of stages, from which outputs can be taken."""
        return len(self.depths)

    def _parse_arch(self, arch: str | dict) -> dict:
        if isinstance(arch, str):
            check_choice('arch', arch, tuple(self.arch_zoo))
            arch = self.arch_zoo[arch]
        if not isinstance(arch, Mapping):
            raise TypeError(f'arch={arch!r} must be one of {sorted(self.arch_zoo)} or a dict')
        required = set(self.arch_required)
        allowed = required | set(self.arch_optional)
        unknown, missing = set(arch) - allowed, required - set(arch)
        if unknown or missing:
            raise ValueError(
                f'arch has unknown keys {sorted(unknown)} and lacks {sorted(missing)}; '
                f'allowed: {sorted(allowed)}'
            )
        arch = {**self.arch_optional, **arch}
        check_positive(**{"arch['embed_dims']": arch['embed_dims']})
        return arch

    def _parse_depths(self) -> tuple[int, ...]:
        """The number of blocks of each stage."""
        depths = self.arch['depths']
        if not isinstance(depths, Sequence) or not depths or not all(map(is_positive, depths)):
            raise ValueError(
                f"arch['depths']={depths!r} must be positive integers, one for each stage"
            )
        return tuple(depths)

    def _parse_out_indices(self, out_indices: int | Sequence[int]) -> tuple[int, ...]:
        given = check_indices('out_indices', out_indices)
        count = self.num_stages
        indices = tuple(i + count if i < 0 else i for i in given)
        if not indices or any(not 0 <= i < count for i in indices):
            raise ValueError(f'out_indices={out_indices!r} must be in 0 .. {count - 1}')
        if any(a >= b for a, b in itertools.pairwise(indices)):
            raise ValueError(f'out_indices={out_indices!r} must be ascending, each index once')
        return indices

    def _finish(self) -> None:
        """Apply ``frozen_stages``; the last call of a subclass's constructor."""
        for module in self._frozen_modules():
            module.requires_grad_(False)
        if self.frozen_stages >= 0:
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith(self._stem):
                    parameter.requires_grad_(False)

    def _frozen_modules(self) -> list[nn.Module]:
        count, is_all = self.frozen_stages, self.frozen_stages == self.num_stages
        if count < 0:
            return []
        parts = [(n, m) for n, m in self.named_children() if n != self._stages]
        frozen = [m for name, m in parts if is_all or name.startswith(self._stem)]
        return [*frozen, *getattr(self, self._stages)[:count]]

    def train(self, mode: bool = True) -> Backbone:
        """Switch to training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the depth of a parameter, for layer-wise learning-rate decay.

        Args:
            param_name (str): Full name of the parameter.
            prefix (str): Prefix of this backbone's parameters in the name, such as ``'backbone.'``.
                Defaults to ''.

        Returns:
            tuple[int, int]: The depth, and the number of depths. Depth 0 is the stem, ``i + 1``
            block ``i`` of all stages together, a stage's downsampling that of its last block, and
            the last everything after the stages, other modules of the model included.
        """
        num_depths = sum(self.depths) + 2
        last = num_depths - 1
        if not param_name.startswith(prefix):
            return last, num_depths
        name = param_name[len(prefix) :]
        if name.startswith(self._stem):
            return 0, num_depths
        match = re.match(rf'{self._stages}\.(\d+)\.(?:blocks\.(\d+)\.)?', name)
        if not match:
            return last, num_depths
        stage = int(match[1])
        if match[2] is None:
            return sum(self.depths[: stage + 1]), num_depths
        return sum(self.depths[:stage]) + int(match[2]) + 1, num_depths

    def token_layout(self, shape: Sequence[int], layer: str) -> TokenLayout:
        """Return the layout of a layer's tokens in the images, for :mod:`mmvim.analysis`.

        Args:
            shape (Sequence[int]): Shape of the input, (batch, channels, [frames,] height, width).
            layer (str): Name of a module in this backbone; a prefix is ignored.

        Raises:
            ValueError: If the layer has no tokens.
        """
        raise NotImplementedError

    @property
    def cam_layer(self) -> str:
        """Name of the module whose output class activation maps use."""
        return f'{self._stages}.{self.out_indices[-1]}'

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, Any],
        prefix: str,
        local_metadata: dict,
        *args: Any,
    ) -> None:
        """Fit an official or resized checkpoint to this model before loading it."""
        if not prefix:
            self._unwrap(state_dict)
        self._fit_state_dict(state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _checkpoint_filter(
        self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any
    ) -> None:
        """Let a classifier load an official checkpoint, its head included.

        mmpretrain's ``ImageClassifier`` calls this before loading. Keys of the bare official model
        get the names that they have in a classifier.
        """
        if not prefix:
            self._unwrap(state_dict)
        keys = keys_under(state_dict, prefix)
        if any(k.startswith('backbone.') for k in keys) or not self._has_blocks(keys):
            return
        heads = {k: f'head.fc.{k.rpartition(".")[2]}' for k in self._head_keys}
        names = {prefix + k: prefix + heads.get(k, f'backbone.{k}') for k in keys}
        rename_keys(state_dict, names)

    def _unwrap(self, state_dict: MutableMapping[str, Any]) -> None:
        """Remove the wrapping of weights by the official training scripts."""
        unwrap_state_dict(state_dict)

    def _fit_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: Mapping
    ) -> None:
        own = {name for name, _ in itertools.chain(self.named_parameters(), self.named_buffers())}
        if any('_flat_param' in key for key in keys_under(state_dict, prefix)) or not own:
            return  # shards of FSDP's own format
        load = fitting.get(None) or Fitting()
        self._translate(state_dict, prefix)
        keys = keys_under(state_dict, prefix)
        if load.refuses:
            self._check_keys(keys, own, prefix)
        for key in filter(self._is_dropped, keys):
            load.dropped.append(state_dict.pop(prefix + key))
            self._log(f"'{key}' of the checkpoint has no place in this model and is not loaded", 10)
        if self.adapt_channels:
            self._adapt_channels(state_dict, prefix)
        self._fit_own(state_dict, prefix, local_metadata)
        wrong = size_mismatches(self, state_dict, prefix)
        if wrong and load.refuses:
            name, given, expected = wrong[0]
            more = f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''
            if name.startswith('patch_embed') and given[2:] == expected[2:] != ():
                more += '; adapt_channels=True fits the first convolution to other channels'
            self._reject(f'{prefix}{name} is {given} there and {expected} here{more}')

    def _translate(self, state_dict: MutableMapping[str, Any], prefix: str) -> None:
        """Convert the names and values of another implementation to this model's."""

    def _adapt_channels(self, state_dict: MutableMapping[str, Any], prefix: str) -> None:
        """Fit the first convolution to this model's number of channels.

        What it gives for images of equal channels stays the same, as in timm's
        ``adapt_input_conv``.
        """
        name, conv = next(
            (name, m) for name, m in self.patch_embed.named_modules() if isinstance(m, _ConvNd)
        )
        key, channels = f'{prefix}patch_embed.{name}.weight', conv.in_channels
        weight = state_dict.get(key)
        if weight is None or weight.dim() < 3 or weight.shape[1] == channels:
            return
        given = weight.shape[1]
        if channels == 1:
            state_dict[key] = weight.sum(1, keepdim=True)
        else:
            repeated = torch.cat([weight] * -(-channels // given), 1)[:, :channels]
            state_dict[key] = repeated * (given / channels)
        self._log(f'adapted {key} of the checkpoint from {given} to {channels} channels')

    def _fit_own(
        self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: Mapping
    ) -> None:
        """Resize or drop model-specific tensors, once the keys are known to be its own."""

    def _is_dropped(self, key: str) -> bool:
        """Whether the checkpoint's ``key`` is known to have no place in this model."""
        return key in self._head_keys

    def _log(self, message: str, level: int = logging.INFO) -> None:
        print_log(f'{type(self).__name__}: {message}', logger='current', level=level)

    def _describe(self) -> str:
        """Description of the model in errors about unfit checkpoints."""
        return f'embed_dims={self.arch["embed_dims"]}, depths={self.depths}'

    def _reject(self, reason: str) -> NoReturn:
        raise ValueError(
            f'the checkpoint does not fit this {type(self).__name__} ({self._describe()}): {reason}'
        )

    @property
    def _block_key(self) -> str:
        """Pattern of the beginning of the keys of blocks."""
        return rf'{self._stages}\.\d+\.blocks\.\d+\.'

    def _has_blocks(self, keys: Iterable[str]) -> bool:
        return any(re.match(self._block_key, key) for key in keys)

    def _check_keys(self, keys: list[str], own: set[str], prefix: str) -> None:
        if prefix and not keys:
            self._reject(
                f"it has no key that starts with '{prefix}' (weights of a backbone alone go into "
                "the backbone's init_cfg=dict(type='Pretrained', checkpoint=…))"
            )
        foreign = [k for k in keys if k not in own and not self._is_dropped(k)]
        if foreign and not self._has_blocks(keys):
            matches = (re.match(rf'(.*\.){self._block_key}', k) for k in keys)
            found = next(filter(None, matches), None)
            hint = (
                f"; a {type(self).__name__}'s keys stand under '{prefix}{found[1]}': give that "
                'prefix'
                if found
                else ''
            )
            self._reject(f"its keys are another model's: {', '.join(foreign[:3])} …{hint}")
        whole = rf'{self._stages}\.\d+\.(blocks\.\d+\.)?{re.escape(self._block_parameter)}$'
        if any(re.match(whole, key) for key in keys):  # parts of a model do not say its depth
            self._check_structure(keys)

    def _check_structure(self, keys: list[str]) -> None:
        """Compare the structure implied by the keys of all blocks with this model."""
        block = rf'blocks\.(\d+)\.{re.escape(self._block_parameter)}$'
        depths = tuple(
            layer_count(keys, rf'{self._stages}\.{i}\.{block}') for i in range(self.num_stages)
        )
        if depths != self.depths:
            self._reject(f'its depths are {depths}')


class Stage(nn.Module):
    """Blocks of one resolution, and the downsampling after them, which the owner calls.

    Args:
        blocks (Sequence[nn.Module]): From a map, or its tokens, to the same shape.
        downsample (nn.Module, optional): None after the last stage.
        with_cp (bool): Whether to recompute blocks in the backward pass.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], downsample: nn.Module | None, with_cp: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks, without the downsampling."""
        for block in self.blocks:
            x = recomputed(block, x) if self.with_cp and self.training else block(x)
        return x


class HierarchicalBackbone(Backbone):
    """Base of backbones of stages, each with half the rows and columns of the one before it.

    A subclass builds ``patch_embed`` and a list of :class:`Stage`, whose blocks have the rates
    :meth:`_drop_path_rates`, and calls :meth:`_finish` with its norms. Stage ``i`` has
    ``embed_dims[i]`` channels, and :attr:`arch_optional` a ``drop_path_rate``.

    Arguments are those of :class:`Backbone`, and:

    Args:
        in_channels (int): Channels of the image.
        drop_path_rate (float, optional): Largest stochastic-depth rate; None means that of the
            arch.
    """

    OUT_TYPES = ('avg_featmap', 'featmap')

    def __init__(
        self, arch: str | dict, in_channels: int, drop_path_rate: float | None, **common: Any
    ) -> None:
        super().__init__(arch, **common)
        check_positive(in_channels=in_channels)
        if drop_path_rate is None:
            drop_path_rate = self.arch['drop_path_rate']
        check_number('drop_path_rate', drop_path_rate, 0, 1)
        self.in_channels = in_channels
        self.drop_path_rate = drop_path_rate
        self.embed_dims = [self.arch['embed_dims'] * 2**i for i in range(self.num_stages)]

    def _parse_arch(self, arch: str | dict) -> dict:
        arch = super()._parse_arch(arch)
        check_number("arch['drop_path_rate']", arch['drop_path_rate'], 0, 1)
        return arch

    def _drop_path_rates(self) -> Iterator[float]:
        """The rates of all blocks, from 0 linearly to the largest."""
        last = max(sum(self.depths) - 1, 1)
        return iter([self.drop_path_rate * i / last for i in range(last + 1)])

    def _finish(
        self, final: Callable[[int], nn.Module], separate: Callable[[int], nn.Module]
    ) -> None:
        """Build the norms of ``out_norm``, initialise linear layers, apply ``frozen_stages``.

        Args:
            final: Makes the norm of the last stage from its channels.
            separate: Makes the norm of one of several outputs from its channels.
        """
        if self.out_norm == 'final':
            self.norm = final(self.embed_dims[-1])
        elif self.out_norm == 'separate':
            for i in self.out_indices:
                self.add_module(f'outnorm{i}', separate(self.embed_dims[i]))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        super()._finish()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features.

        Args:
            x (Tensor): (batch, in_channels, height, width).

        Returns:
            tuple[Tensor, ...]: One output of kind ``out_type`` for each of ``out_indices``.

        Raises:
            ValueError: If the shape is wrong.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'images must be (batch, {self.in_channels}, height, width), got {tuple(x.shape)}'
            )
        if min(x.shape[2:]) < self._least_side:
            raise ValueError(
                f'images must be of at least {self._least_side}x{self._least_side} pixels, '
                f'got {tuple(x.shape)}'
            )
        if x.is_cuda:
            # All convolutions and norms behind them then work in the layout that is fast there.
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.patch_embed(x)
        stages, outputs = getattr(self, self._stages), []
        for i in range(self.out_indices[-1] + 1):
            if i:
                x = stages[i - 1].downsample(x)
            x = stages[i](x)
            if i in self.out_indices:
                outputs.append(self._output(i, x))
        return tuple(outputs)

    def _output(self, index: int, x: Tensor) -> Tensor:
        if self.out_norm == 'separate':
            x = getattr(self, f'outnorm{index}')(x)
        elif self.out_norm == 'final' and index == self.num_stages - 1:
            x = self.norm(x)
        if self.out_type == 'featmap':
            return x.permute(0, 3, 1, 2) if self.channels_last else x
        return x.mean((1, 2) if self.channels_last else (2, 3))

    def _is_dropped(self, key: str) -> bool:
        unwanted = self.out_norm != 'final' and key.startswith('norm.')
        return unwanted or super()._is_dropped(key)


class PlainBackbone(Backbone):
    """Base of backbones that are one stack of :class:`MambaBlock` over patches and class tokens.

    Each layer is a stage. A subclass defines :meth:`_output`, and adds to :meth:`_embed` and
    :meth:`forward` what it does differently.

    Arguments are those of :class:`mmvim.models.Vim`, and:

    Args:
        patch_embed (Callable): Builds the patch embedding from ``in_channels``, ``embed_dims``,
            ``patch_size`` and ``stride``. Defaults to :class:`mmvim.layers.PatchEmbed`.
        reverse_odd (bool): Whether every second layer reads the sequence from its end. Defaults to
            False.
        **mixer: Further arguments of the mixers, such as ``discretization`` or ``layer_scale``.
    """

    arch_required = ('embed_dims', 'depth')
    arch_optional: dict[str, Any] = {  # noqa: RUF012
        'd_state': 16, 'd_conv': 4, 'expand': 2, 'dt_rank': 'auto',
    }  # fmt: skip
    OUT_NORMS = ('final', 'shared', 'separate', 'none')
    _stem = ('patch_embed', 'cls_token', 'pos_embed', 'drop_after_pos')
    _block_parameter = 'mixer.A_log'
    _block_key = r'layers\.\d+\.(mixer|norm)\.'
    # Position of the class token in released checkpoints, which do not state it.
    _released_cls_token = 'middle'

    def __init__(
        self,
        arch: str | dict,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None,
        in_channels: int,
        *,
        patch_embed: Callable[..., PatchEmbed] = PatchEmbed,
        cls_token: str,
        abs_pos_embed: bool = True,
        interpolate_mode: str = 'bicubic',
        bimamba: str = 'v2',
        merge: str | None = None,
        reverse_odd: bool = False,
        norm: str = 'RMSNorm',
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        recompute: bool | None = None,
        ops_backend: str = 'auto',
        out_type: str,
        out_indices: int | Sequence[int] = -1,
        out_norm: str = 'final',
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        adapt_channels: bool = False,
        **mixer: object,
    ) -> None:
        super().__init__(
            arch,
            out_type=out_type,
            out_indices=out_indices,
            out_norm=out_norm,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            adapt_channels=adapt_channels,
            init_cfg=init_cfg,
        )
        check_choice('merge', merge, (None, 'mean', 'sum'))
        check_choice('interpolate_mode', interpolate_mode, RESIZE_MODES)
        check_flags(abs_pos_embed=abs_pos_embed, residual_in_fp32=residual_in_fp32)
        check_number('norm_eps', norm_eps, 0)
        check_number('drop_rate', drop_rate, 0, 1)
        self.embed_dims: int = self.arch['embed_dims']
        self.num_layers: int = self.num_stages
        self.cls_token_place = cls_token
        self.interpolate_mode = interpolate_mode
        self.bimamba = bimamba

        self.patch_embed = patch_embed(in_channels, self.embed_dims, patch_size, stride)
        self.img_size = to_2tuple('img_size', img_size)
        self.grid = self.patch_embed.grid(*self.img_size)
        for name in self._token_names:
            setattr(self, name, nn.Parameter(torch.zeros(1, 1, self.embed_dims)))
        if abs_pos_embed:
            num_tokens = math.prod(self.grid) + self.num_extra_tokens
            self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, self.embed_dims))
        else:
            self.register_parameter('pos_embed', None)
        self.drop_after_pos = nn.Dropout(drop_rate)

        rates = drop_path_rates(drop_path_rate, self.num_layers)
        norm_args = norm, self.embed_dims, norm_eps, residual_in_fp32, ops_backend
        mixer.update({k: self.arch[k] for k in self.arch_optional})
        if bimamba != 'none':
            mixer['merge'] = merge
        # Recomputing whole blocks makes recomputation inside them unnecessary.
        mixer['recompute'] = False if with_cp and recompute is None else recompute
        self.layers = nn.ModuleList(
            MambaBlock(
                self.embed_dims,
                bidirectional=None if bimamba == 'none' else bimamba,
                norm=norm,
                norm_eps=norm_eps,
                residual_in_fp32=residual_in_fp32,
                drop_path=rates[i],
                ops_backend=ops_backend,
                reverse=reverse_odd and i % 2 == 1,
                **mixer,
            )
            for i in range(self.num_layers)
        )
        self.drop_path = DropPath(rates[-1])
        if out_norm != 'none':
            self.norm_f = build_norm(*norm_args)
        if out_norm == 'separate':
            for i in self.out_indices:
                if i != self.num_layers - 1:
                    self.add_module(f'norm{i}', build_norm(*norm_args))
        self._register_state_dict_hook(_save_grid)

    @property
    def num_extra_tokens(self) -> int:
        """Number of class tokens in the sequence."""
        return len(token_positions(self.cls_token_place, 1))

    @property
    def _token_names(self) -> tuple[str, ...]:
        if self.cls_token_place == 'double':
            return 'cls_token_head', 'cls_token_tail'
        return () if self.cls_token_place == 'none' else ('cls_token',)

    def _parse_depths(self) -> tuple[int, ...]:
        check_positive(**{"arch['depth']": self.arch['depth']})
        return (1,) * self.arch['depth']

    def _finish(self) -> None:
        """Initialise the tokens and the outputs of the mixers, and apply ``frozen_stages``."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith(self._stem):
                nn.init.trunc_normal_(parameter, std=0.02)
        for layer in self.layers:
            # The outputs of all layers add up: keep the variance of their sum, as GPT-2 does.
            nn.init.kaiming_uniform_(layer.mixer.out_proj.weight, a=math.sqrt(5))
            with torch.no_grad():
                layer.mixer.out_proj.weight /= math.sqrt(self.num_layers)
        super()._finish()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features.

        Args:
            x (Tensor): (batch, in_channels, [frames,] height, width), as the patch embedding
                expects.

        Returns:
            tuple[Tensor, ...]: One output of kind ``out_type`` for each of ``out_indices``.

        Raises:
            ValueError: If the shape is wrong, an image is smaller than a patch, or the number of
                frames is not a multiple of ``tubelet_size``.
        """
        hidden, grid = self._embed(x)
        hidden = self.layers[0].drop_path(hidden)
        residual, outputs, first = None, [], 0
        for last in self.out_indices:
            hidden, residual = self._run_layers(first, last, hidden, residual)
            # Drawn once, for the output and for the next layer.
            hidden = self._drop_path_after(last)(hidden)
            outputs.append(self._output(self._stream(last, hidden, residual), grid))
            first = last + 1
        return tuple(outputs)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Make the tokens (batch, length, channels), and the rows and columns of patches."""
        patches, grid = self.patch_embed(x)
        tokens = [getattr(self, name) for name in self._token_names]
        positions = token_positions(self.cls_token_place, math.prod(grid))
        hidden = insert_tokens(patches, tokens, positions).contiguous()
        if self.pos_embed is not None:
            hidden = hidden + self._resized_pos_embed(grid)
        return self.drop_after_pos(hidden), grid

    def _resized_pos_embed(self, grid: tuple[int, int]) -> Tensor:
        return resize_pos_embed(
            self.pos_embed, self.grid, grid, self.cls_token_place, self.interpolate_mode
        )

    def _run_layers(
        self, first: int, last: int, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        recompute = self.with_cp and self.training
        return run_blocks(self.layers, first, last, hidden, residual, recompute=recompute)

    def _drop_path_after(self, index: int) -> DropPath:
        is_last = index == self.num_layers - 1
        return self.drop_path if is_last else self.layers[index + 1].drop_path

    def _stream(self, index: int, hidden: Tensor, residual: Tensor) -> Tensor:
        """Add the hidden state of layer ``index`` to the residual, and norm it by ``out_norm``."""
        is_last = index == self.num_layers - 1
        if self.out_norm == 'shared' or (is_last and self.out_norm != 'none'):
            return self.norm_f(hidden, residual)
        if self.out_norm == 'separate':
            return getattr(self, f'norm{index}')(hidden, residual)
        return (hidden + residual).to(hidden.dtype)

    def _output(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Make an output of kind ``out_type`` from all tokens (batch, length, channels)."""
        raise NotImplementedError

    def _split(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Patches and class tokens of ``x`` (batch, length, channels)."""
        num_patches = x.shape[1] - self.num_extra_tokens
        return split_tokens(x, token_positions(self.cls_token_place, num_patches))

    def token_layout(self, shape: Sequence[int], layer: str) -> TokenLayout:
        """Return the layout of the tokens, the same in every layer, in the images or clips."""
        size = self.patch_embed.grid(*shape[-2:])
        steps = self.patch_embed.steps(shape[2]) if len(shape) == 5 else None
        patches = math.prod(size) * (steps or 1)
        return TokenLayout(size, steps, token_positions(self.cls_token_place, patches))

    @property
    def cam_layer(self) -> str:
        """Name of the last norm before a mixer.

        After the last layer of a classifier that reads a class token, the patches have no
        influence.
        """
        return f'{super().cam_layer}.norm'

    def _describe(self) -> str:
        return (
            f'embed_dims={self.embed_dims}, depth={self.num_layers}, bimamba={self.bimamba!r}, '
            f'cls_token={self.cls_token_place!r}'
        )

    def _check_structure(self, keys: list[str]) -> None:
        depth = layer_count(keys, r'layers\.(\d+)\.mixer\.A_log$')
        if depth != self.num_layers:
            self._reject(f'its depth is {depth}')
        if 'layers.0.mixer.conv1d_b.weight' in keys:
            bimamba = 'v2'
        else:
            bimamba = 'v1' if 'layers.0.mixer.A_b_log' in keys else 'none'
        if bimamba != self.bimamba:
            self._reject(f'its bimamba is {bimamba!r}')

    def _is_dropped(self, key: str) -> bool:
        unwanted = self.out_norm == 'none' and key.startswith('norm_f.')
        return unwanted or super()._is_dropped(key)

    def _fit_own(
        self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: Mapping
    ) -> None:
        """Resize a position embedding of another image size; drop an unwanted class token."""
        pos_embed = state_dict.get(f'{prefix}pos_embed')
        single, double = f'{prefix}cls_token', f'{prefix}cls_token_head'
        place = self.cls_token_place
        if double in state_dict:
            place = 'double'
        elif single in state_dict:
            # A checkpoint does not state the position of its class token.
            place = self._released_cls_token if place in ('double', 'none') else place
        elif pos_embed is not None and keys_under(state_dict, f'{prefix}layers.'):
            place = 'none'
        if place != self.cls_token_place and self.cls_token_place != 'none':
            self._reject(f'its class token is {place!r}')
        if place != self.cls_token_place:
            for name in ('cls_token', 'cls_token_head', 'cls_token_tail'):
                state_dict.pop(prefix + name, None)
            self._log(
                f'the checkpoint has a class token ({place}) and this model has none; the token '
                'and its position embedding are not loaded',
                logging.WARNING,
            )
        if pos_embed is None or self.pos_embed is None:
            return
        if pos_embed.dim() != 3 or pos_embed.shape[2] != self.embed_dims:
            return  # reported with the other sizes
        positions = token_positions(place, pos_embed.shape[1])
        source = self._source_grid(pos_embed.shape[1] - len(positions), local_metadata)
        if place != self.cls_token_place:
            positions = token_positions(place, math.prod(source))
            pos_embed = split_tokens(pos_embed, positions)[0]
        if source != self.grid:
            pos_embed = resize_pos_embed(
                pos_embed, source, self.grid, self.cls_token_place, self.interpolate_mode
            )
            self._log(f'resized the position embedding from {source} to {self.grid} patches')
        state_dict[f'{prefix}pos_embed'] = pos_embed

    def _source_grid(self, num_patches: int, local_metadata: Mapping) -> tuple[int, int]:
        """Rows and columns of a checkpoint's position embedding.

        Our own checkpoints have it in their metadata. Otherwise the same number of patches means
        the same grid, and another number a square or, if it is not one, our aspect ratio.
        """
        saved = local_metadata.get('pos_grid')
        if saved is not None and math.prod(saved) == num_patches:
            return tuple(saved)
        if num_patches == math.prod(self.grid):
            return self.grid
        side = math.isqrt(num_patches)
        if side * side == num_patches:
            return side, side
        rows = round(math.sqrt(num_patches * self.grid[0] / self.grid[1]))
        if rows and num_patches % rows == 0:
            return rows, num_patches // rows
        self._reject(f'its position embedding has {num_patches} patches, which is no grid')


def _save_grid(module: PlainBackbone, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Write the grid of the position embedding into a checkpoint's metadata."""
    local_metadata['pos_grid'] = list(module.grid)
