"""The Mamba mixer: a gated selective state-space layer over (batch, length, dim)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvim import ops
from mmvim._checks import check_choice, check_flags, check_number, check_positive
from mmvim.ops._library import as_compute_dtype, compute_dtype
from mmvim.ops._validation import MAX_STATES
from mmvim.ops.backend import BACKENDS
from mmvim.ops.mixer import AddNorm, mixer, serves

from .conv import CausalConv1d
from .fusion import Fusable, parts


class MambaState(NamedTuple):
    """State of a :class:`Mamba` mixer between chunks of one sequence.

    Attributes:
        conv (Tensor): (batch, d_inner, d_conv - 1), the last inputs of the convolution.
        ssm (Tensor): (batch, d_inner, d_state) float32, the scan's state; (batch, d_inner,
            2 * d_state) for the discretizations 'foh_hold' and 'tustin', which also need the
            previous input.
    """

    conv: Tensor
    ssm: Tensor


class DeltaProjection(nn.Module):
    """Low-rank projection to the step size Δ, whose bias enters inside the scan.

    ``forward`` applies the weight only; the scan adds ``bias`` once, before the softplus. It is
    not a :class:`torch.nn.Linear`, so that a re-initialisation of all linear layers does not affect
    Δ.

    Args:
        rank (int): Input size.
        dim (int): Output size.
        init (str): 'proper' draws softplus(bias) log-uniformly from [dt_min, dt_max] and the
            weight from U(±rank^-0.5), as Mamba does; 'zero' initialises the weight as in a linear
            layer and sets the bias to 0, which makes Δ about 0.69. Defaults to 'proper'.
        dt_min (float): Smallest initial Δ. Defaults to 1e-3.
        dt_max (float): Largest initial Δ. Defaults to 0.1.
    """

    def __init__(
        self,
        rank: int,
        dim: int,
        init: str = 'proper',
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice('init', init, ('proper', 'zero'))
        if not 0 < dt_min <= dt_max:
            raise ValueError(
                f'dt_min={dt_min!r}, dt_max={dt_max!r}: 0 < dt_min <= dt_max is needed'
            )
        self.rank = rank
        self.dim = dim
        self.init = init
        self.dt_min = dt_min
        self.dt_max = dt_max
        self.weight = nn.Parameter(torch.empty(dim, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise weight and bias by ``init``."""
        # Both draw the weight from U(±rank^-0.5), as torch's linear layers do.
        bound = self.rank**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.init == 'zero':
            nn.init.zeros_(self.bias)
            return
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        with torch.no_grad():
            delta = torch.empty_like(self.bias, dtype=torch.float32).uniform_(low, high).exp_()
            self.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def forward(self, x: Tensor) -> Tensor:
        """Project ``x`` (..., rank) to (..., dim), without the bias."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f'rank={self.rank}, dim={self.dim}, init={self.init!r}'


def packed(seq_idx: Tensor | None) -> dict[str, Tensor]:
    """The argument of a module that needs to know of it only where sequences are packed."""
    return {} if seq_idx is None else {'seq_idx': seq_idx}


class MixerBase(Fusable):
    """Common parameters and parts of :class:`Mamba` and :class:`mmvim.layers.BiMamba`."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int | float = 2,
        dt_rank: int | str = 'auto',
        conv_bias: bool = True,
        bias: bool = False,
        layer_scale: float | None = None,
        discretization: str = 'zoh',
        dt_init: str = 'proper',
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        reverse: bool = False,
        recompute: bool | None = None,
        ops_backend: str = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, d_state=d_state)
        check_number('d_state', d_state, 1, MAX_STATES + 1)
        check_choice('discretization', discretization, tuple(ops.DISCRETIZATIONS))
        check_choice('dt_init', dt_init, ('proper', 'official'))
        check_number('expand', expand, 0)
        if dt_rank == 'auto':
            dt_rank = math.ceil(d_model / 16)
        check_positive(dt_rank=dt_rank)
        check_choice('d_conv', d_conv, (2, 3, 4))
        check_flags(conv_bias=conv_bias, bias=bias, reverse=reverse)
        check_choice('recompute', recompute, (None, True, False))
        if layer_scale is not None:
            check_number('layer_scale', layer_scale, -math.inf)
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        check_positive(d_inner=self.d_inner)
        self.dt_rank = dt_rank
        self.discretization = discretization
        self.dt_init = dt_init
        self.reverse = reverse
        self.recompute = recompute
        check_choice('ops_backend', ops_backend, BACKENDS)
        self.ops_backend = ops_backend
        self._factory = {'device': device, 'dtype': dtype}

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **self._factory)
        self.conv1d = CausalConv1d(
            self.d_inner,
            d_conv,
            bias=conv_bias,
            activation='silu',
            mode='reverse' if reverse else 'causal',
            ops_backend=ops_backend,
            **self._factory,
        )
        self.x_proj = nn.Linear(self.d_inner, dt_rank + 2 * d_state, bias=False, **self._factory)
        self.dt_proj = DeltaProjection(
            dt_rank, self.d_inner, dt_min=dt_min, dt_max=dt_max, **self._factory
        )
        self.A_log = self._initial_a_log()
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **self._factory)
        if layer_scale is None:
            self.register_parameter('gamma', None)
        else:
            self.gamma = nn.Parameter(torch.full((d_model,), float(layer_scale), **self._factory))

    def _initial_a_log(self) -> nn.Parameter:
        """S4D-real initialisation: A = -1, -2 .. -d_state for each channel, kept in float32."""
        steps = torch.arange(
            1, self.d_state + 1, dtype=torch.float32, device=self._factory['device']
        )
        return nn.Parameter(steps.log().repeat(self.d_inner, 1))

    def _zero_state(
        self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> MambaState:
        """The state of the direction with the plain names before the first token."""
        conv = self.conv1d.init_state(batch_size, device=device, dtype=dtype)
        width = self.d_state * (2 if self.discretization in ops.TWO_TAP else 1)
        ssm = torch.zeros(
            batch_size, self.d_inner, width, device=conv.device, dtype=compute_dtype(conv.dtype)
        )
        return MambaState(conv, ssm)

    def _scan_inputs(
        self,
        u: Tensor,
        x_proj: nn.Linear,
        dt_proj: DeltaProjection,
        a_log: Tensor,
        skip: Tensor,
    ) -> ops.ScanInputs:
        """Derive Δ, B and C from ``u`` (batch, length, d_inner)."""
        if isinstance(dt_proj, nn.Linear) or not hasattr(dt_proj, 'bias'):
            raise TypeError(
                f'{type(dt_proj).__name__} cannot stand for a DeltaProjection: its forward has to '
                "leave out the bias of Δ, which the scan adds, and its attribute 'bias' has to "
                'have it'
            )
        low_rank, b, c = x_proj(u).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        return ops.ScanInputs(
            u=u,
            delta=dt_proj(low_rank),
            A=-torch.exp(as_compute_dtype(a_log)),
            B=b,
            C=c,
            D=as_compute_dtype(skip),
            delta_bias=as_compute_dtype(dt_proj.bias),
        )

    def _may_fuse(self, x: Tensor) -> bool:
        return (
            super()._may_fuse(x)
            and self._modules['x_proj']._parameters['bias'] is None
            and serves(self.ops_backend, x)
        )

    def _fused(self, x: Tensor, norm: AddNorm | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The step-by-step computation as one op, after a norm if there is one."""
        parameters, kind, reverse, scale = self._arguments()
        results = mixer(
            x,
            parameters,
            kind,
            reverse,
            scale,
            self._bias_scale,
            self.discretization,
            self.recompute,
            norm,
        )
        if norm is None:
            return self._scaled(results)
        out, stream = results
        return self._scaled(out), stream

    def _arguments(self) -> tuple[tuple[Tensor | None, ...], str, bool, float]:
        """The op's arguments ``parameters``, ``kind``, ``reverse`` and ``scale``."""
        raise NotImplementedError

    @property
    def _bias_scale(self) -> float:
        return 1.0

    def _is_silu(self, name: str, reverse: bool) -> bool:
        """Whether a convolution runs in this direction and applies SiLU."""
        conv = self._modules[name]
        return conv.mode == ('reverse' if reverse else 'causal') and conv.activation == 'silu'

    def _projections(self) -> tuple[Tensor | None, ...]:
        """Parameters of in_proj and out_proj, as the op wants them."""
        modules = self._modules
        one, two = modules['in_proj']._parameters, modules['out_proj']._parameters
        return one['weight'], one['bias'], two['weight'], two['bias']

    def _direction(self, suffix: str = '') -> tuple[Tensor | None, ...]:
        """Parameters of the direction whose names end so, as the op wants them."""
        modules = self._modules
        conv = modules[f'conv1d{suffix}']._parameters
        dt_proj = modules[f'dt_proj{suffix}']._parameters
        return (
            conv['weight'],
            conv['bias'],
            modules[f'x_proj{suffix}']._parameters['weight'],
            dt_proj['weight'],
            dt_proj['bias'],
            self.A_b_log if suffix else self.A_log,
            getattr(self, f'D{suffix}'),
        )

    def _project_out(self, y: Tensor) -> Tensor:
        return self._scaled(self.out_proj(y))

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.gamma is None else out * self.gamma

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(
                f'{type(self).__name__} wants (batch, length, {self.d_model}), got {tuple(x.shape)}'
            )

    def extra_repr(self) -> str:
        """Describe the layer."""
        text = f'd_model={self.d_model}, d_state={self.d_state}, {self.discretization!r}'
        return text + (', reverse=True' if self.reverse else '')


class Mamba(MixerBase):
    """One-directional Mamba mixer (Gu and Dao, https://arxiv.org/abs/2312.00752).

    ``x, z = in_proj(h); x = silu(conv1d(x)); Δ, B, C = x_proj(x); y = scan(x) * silu(z);
    out = out_proj(y)``. Parameter names are those of mamba_ssm: ``in_proj``, ``conv1d``,
    ``x_proj``, ``dt_proj``, ``A_log``, ``D``, ``out_proj`` (and ``gamma`` with a layer scale).

    Args:
        d_model (int): Channels of input and output.
        d_state (int): States per channel. Defaults to 16.
        d_conv (int): Convolution width, 2 to 4. Defaults to 4.
        expand (int | float): ``d_inner = int(expand * d_model)``. Defaults to 2.
        dt_rank (int | str): Rank of Δ; 'auto' is ``ceil(d_model / 16)``. Defaults to 'auto'.
        conv_bias (bool): Bias of the convolution. Defaults to True.
        bias (bool): Bias of ``in_proj`` and ``out_proj``. Defaults to False.
        layer_scale (float, optional): Initial value of a learnt scale of the output. Defaults to
            None, which means no scale.
        discretization (str): One of :data:`mmvim.ops.DISCRETIZATIONS`. Defaults to 'zoh'.
        dt_init (str): 'proper' or 'official'; they differ only in :class:`BiMamba`. Defaults to
            'proper'.
        dt_min (float): Smallest initial Δ. Defaults to 1e-3.
        dt_max (float): Largest initial Δ. Defaults to 0.1.
        reverse (bool): Whether to run from the end of the sequence to its start. Defaults to
            False.
        recompute (bool, optional): As in :class:`mmvim.layers.BiMamba`. Defaults to None, which
            means on CUDA devices.
        ops_backend (str): 'auto', 'compiled' or 'torch'. Defaults to 'auto'.

    Raises:
        ValueError: If an argument is not among the allowed ones.
    """

    _fused_parts = parts(
        in_proj=nn.Linear,
        conv1d=CausalConv1d,
        x_proj=nn.Linear,
        dt_proj=DeltaProjection,
        out_proj=nn.Linear,
    )

    def _is_plain(self, *names: str) -> bool:
        return super()._is_plain(*names) and self._is_silu('conv1d', self.reverse)

    def _arguments(self) -> tuple[tuple[Tensor | None, ...], str, bool, float]:
        parameters = (*self._projections(), *self._direction(), *(None,) * 7)
        return parameters, 'one', self.reverse, 1.0

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        """Return the state before the first token: zeros.

        Args:
            batch_size (int): Number of sequences.
            device (torch.device, optional): The device. Defaults to the parameters' device.
            dtype (torch.dtype, optional): Dtype of the activations. Defaults to the parameters'
                dtype. The scan's state is float32 for every dtype except float64.
        """
        return self._zero_state(batch_size, device, dtype)

    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        return_state: bool = False,
        seq_idx: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MambaState]:
        """Mix along the sequence.

        Processing a sequence in chunks, each with the state of the previous one, gives the outputs
        of the whole sequence (with ``reverse`` the chunks go from the last to the first).

        Args:
            x (Tensor): (batch, length, d_model).
            state (MambaState, optional): The state to continue from; never modified. Defaults to
                the state before the first token.
            return_state (bool): Whether to return the new state as well. Defaults to False.
            seq_idx (Tensor, optional): (batch, length) int32, the number of each token's sequence
                where a row holds several: a change of the number starts anew. The state is then
                that before the first and after the last sequence, in the order of the scan. The
                fused path is not taken.

        Returns:
            Tensor or tuple: (batch, length, d_model), and the state with ``return_state``.
        """
        self._check_input(x)
        plain = state is None and not return_state and seq_idx is None
        if plain and self._may_fuse(x):
            return self._fused(x)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        conv_state, ssm_state = (None, None) if state is None else state
        u = self.conv1d(u, conv_state, return_state, **packed(seq_idx))
        if return_state:
            u, conv_state = u
        inputs = self._scan_inputs(u, self.x_proj, self.dt_proj, self.A_log, self.D)
        y = ops.selective_scan(
            inputs.u,
            inputs.delta,
            inputs.A,
            inputs.B,
            inputs.C,
            inputs.D,
            z,
            inputs.delta_bias,
            delta_softplus=True,
            initial_state=ssm_state,
            return_last_state=return_state,
            discretization=self.discretization,
            reverse=self.reverse,
            seq_idx=seq_idx,
            backend=self.ops_backend,
            check_values=False,
        )
        if not return_state:
            return self._project_out(y)
        y, ssm_state = y
        return self._project_out(y), MambaState(conv_state, ssm_state)

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Process one token.

        Args:
            x (Tensor): (batch, d_model).
            state (MambaState): The state after the previous tokens, from :meth:`init_state`,
                :meth:`forward` or :meth:`step`; never modified.

        Returns:
            tuple: Output (batch, d_model) and the new state.
        """
        out, state = self.forward(x.unsqueeze(1), state, return_state=True)
        return out.squeeze(1), state
