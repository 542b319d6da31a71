"""What the backbones that are one plain stack of Mamba blocks share."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NoReturn

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvim._checks import check_choice, check_flags, check_indices, check_number, check_positive
from mmvim.layers import (
    DropPath,
    MambaBlock,
    build_norm,
    drop_path_rates,
    resize_pos_embed,
    split_tokens,
    token_positions,
)
from mmvim.layers.position import RESIZE_MODES

from .checkpoint import (
    keys_under,
    layer_count,
    rename_keys,
    size_mismatches,
    unwrap_state_dict,
)

_HEAD_KEYS = ('head.weight', 'head.bias')
LAYER_KEY = r'layers\.(\d+)\.(mixer|norm)\.'


class MambaBackbone(BaseModule):
    """Patch embedding, tokens, position embedding, and a stack of :class:`MambaBlock`.

    A subclass sets ``arch``, ``embed_dims``, ``num_layers``, ``out_indices``, ``out_norm``,
    ``cls_token_place``, ``interpolate_mode``, ``bimamba``, ``frozen_stages``, ``with_cp``,
    ``patch_embed``, ``grid``, its tokens and embeddings, ``drop_after_pos``, calls
    :meth:`_build_layers`, and in the end :meth:`_finish`.
    """

    arch_zoo: dict = {}  # noqa: RUF012
    # Parameters before the layers, besides the patch embedding's.
    _token_names: tuple[str, ...] = ('cls_token', 'pos_embed')
    # Where the class token of released checkpoints stands: they do not say it.
    _released_cls_token = 'middle'

    @property
    def num_extra_tokens(self) -> int:
        """Number of class tokens in the sequence."""
        return len(token_positions(self.cls_token_place, 1))

    def _parse_arch(self, arch: str | dict) -> dict:
        if isinstance(arch, str):
            check_choice('arch', arch, tuple(self.arch_zoo))
            return dict(self.arch_zoo[arch])
        if not isinstance(arch, Mapping):
            raise TypeError(f'arch={arch!r} must be one of {sorted(self.arch_zoo)} or a dict')
        allowed = {'embed_dims', 'depth', 'd_state', 'd_conv', 'expand', 'dt_rank'}
        unknown, missing = set(arch) - allowed, {'embed_dims', 'depth'} - set(arch)
        if unknown or missing:
            raise ValueError(
                f'arch has unknown keys {sorted(unknown)} and lacks {sorted(missing)}; '
                f'allowed: {sorted(allowed)}'
            )
        for key in ('embed_dims', 'depth'):
            check_positive(**{f'arch[{key!r}]': arch[key]})
        return dict(arch)

    def _parse_out_indices(self, out_indices: int | Sequence[int]) -> tuple[int, ...]:
        given = check_indices('out_indices', out_indices)
        depth = self.num_layers
        indices = tuple(i + depth if i < 0 else i for i in given)
        if not indices or any(not 0 <= i < depth for i in indices):
            raise ValueError(f'out_indices={out_indices!r} must be layers of 0 .. {depth - 1}')
        if any(a >= b for a, b in itertools.pairwise(indices)):
            raise ValueError(f'out_indices={out_indices!r} must be ascending, each layer once')
        return indices

    def _build_layers(
        self,
        *,
        merge: str | None,
        norm: str,
        norm_eps: float,
        residual_in_fp32: bool,
        drop_path_rate: float,
        ops_backend: str,
        recompute: bool | None,
        reverse_odd: bool = False,
        **mixer: object,
    ) -> None:
        """Make ``layers``, ``drop_path``, ``norm_f`` and the norms of single outputs."""
        check_flags(with_cp=self.with_cp, residual_in_fp32=residual_in_fp32)
        check_number('norm_eps', norm_eps, 0)
        check_choice('interpolate_mode', self.interpolate_mode, RESIZE_MODES)
        rates = drop_path_rates(drop_path_rate, self.num_layers)
        norm_args = {
            'eps': norm_eps, 'residual_in_fp32': residual_in_fp32, 'ops_backend': ops_backend
        }  # fmt: skip
        mixer.update({k: v for k, v in self.arch.items() if k not in ('embed_dims', 'depth')})
        if self.bimamba != 'none':
            mixer['merge'] = merge
            # What with_cp makes again as a whole need not be made again in parts.
            mixer['recompute'] = False if self.with_cp and recompute is None else recompute
        elif recompute:
            raise ValueError("recompute=True needs bimamba='v2', not 'none'")
        self.layers = nn.ModuleList(
            MambaBlock(
                self.embed_dims,
                bidirectional=None if self.bimamba == 'none' else self.bimamba,
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
        if self.out_norm != 'none':
            self.norm_f = build_norm(norm, self.embed_dims, **norm_args)
        if self.out_norm == 'separate':
            for i in self.out_indices:
                if i != self.num_layers - 1:
                    self.add_module(f'norm{i}', build_norm(norm, self.embed_dims, **norm_args))

    def _finish(self) -> None:
        self._reset_tokens_and_outputs()
        self._register_state_dict_hook(_save_grid)
        self._freeze_stages()

    def _reset_tokens_and_outputs(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith(self._token_names):
                nn.init.trunc_normal_(parameter, std=0.02)
        for layer in self.layers:
            # The outputs of all layers add up: keep their sum's variance as GPT-2 does.
            nn.init.kaiming_uniform_(layer.mixer.out_proj.weight, a=math.sqrt(5))
            with torch.no_grad():
                layer.mixer.out_proj.weight /= math.sqrt(self.num_layers)

    def _freeze_stages(self) -> None:
        stages = self.frozen_stages
        if not isinstance(stages, int) or not -1 <= stages <= self.num_layers:
            raise ValueError(f'frozen_stages={stages!r} must be in -1 .. {self.num_layers}')
        for module in self._frozen_modules():
            module.requires_grad_(False)
        if self.frozen_stages >= 0:
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith(self._token_names):
                    parameter.requires_grad_(False)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        modules = [self.patch_embed, self.drop_after_pos, *self.layers[: self.frozen_stages]]
        if self.frozen_stages == self.num_layers:
            modules.append(self.drop_path)
            modules += [m for name, m in self.named_children() if name.startswith('norm')]
        return modules

    def train(self, mode: bool = True) -> MambaBackbone:
        """Switch to training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the depth of a parameter, for layer-wise learning-rate decay.

        Args:
            param_name (str): Full name of the parameter.
            prefix (str): What stands before this backbone's own names, such as ``'backbone.'``.
                Defaults to ''.

        Returns:
            tuple[int, int]: The depth, and the number of depths. Depth 0 is the patch embedding,
            the tokens and the position embeddings, ``i + 1`` layer ``i``, and the last everything
            after the layers, other modules of the model included.
        """
        num_depths = self.num_layers + 2
        if not param_name.startswith(prefix):
            return num_depths - 1, num_depths
        name = param_name[len(prefix) :]
        if name.startswith(('patch_embed.', *self._token_names)):
            return 0, num_depths
        match = re.match(r'layers\.(\d+)\.', name)
        return (int(match[1]) + 1 if match else num_depths - 1), num_depths

    def _run_layer(
        self, layer: MambaBlock, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.with_cp and self.training:
            return checkpoint(layer, hidden, residual, use_reentrant=False)
        return layer(hidden, residual)

    def _drop_path_after(self, index: int) -> DropPath:
        is_last = index == self.num_layers - 1
        return self.drop_path if is_last else self.layers[index + 1].drop_path

    def _stream(self, index: int, hidden: Tensor, residual: Tensor) -> Tensor:
        """Add the hidden state of layer ``index`` to the residual; norm it as ``out_norm`` says."""
        is_last = index == self.num_layers - 1
        if self.out_norm == 'shared' or (is_last and self.out_norm != 'none'):
            return self.norm_f(hidden, residual)
        if self.out_norm == 'separate':
            return getattr(self, f'norm{index}')(hidden, residual)
        return (hidden + residual).to(hidden.dtype)

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

    def _unwrap(self, state_dict: MutableMapping[str, Any]) -> None:
        """Undo what the official training scripts wrap weights in."""
        unwrap_state_dict(state_dict)

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
        if any(k.startswith('backbone.') for k in keys) or not layer_count(keys, LAYER_KEY):
            return
        heads = {k: k.replace('head.', 'head.fc.') for k in _HEAD_KEYS}
        names = {prefix + k: prefix + heads.get(k, f'backbone.{k}') for k in keys}
        rename_keys(state_dict, names)

    def _fit_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: Mapping
    ) -> None:
        keys = keys_under(state_dict, prefix)
        own = {name for name, _ in self.named_parameters()}
        if any('_flat_param' in key for key in keys) or not own:
            return  # shards of FSDP's own format
        self._check_keys(keys, own, prefix)
        for key in filter(self._is_dropped, keys):
            del state_dict[prefix + key]
            print_log(
                f"{type(self).__name__}: '{key}' of the checkpoint is the classifier's and is not "
                'loaded',
                logger='current',
                level=logging.DEBUG,
            )
        if self.out_norm == 'none':
            state_dict.pop(f'{prefix}norm_f.weight', None)
            state_dict.pop(f'{prefix}norm_f.bias', None)
        self._fit_own(state_dict, prefix)
        self._fit_pos_embed(state_dict, prefix, local_metadata)
        wrong = size_mismatches(self, state_dict, prefix)
        if wrong:
            name, given, expected = wrong[0]
            more = f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''
            self._reject(f'{prefix}{name} is {given} there and {expected} here{more}')

    def _is_dropped(self, key: str) -> bool:
        """Whether the checkpoint's ``key`` belongs to a classifier."""
        return key in _HEAD_KEYS

    def _fit_own(self, state_dict: MutableMapping[str, Any], prefix: str) -> None:
        """Fit what only this model has."""

    def _describe(self) -> str:
        return (
            f'embed_dims={self.embed_dims}, depth={self.num_layers}, bimamba={self.bimamba!r}, '
            f'cls_token={self.cls_token_place!r}'
        )

    def _reject(self, reason: str) -> NoReturn:
        raise ValueError(
            f'the checkpoint does not fit this {type(self).__name__} ({self._describe()}): {reason}'
        )

    def _check_keys(self, keys: list[str], own: set[str], prefix: str) -> None:
        if prefix and not keys:
            self._reject(
                f"it has no key that starts with '{prefix}' (weights of a backbone alone go into "
                "the backbone's init_cfg=dict(type='Pretrained', checkpoint=…))"
            )
        depth = layer_count(keys, r'layers\.(\d+)\.mixer\.A_log$')
        foreign = [k for k in keys if k not in own and not self._is_dropped(k)]
        if foreign and not layer_count(keys, LAYER_KEY):
            found = next((re.match(rf'(.*\.){LAYER_KEY}', k) for k in keys if 'mixer.' in k), None)
            hint = (
                f"; a {type(self).__name__}'s keys stand under '{prefix}{found[1]}': give that "
                'prefix'
                if found
                else ''
            )
            self._reject(f"its keys are another model's: {', '.join(foreign[:3])} …{hint}")
        if not depth:
            return
        if depth != self.num_layers:
            self._reject(f'its depth is {depth}')
        if 'layers.0.mixer.conv1d_b.weight' in keys:
            bimamba = 'v2'
        else:
            bimamba = 'v1' if 'layers.0.mixer.A_b_log' in keys else 'none'
        if bimamba != self.bimamba:
            self._reject(f'its bimamba is {bimamba!r}')

    def _fit_pos_embed(
        self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: Mapping
    ) -> None:
        """Resize a position embedding of another image size; drop an unwanted class token."""
        pos_embed = state_dict.get(f'{prefix}pos_embed')
        single, double = f'{prefix}cls_token', f'{prefix}cls_token_head'
        place = self.cls_token_place
        if double in state_dict:
            place = 'double'
        elif single in state_dict:
            # A checkpoint does not say where its class token stands.
            place = self._released_cls_token if place in ('double', 'none') else place
        elif pos_embed is not None and keys_under(state_dict, f'{prefix}layers.'):
            place = 'none'
        if place != self.cls_token_place and self.cls_token_place != 'none':
            self._reject(f'its class token is {place!r}')
        if place != self.cls_token_place:
            for name in ('cls_token', 'cls_token_head', 'cls_token_tail'):
                state_dict.pop(prefix + name, None)
            print_log(
                f'{type(self).__name__}: the checkpoint has a class token ({place}) and this model '
                'has none; the token and its position embedding are not loaded',
                logger='current',
                level=logging.WARNING,
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
            print_log(
                f'{type(self).__name__}: resized the position embedding from {source} to '
                f'{self.grid} patches',
                logger='current',
                level=logging.INFO,
            )
        state_dict[f'{prefix}pos_embed'] = pos_embed

    def _source_grid(self, num_patches: int, local_metadata: Mapping) -> tuple[int, int]:
        """Rows and columns of a checkpoint's position embedding.

        Our own checkpoints say it in their metadata. Otherwise the same number of patches means
        the same grid, and another number a square or, if it is none, our aspect ratio.
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


def _save_grid(module: MambaBackbone, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Write into a checkpoint's metadata which grid its position embedding is for."""
    local_metadata['pos_grid'] = list(module.grid)
