"""The bidirectional Mamba mixer of Vision Mamba."""

import torch
from torch import Tensor, nn

from mmvim import ops
from mmvim._checks import check_choice
from mmvim.ops._library import as_compute_dtype

from .conv import CausalConv1d
from .fusion import Parts, parts
from .mamba import DeltaProjection, Mamba, MixerBase, packed

_V1_PARTS = Mamba._fused_parts
_V2_PARTS = _V1_PARTS | parts(conv1d_b=CausalConv1d, x_proj_b=nn.Linear, dt_proj_b=DeltaProjection)


class BiMamba(MixerBase):
    """Bidirectional Mamba mixer (Zhu et al., Vision Mamba, https://arxiv.org/abs/2401.09417).

    A forward and a backward branch read the same ``in_proj`` and are added before the shared
    ``out_proj``. Nothing is flipped in memory: the backward branch runs its convolution and its
    scan from the end. Parameter names are those of the official Vim.

    Args:
        d_model (int): Channels of input and output.
        bimamba (str): 'v2' gives the backward branch its own convolution, projections and skip
            (``conv1d_b``, ``x_proj_b``, ``dt_proj_b``, ``A_b_log``, ``D_b``); 'v1' shares all of
            these except ``A_b_log``. Defaults to 'v2'.
        merge (str, optional): 'mean' halves the sum of the branches, 'sum' does not. Defaults to
            None: 'mean' for v2 and 'sum' for v1, as in the official models.
        **options: d_state, d_conv, expand, dt_rank, conv_bias, bias, layer_scale, discretization,
            dt_min, dt_max and ops_backend are those of :class:`mmvim.layers.Mamba`.
        dt_init (str): 'proper' gives both branches Mamba's initialisation of Δ. 'official'
            follows the official Vim: the backward branch of v2 starts with a zero Δ bias, and so
            with Δ near 0.69. Defaults to 'proper'.
        reverse (bool): Whether to exchange the roles of the two branches, which is equivalent to
            flipping input and output. Defaults to False.
        recompute (bool, optional): Whether the backward pass recomputes most intermediates instead
            of keeping them, which takes less than half of the memory. Defaults to None: on CUDA
            devices.

    Raises:
        ValueError: If an argument is invalid.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int | float = 2,
        dt_rank: int | str = 'auto',
        bimamba: str = 'v2',
        merge: str | None = None,
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
        check_choice('bimamba', bimamba, ('v1', 'v2'))
        check_choice('merge', merge, (None, 'mean', 'sum'))
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            conv_bias=conv_bias,
            bias=bias,
            layer_scale=layer_scale,
            discretization=discretization,
            dt_init=dt_init,
            dt_min=dt_min,
            dt_max=dt_max,
            reverse=reverse,
            recompute=recompute,
            ops_backend=ops_backend,
            device=device,
            dtype=dtype,
        )
        self.bimamba = bimamba
        self.merge = merge or ('mean' if bimamba == 'v2' else 'sum')
        self.A_b_log = self._initial_a_log()
        if bimamba == 'v1':
            return
        self.conv1d_b = CausalConv1d(
            self.d_inner,
            d_conv,
            bias=conv_bias,
            activation='silu',
            mode='causal' if reverse else 'reverse',
            ops_backend=ops_backend,
            **self._factory,
        )
        self.x_proj_b = nn.Linear(
            self.d_inner, self.dt_rank + 2 * d_state, bias=False, **self._factory
        )
        self.dt_proj_b = DeltaProjection(
            self.dt_rank,
            self.d_inner,
            init='proper' if dt_init == 'proper' else 'zero',
            dt_min=dt_min,
            dt_max=dt_max,
            **self._factory,
        )
        self.D_b = nn.Parameter(torch.ones(self.d_inner, device=device))

    def _branches(self, u: Tensor, seq_idx: Tensor | None) -> tuple[ops.ScanInputs, ops.ScanInputs]:
        """Inputs of the branch with the plain names and of the branch with the ``_b`` names."""
        if self.bimamba == 'v1':
            u = self.conv1d(u, **packed(seq_idx))
            own = self._scan_inputs(u, self.x_proj, self.dt_proj, self.A_log, self.D)
            # torch.compile of torch 2.6 traces neither _replace nor a slice of a named tuple.
            A = -torch.exp(as_compute_dtype(self.A_b_log))
            other = ops.ScanInputs(own.u, own.delta, A, own.B, own.C, own.D, own.delta_bias)
            return own, other
        u, u_b = self._convolved(u, seq_idx)
        return (
            self._scan_inputs(u, self.x_proj, self.dt_proj, self.A_log, self.D),
            self._scan_inputs(u_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b),
        )

    def _convolved(self, u: Tensor, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
        first, second = self.conv1d, self.conv1d_b
        if seq_idx is not None or not self._is_plain('conv1d', 'conv1d_b'):
            return first(u, **packed(seq_idx)), second(u, **packed(seq_idx))
        if self.reverse:
            first, second = second, first
        results = ops.bidirectional_conv1d(
            u,
            first.taps,
            first.bias,
            second.taps,
            second.bias,
            activation='silu',
            backend=self.ops_backend,
        )
        return results[::-1] if self.reverse else results

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Mix along the sequence in both directions.

        Args:
            x (Tensor): (batch, length, d_model).
            seq_idx (Tensor, optional): (batch, length) int32, the number of each token's sequence
                where a row holds several: both directions start anew where it changes. The fused
                path is not taken.

        Returns:
            Tensor: (batch, length, d_model).
        """
        self._check_input(x)
        if seq_idx is None and self._may_fuse(x):
            return self._fused(x)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        forward, backward = self._branches(u, seq_idx)
        if self.reverse:
            forward, backward = backward, forward
        y = ops.bidirectional_scan(
            forward,
            backward,
            z,
            scale=0.5 if self.merge == 'mean' else 1.0,
            delta_softplus=True,
            discretization=self.discretization,
            seq_idx=seq_idx,
            backend=self.ops_backend,
            check_values=False,
        )
        return self._project_out(y)

    @property
    def _fused_parts(self) -> Parts:
        return _V1_PARTS if self.bimamba == 'v1' else _V2_PARTS

    def _may_fuse(self, x: Tensor) -> bool:
        return super()._may_fuse(x) and (self.bimamba == 'v1' or self.x_proj_b.bias is None)

    def _is_plain(self, *names: str) -> bool:
        if not (super()._is_plain(*names) and self._is_silu('conv1d', self.reverse)):
            return False
        if self.bimamba == 'v1':
            return True
        first, second = self._modules['conv1d'], self._modules['conv1d_b']
        return (
            self._is_silu('conv1d_b', not self.reverse) and first.kernel_size == second.kernel_size
        )

    def _arguments(self) -> tuple[tuple[Tensor | None, ...], str, bool, float]:
        forward = self._direction()
        if self.bimamba == 'v2':
            backward = self._direction('_b')
            if self.reverse:
                forward, backward = backward, forward
        else:
            *shared, a_log, skip = forward
            a_b_log = self.A_b_log
            if self.reverse:
                a_log, a_b_log = a_b_log, a_log
            forward, backward = (*shared, a_log, skip), (*(None,) * 5, a_b_log, None)
        return (
            (*self._projections(), *forward, *backward),
            self.bimamba,
            self.reverse and self.bimamba == 'v1',
            0.5 if self.merge == 'mean' else 1.0,
        )

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f'{super().extra_repr()}, bimamba={self.bimamba!r}, merge={self.merge!r}'
