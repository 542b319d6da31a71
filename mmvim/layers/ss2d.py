"""SS2D, VMamba's mixer: selective scans of a map along several routes.

Liu et al.: VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvim import ops
from mmvim._checks import check_choice, check_flags, check_number, check_positive
from mmvim.ops._autocast import autocast_dtype
from mmvim.ops._library import as_compute_dtype
from mmvim.ops._validation import MAX_STATES
from mmvim.ops.backend import BACKENDS
from mmvim.ops.branch import Body
from mmvim.ops.cross_scan import ROUTES, round_steps
from mmvim.ops.mixer import serves

from .fusion import Fusable, parts
from .mamba import DeltaProjection
from .norm import AutocastLayerNorm

FORWARD_TYPES = ('v05_noz', 'v0')
# Devices on which a block's SS2D, its norm and the residual connection may be one op.
FUSED_DEVICES = ('cpu', 'cuda')


def _is_plain_depthwise(conv: nn.Conv2d, channels: int) -> bool:
    """Whether a convolution is one as SS2D builds it, of any odd width."""
    width = conv.kernel_size[0]
    return (
        conv.kernel_size == (width, width)
        and conv.padding == (width // 2, width // 2)
        and conv.padding_mode == 'zeros'
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == channels
    )


class SS2D(Fusable):
    """Two-dimensional selective scan over (batch, height, width, channels) maps.

    ``x = in_proj(h); x = silu(conv2d(x)); Δ, B, C = x_proj(x)`` for each route;
    ``y = out_norm(cross_scan(x)); out = out_proj(y)``. Parameter names and shapes are those of the
    official model: with K routes, d inner channels, rank R and n states ``x_proj_weight``
    (K, R + 2n, d), ``dt_projs_weight`` (K, d, R), ``dt_projs_bias`` (K, d), ``A_logs`` (K·d, n) and
    ``Ds`` (K·d,).

    Args:
        d_model (int): Channels of input and output.
        d_state (int): States per channel. Defaults to 16.
        ssm_ratio (int | float): ``d_inner = int(ssm_ratio * d_model)``. Defaults to 2.
        dt_rank (int | str): Rank of Δ; 'auto' is ``ceil(d_model / 16)``. Defaults to 'auto'.
        d_conv (int): Width of the depthwise convolution, odd; 1 means none. Defaults to 3.
        conv_bias (bool): Bias of the convolution. Defaults to True.
        bias (bool): Bias of ``in_proj`` and ``out_proj``. Defaults to False.
        forward_type (str): 'v05_noz' has no gate. In 'v0' ``in_proj`` also gives z, and the
            normalised sum is multiplied by silu(z). Defaults to 'v05_noz'.
        routes (Sequence[str]): The route of each scan, from :data:`mmvim.ops.ROUTES`. Defaults to
            all four.
        discretization (str): One of :data:`mmvim.ops.DISCRETIZATIONS`. Defaults to 'zoh'.
        dt_min (float): Smallest initial Δ. Defaults to 1e-3.
        dt_max (float): Largest initial Δ. Defaults to 0.1.
        ops_backend (str): 'auto', 'compiled' or 'torch'. Defaults to 'auto'.

    Raises:
        ValueError: If an argument is invalid.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        ssm_ratio: int | float = 2,
        dt_rank: int | str = 'auto',
        d_conv: int = 3,
        conv_bias: bool = True,
        bias: bool = False,
        forward_type: str = 'v05_noz',
        routes: Sequence[str] = ops.ROUTES,
        discretization: str = 'zoh',
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        ops_backend: str = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(d_model=d_model, d_state=d_state, d_conv=d_conv)
        check_number('d_state', d_state, 1, MAX_STATES + 1)
        check_number('ssm_ratio', ssm_ratio, 0)
        check_flags(conv_bias=conv_bias, bias=bias)
        check_choice('forward_type', forward_type, FORWARD_TYPES)
        check_choice('discretization', discretization, tuple(ops.DISCRETIZATIONS))
        check_choice('ops_backend', ops_backend, BACKENDS)
        if dt_rank == 'auto':
            dt_rank = math.ceil(d_model / 16)
        check_positive(dt_rank=dt_rank)
        if d_conv % 2 == 0:
            raise ValueError(f'd_conv={d_conv} must be odd')
        known = isinstance(routes, Sequence) and not isinstance(routes, str) and len(routes) > 0
        if not known or any(route not in ops.ROUTES for route in routes):
            raise ValueError(f'routes={routes!r} must be a sequence of {ops.ROUTES}')
        self.d_model = d_model
        self.d_state = d_state
        self.ssm_ratio = ssm_ratio
        self.d_inner = inner = int(ssm_ratio * d_model)
        check_positive(d_inner=inner)
        self.dt_rank = dt_rank
        self.forward_type = forward_type
        self.routes = tuple(routes)
        self.discretization = discretization
        self.ops_backend = ops_backend

        factory = {'device': device, 'dtype': dtype}
        count = len(self.routes)
        self.in_proj = nn.Linear(d_model, (1 + self.gated) * inner, bias=bias, **factory)
        self.register_module('conv2d', None)
        if d_conv > 1:
            self.conv2d = nn.Conv2d(
                inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=conv_bias, **factory
            )
        # As so many linear layers of torch.
        bound = inner**-0.5
        projection = torch.empty(count, dt_rank + 2 * d_state, inner, **factory)
        self.x_proj_weight = nn.Parameter(projection.uniform_(-bound, bound))
        parts = [
            DeltaProjection(dt_rank, inner, dt_min=dt_min, dt_max=dt_max, **factory)
            for _ in self.routes
        ]
        self.dt_projs_weight = nn.Parameter(torch.stack([p.weight.detach() for p in parts]))
        self.dt_projs_bias = nn.Parameter(torch.stack([p.bias.detach() for p in parts]))
        steps = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_logs = nn.Parameter(steps.log().repeat(count * inner, 1))
        self.Ds = nn.Parameter(torch.ones(count * inner, device=device))
        self.out_norm = AutocastLayerNorm(inner, **factory)
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **factory)

    _fused_parts = parts(
        in_proj=nn.Linear, conv2d=nn.Conv2d, out_norm=AutocastLayerNorm, out_proj=nn.Linear
    )

    @property
    def gated(self) -> bool:
        """Whether the output is multiplied by silu(z)."""
        return self.forward_type == 'v0'

    def forward(self, x: Tensor) -> Tensor:
        """Mix over the map.

        Args:
            x (Tensor): (batch, height, width, d_model).

        Returns:
            Tensor: (batch, height, width, d_model).

        Raises:
            ValueError: If the shape is wrong.
        """
        if x.dim() != 4 or x.shape[-1] != self.d_model:
            raise ValueError(
                f'SS2D wants (batch, height, width, {self.d_model}), got {tuple(x.shape)}'
            )
        x = self.in_proj(x)
        z = None
        if self.gated:
            x, z = x.chunk(2, dim=-1)
        if self.conv2d is not None:
            x = self.conv2d(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.out_norm(self._scan(F.silu(x)))
        return self.out_proj(y if z is None else y * F.silu(z))

    def _scan(self, x: Tensor) -> Tensor:
        count, inner = len(self.routes), self.d_inner
        projected = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (count, -1))
        low_rank, b, c = projected.split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        return ops.cross_scan(
            x,
            low_rank,
            -torch.exp(as_compute_dtype(self.A_logs)).view(count, inner, -1),
            b,
            c,
            as_compute_dtype(self.Ds).view(count, inner),
            as_compute_dtype(self.dt_projs_bias),
            delta_weight=self.dt_projs_weight,
            routes=self.routes,
            delta_softplus=True,
            discretization=self.discretization,
            backend=self.ops_backend,
            check_values=False,
        )

    def _body(self, x: Tensor) -> Body | None:
        if (
            x.device.type not in FUSED_DEVICES
            or x.dim() != 4
            or x.numel() == 0
            or self.gated
            or self._modules['conv2d'] is None
            or self._modules['out_norm']._parameters['bias'] is None
            or not self._may_fuse(x)
            or not _is_plain_depthwise(self._modules['conv2d'], self.d_inner)
            or not serves(self.ops_backend, x)
        ):
            return None
        dtype = autocast_dtype(x) or x.dtype
        steps = round_steps(
            x,
            dtype,
            self.d_inner,
            self.dt_rank,
            self.d_state,
            len(self.routes),
            True,
            self.discretization,
        )
        if not steps:
            return None
        modules = self._modules
        one, conv, norm, two = (
            modules[name]._parameters for name in ('in_proj', 'conv2d', 'out_norm', 'out_proj')
        )
        parameters = (
            one['weight'],
            one['bias'],
            conv['weight'],
            conv['bias'],
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs,
            self.Ds,
            norm['weight'],
            norm['bias'],
            two['weight'],
            two['bias'],
        )
        return Body(
            'ss2d',
            parameters,
            discretization=self.discretization,
            routes=[ROUTES.index(route) for route in self.routes],
            round_steps=steps,
            inner_eps=modules['out_norm'].eps,
        )

    def extra_repr(self) -> str:
        """Describe the layer."""
        return (
            f'd_model={self.d_model}, d_state={self.d_state}, {self.forward_type!r}, '
            f'{self.discretization!r}'
        )
