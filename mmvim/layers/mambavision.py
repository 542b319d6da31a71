"""Layers of MambaVision: its mixer, its attention and the windows that both work in.

Hatamizadeh and Kautz: MambaVision: A Hybrid Mamba-Transformer Vision Backbone, CVPR 2025,
https://arxiv.org/abs/2407.08083.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvim import ops
from mmvim._checks import check_flags, check_number, check_positive
from mmvim.ops._library import as_compute_dtype
from mmvim.ops.branch import Body
from mmvim.ops.mixer import serves

from .conv import CausalConv1d
from .fusion import Fusable, parts
from .mamba import DeltaProjection, MixerBase


class MambaVisionMixer(MixerBase):
    """MambaVision's mixer: half of the channels are scanned, the others only convolved.

    ``x, z = in_proj(h); x = scan(silu(conv1d_x(x))); z = silu(conv1d_z(z))``, and the output is
    ``out_proj([x, z])`` (section 3.2 of the paper). The convolutions are centred and have no bias;
    z is no gate. Parameter names are those of the official model.

    Args:
        d_model (int): Channels of input and output.
        d_state (int): States per channel. Defaults to 8.
        d_conv (int): Convolution width, 2 to 4. Defaults to 3.
        expand (int | float): ``expand * d_model`` channels, an even number, are mixed, half of
            them by the scan. Defaults to 1.
        dt_rank (int | str): Rank of Δ; 'auto' is ``ceil(d_model / 16)``. Defaults to 'auto'.
        double_dt_bias (bool): Whether Δ is ``softplus(dt_proj(x) + 2 * bias)``. The official code
            adds the bias in the projection and again in the scan, and released weights were
            trained this way. False adds it once. Defaults to True.
        discretization (str): One of :data:`mmvim.ops.DISCRETIZATIONS`. Defaults to 'zoh'.
        dt_init (str): 'official' starts with a Δ of about 0.69 everywhere: a zero bias and weights
            of standard deviation 0.02, as the official model ends up with. 'proper' is Mamba's
            initialisation, Δ in [dt_min, dt_max], whether or not the bias is doubled. Defaults to
            'official'.
        dt_min (float): Smallest initial Δ of 'proper'. Defaults to 1e-3.
        dt_max (float): Largest initial Δ of 'proper'. Defaults to 0.1.
        recompute (bool, optional): As in :class:`mmvim.layers.BiMamba`. Defaults to None, which
            means on CUDA devices.
        ops_backend (str): 'auto', 'compiled' or 'torch'. Defaults to 'auto'.

    Raises:
        ValueError: If an argument is not among the allowed ones.
    """

    _fused_parts = parts(
        in_proj=nn.Linear,
        conv1d_x=CausalConv1d,
        conv1d_z=CausalConv1d,
        x_proj=nn.Linear,
        dt_proj=DeltaProjection,
        out_proj=nn.Linear,
    )

    def __init__(
        self,
        d_model: int,
        d_state: int = 8,
        d_conv: int = 3,
        expand: int | float = 1,
        dt_rank: int | str = 'auto',
        double_dt_bias: bool = True,
        discretization: str = 'zoh',
        dt_init: str = 'official',
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        recompute: bool | None = None,
        ops_backend: str = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(d_model=d_model)
        check_number('expand', expand, 0)
        check_flags(double_dt_bias=double_dt_bias)
        if int(expand * d_model) % 2:
            raise ValueError(
                f'd_model={d_model} and expand={expand}: expand * d_model must be even'
            )
        # The base class counts the channels of the scan, and z as many again.
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand / 2,
            dt_rank=dt_rank,
            discretization=discretization,
            dt_init=dt_init,
            dt_min=dt_min,
            dt_max=dt_max,
            recompute=recompute,
            ops_backend=ops_backend,
            device=device,
            dtype=dtype,
        )
        self.expand = expand
        self.double_dt_bias = double_dt_bias
        del self.conv1d
        self.conv1d_x, self.conv1d_z = (
            CausalConv1d(
                self.d_inner,
                d_conv,
                bias=False,
                activation='silu',
                mode='same',
                ops_backend=ops_backend,
                **self._factory,
            )
            for _ in range(2)
        )
        self.out_proj = nn.Linear(2 * self.d_inner, d_model, bias=False, **self._factory)
        if dt_init == 'official':
            nn.init.trunc_normal_(self.dt_proj.weight, std=0.02)
            nn.init.zeros_(self.dt_proj.bias)
        elif double_dt_bias:
            with torch.no_grad():
                self.dt_proj.bias /= 2

    def forward(self, x: Tensor) -> Tensor:
        """Mix along the sequence.

        Args:
            x (Tensor): (batch, length, d_model).

        Returns:
            Tensor: (batch, length, d_model).
        """
        self._check_input(x)
        if self._may_fuse(x):
            return self._fused(x)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, z = self.conv1d_x(u), self.conv1d_z(z)
        inputs = self._scan_inputs(u, self.x_proj, self.dt_proj, self.A_log, self.D)
        y = ops.selective_scan(
            inputs.u,
            inputs.delta,
            inputs.A,
            inputs.B,
            inputs.C,
            inputs.D,
            delta_bias=self._delta_bias(),
            delta_softplus=True,
            discretization=self.discretization,
            backend=self.ops_backend,
            check_values=False,
        )
        return self.out_proj(torch.cat((y, z), dim=-1))

    def _delta_bias(self) -> Tensor:
        bias = as_compute_dtype(self.dt_proj.bias)
        return 2 * bias if self.double_dt_bias else bias

    @property
    def _bias_scale(self) -> float:
        return 2.0 if self.double_dt_bias else 1.0

    def _is_plain(self, *names: str) -> bool:
        if not super()._is_plain(*names):
            return False
        modules = self._modules
        first, second = modules['conv1d_x'], modules['conv1d_z']
        return (
            first.mode == second.mode == 'same'
            and first.activation == second.activation == 'silu'
            and first.kernel_size == second.kernel_size
            and first.bias is second.bias is None
        )

    def _arguments(self) -> tuple[tuple[Tensor | None, ...], str, bool, float]:
        taps, taps_z = (self._modules[f'conv1d_{k}']._parameters['weight'] for k in 'xz')
        dt_proj = self._modules['dt_proj']._parameters
        parameters = (
            *self._projections(),
            taps,
            None,
            self._modules['x_proj']._parameters['weight'],
            dt_proj['weight'],
            dt_proj['bias'],
            self.A_log,
            self.D,
            taps_z,
            *(None,) * 6,
        )
        return parameters, 'half', False, 1.0

    def _body(self, x: Tensor) -> Body | None:
        if not self._may_fuse(x):
            return None
        parameters, *_ = self._arguments()
        return Body(
            'mixer',
            (*parameters, None),
            bias_scale=self._bias_scale,
            discretization=self.discretization,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f'{super().extra_repr()}, double_dt_bias={self.double_dt_bias}'


class Attention(Fusable):
    """Multi-head self-attention over (batch, length, dim), with bias and without positions.

    Args:
        dim (int): Channels.
        num_heads (int): Number of heads, a divisor of ``dim``.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``.
    """

    _fused_parts = parts(qkv=nn.Linear, proj=nn.Linear)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_heads=num_heads)
        if dim % num_heads:
            raise ValueError(f'num_heads={num_heads} must divide the {dim} channels')
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Attend; ``x`` and the result are (batch, length, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def _body(self, x: Tensor) -> Body | None:
        # On GPUs attention pads other heads.
        if x.is_cuda and x.shape[-1] % (8 * self.num_heads):
            return None
        if not self._may_fuse(x) or not serves(None, x):
            return None
        one, two = (self._modules[name]._parameters for name in ('qkv', 'proj'))
        parameters = one['weight'], one['bias'], two['weight'], two['bias']
        return Body('attention', parameters, self.num_heads)

    def _is_plain(self, *names: str) -> bool:
        modules = self._modules
        return (
            super()._is_plain(*names)
            and modules['qkv']._parameters['bias'] is not None
            and modules['proj']._parameters['bias'] is not None
        )

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f'num_heads={self.num_heads}'


def window_partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut maps into windows of tokens, padding zeros at the right and the bottom where needed.

    Args:
        x (Tensor): (batch, channels, height, width).
        window (tuple): Rows and columns of a window.

    Returns:
        Tensor: (batch * windows, rows * columns, channels). Windows and the tokens in them are in
        row-major order.
    """
    batch, channels, height, width = x.shape
    rows, columns = window
    x = x.permute(0, 2, 3, 1)
    bottom, right = -height % rows, -width % columns
    if bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    x = x.reshape(batch, x.shape[1] // rows, rows, x.shape[2] // columns, columns, channels)
    return x.transpose(2, 3).reshape(-1, rows * columns, channels)


def window_reverse(
    windows: Tensor, window: tuple[int, int], batch: int, size: tuple[int, int]
) -> Tensor:
    """Undo :func:`window_partition`, without the padding.

    Args:
        windows (Tensor): (batch * windows, rows * columns, channels).
        window (tuple): Rows and columns of a window.
        batch (int): Number of maps.
        size (tuple): Height and width of the maps.

    Returns:
        Tensor: (batch, channels, height, width), in channels-last memory order.
    """
    (rows, columns), (height, width) = window, size
    # Not -(-height // rows): exporters may round the quotient of a negative number towards zero.
    down, across = (height + rows - 1) // rows, (width + columns - 1) // columns
    x = windows.reshape(batch, down, across, rows, columns, windows.shape[-1]).transpose(2, 3)
    x = x.reshape(batch, down * rows, across * columns, windows.shape[-1])
    return x[:, :height, :width].permute(0, 3, 1, 2)
