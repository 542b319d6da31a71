"""The Mamba mixer of mamba_ssm, and of the forks of Vim, VideoMamba and SegMamba."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from torch import Tensor, nn

from mmvim import ops
from mmvim._checks import check_choice, check_positive
from mmvim.dropin import convolutions
from mmvim.dropin.placeholders import FROM_OTHERS, attributes_of
from mmvim.layers.fusion import Fusable, Parts, parts
from mmvim.ops._library import as_compute_dtype
from mmvim.ops.mixer import mixer, serves

from ..ops.selective_scan_interface import (
    bimamba_inner_fn,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    selective_scan_fn,
)
from ..ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from ..ops.triton.selective_state_update import selective_state_update
from ..utils.generation import InferenceParams
from . import block

# Some code imports all names from here, those of other modules among them.
__all__ = [
    'Block',
    'F',
    'Mamba',
    'RMSNorm',
    'Tensor',
    'bimamba_inner_fn',
    'causal_conv1d_fn',
    'causal_conv1d_update',
    'layer_norm_fn',
    'mamba_inner_fn',
    'mamba_inner_fn_no_out_proj',
    'math',
    'nn',
    'rms_norm_fn',
    'selective_scan_fn',
    'selective_state_update',
    'torch',
]
__all__ += [*FROM_OTHERS]
__getattr__ = attributes_of(__name__)

_ONE = parts(
    in_proj=nn.Linear, conv1d=nn.Conv1d, x_proj=nn.Linear, dt_proj=nn.Linear, out_proj=nn.Linear
)
_TWO = _ONE | parts(conv1d_b=nn.Conv1d, x_proj_b=nn.Linear, dt_proj_b=nn.Linear)


class Mamba(Fusable):
    """Mamba mixer (Gu and Dao, https://arxiv.org/abs/2312.00752), and those of its forks.

    Parameters, their names and their initialisation are those of mamba_ssm and of the forks.

    Args:
        d_model: Channels of input and output.
        d_state: States per channel.
        d_conv: Convolution width, 2 to 4.
        expand: The mixer has ``int(expand * d_model)`` channels inside.
        dt_rank: Rank of Δ; ``'auto'`` is ``ceil(d_model / 16)``.
        dt_min, dt_max, dt_init_floor: The initial Δ is log-uniform in [dt_min, dt_max], and not
            below the floor.
        dt_init, dt_scale: ``'random'`` draws the weight of Δ from U(±dt_scale · rank^-0.5),
            ``'constant'`` sets it to the bound.
        conv_bias: Bias of the convolution.
        bias: Bias of ``in_proj`` and ``out_proj``.
        use_fast_path: No effect: both directions are computed in either case.
        layer_idx: Key of the states in ``InferenceParams``.
        device, dtype: Of the parameters; A and D are kept in float32.
        bimamba_type: ``'none'``, ``'v1'`` (the scan from the end has its own A), ``'v2'`` (it has
            its own everything but ``in_proj`` and ``out_proj``) or ``'v3'`` (SegMamba's, a third
            scan across ``nslices`` slices of the sequence, with its own everything as well).
        if_divide_out: Whether ``'v2'`` halves the sum of the two directions. ``if_devide_out`` is
            the same.
        init_layer_scale: Initial value of a learnt scale of the output, ``gamma``; None for none.
        bimamba: VideoMamba's: True for ``'v2'``, False for ``'none'``.
        nslices: Slices for ``'v3'``, a divisor of the length.

    Raises:
        ValueError: If an argument is not among the allowed ones.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int | float = 2,
        dt_rank: int | str = 'auto',
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = 'random',
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str = 'none',
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        if_devide_out: bool = False,
        bimamba: bool | None = None,
        nslices: int = 5,
    ) -> None:
        super().__init__()
        check_choice('dt_init', dt_init, ('random', 'constant'))
        check_choice('d_conv', d_conv, (2, 3, 4))
        if bimamba is not None:
            check_choice('bimamba', bimamba, (True, False))
            bimamba_type = 'v2' if bimamba else 'none'
        check_choice('bimamba_type', bimamba_type, ('none', None, 'v1', 'v2', 'v3'))
        check_positive(nslices=nslices)
        factory = {'device': device, 'dtype': dtype}
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == 'auto' else dt_rank
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.bimamba_type = bimamba_type
        self.if_divide_out = self.if_devide_out = if_divide_out or if_devide_out
        self.init_layer_scale = init_layer_scale
        self.nslices = nslices
        self.activation = 'silu'
        self.act = nn.SiLU()
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model))

        # Random numbers are drawn in mamba_ssm's order: a seed gives the same weights.
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = self._convolution(conv_bias, factory)
        self.x_proj = self._to_low_rank(factory)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, **factory)
        bound = self.dt_rank**-0.5 * dt_scale
        if dt_init == 'constant':
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(dt_min), math.log(dt_max)
        delta = torch.exp(torch.rand(self.d_inner, **factory) * (high - low) + low)
        delta = delta.clamp(min=dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))
        self.dt_proj.bias._no_reinit = True
        self.A_log = self._initial_a_log(device)
        self.D = self._initial_skip(device)
        if bimamba_type == 'v1':
            self.A_b_log = self._initial_a_log(device)
        for suffix in {'v2': ('_b',), 'v3': ('_b', '_s')}.get(bimamba_type, ()):
            setattr(self, f'A{suffix}_log', self._initial_a_log(device))
            setattr(self, f'conv1d{suffix}', self._convolution(conv_bias, factory))
            setattr(self, f'x_proj{suffix}', self._to_low_rank(factory))
            dt_proj = nn.Linear(self.dt_rank, self.d_inner, **factory)
            setattr(self, f'dt_proj{suffix}', dt_proj)
            setattr(self, f'D{suffix}', self._initial_skip(device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _convolution(self, bias: bool, factory: dict) -> nn.Conv1d:
        return nn.Conv1d(
            self.d_inner,
            self.d_inner,
            self.d_conv,
            groups=self.d_inner,
            padding=self.d_conv - 1,
            bias=bias,
            **factory,
        )

    def _to_low_rank(self, factory: dict) -> nn.Linear:
        return nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False, **factory)

    def _initial_a_log(self, device: torch.device | str | None) -> nn.Parameter:
        steps = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=device)
        a_log = nn.Parameter(steps.log().repeat(self.d_inner, 1))
        a_log._no_weight_decay = True
        return a_log

    def _initial_skip(self, device: torch.device | str | None) -> nn.Parameter:
        skip = nn.Parameter(torch.ones(self.d_inner, device=device))
        skip._no_weight_decay = True
        return skip

    @property
    def _fused_parts(self) -> Parts:
        return _TWO if self.bimamba_type == 'v2' else _ONE

    @property
    def _scale(self) -> float:
        return 0.5 if self.bimamba_type == 'v2' and self.if_divide_out else 1.0

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: InferenceParams | None = None,
        T: int = 1,
    ) -> Tensor:
        """Mix along the sequence.

        Args:
            hidden_states: (b, l, d_model).
            inference_params: States to start (``seqlen_offset == 0``) or to continue by one step;
                only for ``bimamba_type='none'``.
            T: No effect, as in VideoMamba.

        Returns:
            (b, l, d_model).
        """
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.d_model:
            raise ValueError(
                f'hidden_states must have the axes (b, l, {self.d_model}), '
                f'got shape {tuple(hidden_states.shape)}'
            )
        states = None
        if inference_params is not None:
            if self.bimamba_type in ('v1', 'v2', 'v3'):
                raise ValueError(
                    f'inference_params needs one direction, got bimamba_type='
                    f'{self.bimamba_type!r}; call the layer without it'
                )
            states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
        if states is None and self._may_fuse(hidden_states):
            return self._scaled(self._fused(hidden_states))
        u, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        options = {'delta_softplus': True, 'check_values': False}
        if self.bimamba_type in ('v1', 'v2', 'v3'):
            forward, backward = self._directions(u)
            y = ops.bidirectional_scan(forward, backward, z, scale=self._scale, **options)
            if self.bimamba_type == 'v3':
                y = y + self._across_slices(u, z, options)
        elif states is None:
            *inputs, bias = self._scan_inputs(self._convolved(u))
            y = ops.selective_scan(*inputs, z, bias, **options)
        else:
            conv_state, ssm_state = states
            conv_state.copy_(F.pad(u.detach().transpose(1, 2), (self.d_conv - u.shape[1], 0)))
            *inputs, bias = self._scan_inputs(self._convolved(u))
            y, last = ops.selective_scan(*inputs, z, bias, return_last_state=True, **options)
            ssm_state.copy_(last.detach())
        return self._scaled(self.out_proj(y))

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.init_layer_scale is None else out * self.gamma

    def _convolved(self, u: Tensor, suffix: str = '') -> Tensor:
        conv = getattr(self, f'conv1d{suffix}')
        return ops.causal_conv1d(
            u,
            conv.weight.squeeze(1),
            conv.bias,
            activation='silu',
            mode='reverse' if suffix == '_b' else 'causal',
        )

    def _scan_inputs(self, u: Tensor, suffix: str = '') -> ops.ScanInputs:
        x_proj, dt_proj = getattr(self, f'x_proj{suffix}'), getattr(self, f'dt_proj{suffix}')
        sizes = (self.dt_rank, self.d_state, self.d_state)
        low_rank, B, C = x_proj(u).split(sizes, dim=-1)
        return ops.ScanInputs(
            u=u,
            delta=F.linear(low_rank, dt_proj.weight),
            A=self._matrix(getattr(self, f'A{suffix}_log')),
            B=B,
            C=C,
            D=as_compute_dtype(getattr(self, f'D{suffix}')),
            delta_bias=as_compute_dtype(dt_proj.bias),
        )

    @staticmethod
    def _matrix(a_log: Tensor) -> Tensor:
        return -torch.exp(as_compute_dtype(a_log))

    def _directions(self, u: Tensor) -> tuple[ops.ScanInputs, ops.ScanInputs]:
        forward = self._scan_inputs(self._convolved(u))
        if self.bimamba_type != 'v1':
            return forward, self._scan_inputs(self._convolved(u, '_b'), '_b')
        A = self._matrix(self.A_b_log)
        u, delta, _, B, C, D, bias = forward
        return forward, ops.ScanInputs(u, delta, A, B, C, D, bias)

    def _across_slices(self, u: Tensor, z: Tensor, options: dict) -> Tensor:
        """Scan the first steps of all slices, then the second ones, and so on."""
        if u.shape[1] % self.nslices:
            raise ValueError(
                f'nslices={self.nslices} must divide the length of the sequence, {u.shape[1]}'
            )
        u, z = (x.unflatten(1, (self.nslices, -1)).transpose(1, 2).flatten(1, 2) for x in (u, z))
        *inputs, bias = self._scan_inputs(self._convolved(u, '_s'), '_s')
        y = ops.selective_scan(*inputs, z, bias, **options)
        return y.unflatten(1, (-1, self.nslices)).transpose(1, 2).flatten(1, 2)

    def _may_fuse(self, x: Tensor) -> bool:
        if self.bimamba_type == 'v3':
            return False
        return super()._may_fuse(x) and serves(None, x)

    def _fused(self, x: Tensor) -> Tensor:
        parameters = [
            self.in_proj.weight,
            self.in_proj.bias,
            self.out_proj.weight,
            self.out_proj.bias,
            *self._parameters_of(''),
        ]
        if self.bimamba_type == 'v2':
            parameters += self._parameters_of('_b')
        elif self.bimamba_type == 'v1':
            parameters += [*(None,) * 5, self.A_b_log, None]
        else:
            parameters += [None] * 7
        kind = self.bimamba_type if self.bimamba_type in ('v1', 'v2') else 'one'
        return mixer(x, parameters, kind, scale=self._scale)

    def _parameters_of(self, suffix: str) -> list[Tensor | None]:
        conv, dt_proj = getattr(self, f'conv1d{suffix}'), getattr(self, f'dt_proj{suffix}')
        return [
            conv.weight,
            conv.bias,
            getattr(self, f'x_proj{suffix}').weight,
            dt_proj.weight,
            dt_proj.bias,
            self.A_b_log if suffix else self.A_log,
            self.D_b if suffix else self.D,
        ]

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step.

        Args:
            hidden_states: (b, 1, d_model).
            conv_state: (b, d_inner, d_conv), overwritten.
            ssm_state: (b, d_inner, d_state), overwritten.

        Returns:
            The output (b, 1, d_model), and the two states.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
            raise ValueError(
                f'hidden_states must have the axes (b, 1, {self.d_model}): one step at a time, '
                f'got shape {tuple(hidden_states.shape)}'
            )
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        conv = self.conv1d
        x = convolutions.update(x, conv_state, conv.weight.squeeze(1), conv.bias, 'silu')
        low_rank, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        y = selective_state_update(
            ssm_state,
            x,
            F.linear(low_rank, self.dt_proj.weight),
            self._matrix(self.A_log),
            B,
            C,
            self.D,
            z=z,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
        )
        return self._scaled(self.out_proj(y)).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """States before the first step: zeros (b, d_inner, d_conv) and (b, d_inner, d_state)."""
        states = []
        for like, width in ((self.conv1d.weight, self.d_conv), (self.dt_proj.weight, self.d_state)):
            states.append(
                torch.zeros(
                    batch_size,
                    self.d_inner,
                    width,
                    device=like.device,
                    dtype=like.dtype if dtype is None else dtype,
                )
            )
        return tuple(states)

    def _get_states_from_cache(
        self, inference_params: InferenceParams, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError('inference_params needs layer_idx, which is None: give it to Mamba')
        states = inference_params.key_value_memory_dict
        if self.layer_idx not in states:
            states[self.layer_idx] = self.allocate_inference_cache(
                batch_size, inference_params.max_seqlen
            )
        return states[self.layer_idx]


class Block(block.Block):
    """The block of mamba_ssm 1, without an MLP; see :class:`mamba_ssm.modules.block.Block`."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)
