"""The scan of Mamba-2, whose A is one number for each head, on that of Mamba-1."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvim import ops
from mmvim.dropin import convolutions
from mmvim.dropin.norms import gated_norm
from mmvim.dropin.placeholders import attributes_of
from mmvim.ops import _validation as check
from mmvim.ops._library import compute_dtype, without_autocast

__all__ = ['mamba_chunk_scan_combined', 'mamba_split_conv1d_scan_combined']
__getattr__ = attributes_of(__name__)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan (Dao and Gu, https://arxiv.org/abs/2405.21060).

    Args:
        x: (b, l, h, p): h heads of p channels.
        dt: (b, l, h).
        A: (h,), real.
        B, C: (b, l, g, n), with g dividing h.
        chunk_size: No effect.
        D: (h,) or (h, p).
        z: (b, l, h, p), a gate.
        dt_bias: (h,), added to dt.
        initial_states: (b, h, p, n).
        seq_idx: (b, l), the number of each step's sequence where a row holds several.
        cu_seqlens: Must be None.
        dt_softplus: Apply softplus to dt + dt_bias.
        dt_limit: Least and largest step.
        return_final_states: Also return the states after the last step.
        return_varlen_states: Must be False.

    Returns:
        (b, l, h, p), dtype of x; with ``return_final_states`` also (b, h, p, n) in float32.
    """
    if isinstance(cu_seqlens, bool):
        # The order of mamba_ssm 2.0, which lacked cu_seqlens.
        last = dt_limit if isinstance(dt_limit, bool) else return_final_states
        limit = dt_softplus if isinstance(dt_softplus, tuple) else (0.0, math.inf)
        cu_seqlens, dt_softplus, dt_limit, return_final_states = None, cu_seqlens, limit, last
    if cu_seqlens is not None:
        raise NotImplementedError('cu_seqlens is not supported: number the sequences by seq_idx')
    if return_varlen_states:
        raise NotImplementedError('return_varlen_states is not supported: give each sequence a row')
    check.check_activation('x', x, 'b l h p')
    b, length, h, p = x.shape
    check.check_tensor('B', B)
    check.check_rank('B', B, 'b l g n')
    n = B.shape[3]
    for name, value, axes, shape in (
        ('dt', dt, 'b l h', (b, length, h)),
        ('A', A, 'h', (h,)),
        ('z', z, 'b l h p', x.shape),
        ('dt_bias', dt_bias, 'h', (h,)),
        ('initial_states', initial_states, 'b h p n', (b, h, p, n)),
    ):
        if value is not None or name in ('dt', 'A'):
            check.check_tensor(name, value)
            check.check_shape(name, value, axes, shape)
    if h % B.shape[2]:
        raise ValueError(f'the number of groups of B must divide h = {h}, got {B.shape[2]}')
    if D is not None:
        check.check_tensor('D', D)
        check.check_shape('D', D, 'h' if D.dim() == 1 else 'h p', (h, p)[: max(D.dim(), 1)])
    if seq_idx is not None:
        seq_idx = convolutions.sequences('x', x.flatten(2), seq_idx)
    dt_softplus = check.as_flag('dt_softplus', dt_softplus)
    wanted = check.as_flag('return_final_states', return_final_states)
    options = dt_softplus, dt_limit, seq_idx
    out, states = _scan(x, dt, A, B, C, D, z, dt_bias, initial_states, *options)
    return (out, states) if wanted else out


@without_autocast
def _scan(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_limit, seq_idx):
    wide = compute_dtype(x.dtype)
    b, length, h, p = x.shape
    n = B.shape[3]
    dtype = x.dtype
    if not dt_softplus or tuple(dt_limit) != (0.0, math.inf):
        dt = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
        dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
        dt_softplus, dt_bias = False, None
    if dt.dtype != dtype:
        x, dt, B, C, z = (None if t is None else t.to(wide) for t in (x, dt, B, C, z))

    def per_channel(value: Tensor | None, *axes: int) -> Tensor | None:
        if value is None:
            return None
        value = value.unsqueeze(-1) if value.dim() < len(axes) else value
        return value.expand(*axes).flatten(-2)

    out, states = ops.selective_scan(
        x.flatten(2),
        per_channel(dt, b, length, h, p),
        A.to(wide)[:, None, None].expand(h, p, n).reshape(h * p, n),
        B,
        C,
        None if D is None else per_channel(D.to(wide), h, p),
        None if z is None else z.flatten(2),
        None if dt_bias is None else per_channel(dt_bias.to(wide), h, p),
        delta_softplus=dt_softplus,
        initial_state=None if initial_states is None else initial_states.to(wide).flatten(1, 2),
        return_last_state=True,
        seq_idx=seq_idx,
        check_values=False,
    )
    return out.unflatten(2, (h, p)).to(dtype), states.unflatten(1, (h, p))


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = 'silu',
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 mixer behind in_proj.

    Args:
        zxbcdt: (b, l, 2m + 2d + 2gn + h): an MLP's gate and value of m channels, often none, the
            gate and the input of d = hp channels, B and C of g groups, and the steps.
        conv1d_weight, conv1d_bias: (d + 2gn, w) and (d + 2gn,) or None.
        dt_bias, A, D: (h,); D also (h, p).
        chunk_size: No effect.
        initial_states, seq_idx, dt_limit, return_final_states: See
            :func:`mamba_chunk_scan_combined`.
        activation: None, ``'silu'`` or ``'swish'``, of the convolution.
        rmsnorm_weight: (d,), of an RMS norm of each group; None for none.
        rmsnorm_eps: Added to its mean square.
        outproj_weight, outproj_bias: (c, m + d) and (c,); None for none.
        headdim: p; needed unless D is (h, p).
        ngroups: g.
        norm_before_gate: Whether the norm comes before the gate.

    Returns:
        (b, l, c), or (b, l, m + d); with ``return_final_states`` also the states (b, h, p, n).
    """
    check.check_activation('zxbcdt', zxbcdt, 'b l k')
    check.check_tensor('conv1d_weight', conv1d_weight)
    check.check_tensor('D', D)
    if D.dim() != 2 and headdim is None:
        raise ValueError('headdim is needed unless D has the axes (h, p)')
    h, p = D.shape if D.dim() == 2 else (D.shape[0], headdim)
    d, channels = h * p, conv1d_weight.shape[0]
    rest = zxbcdt.shape[2] - d - channels - h
    if channels <= d or (channels - d) % (2 * ngroups) or rest < 0 or rest % 2:
        raise ValueError(
            f'zxbcdt must have 2m + 2d + 2gn + h channels and conv1d_weight d + 2gn rows, with '
            f'd = {d}, h = {h} and g = {ngroups}, got {zxbcdt.shape[2]} and {channels}'
        )
    mlp, z, mixed, dt = zxbcdt.split((rest, d, channels, h), dim=2)
    mixed = convolutions.convolve(
        mixed.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation
    ).transpose(1, 2)
    states = (channels - d) // 2
    x, B, C = mixed.split((d, states, states), dim=2)
    y, final = mamba_chunk_scan_combined(
        x.unflatten(2, (h, p)),
        dt,
        A,
        B.unflatten(2, (ngroups, -1)),
        C.unflatten(2, (ngroups, -1)),
        chunk_size,
        D,
        z.unflatten(2, (h, p)) if rmsnorm_weight is None else None,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y = y.flatten(2)
    if rmsnorm_weight is not None:
        size = d // ngroups
        y = gated_norm(
            y, rmsnorm_weight, None, z, rmsnorm_eps, size, norm_before_gate, is_rms_norm=True
        )
    if rest:
        gate, value = mlp.chunk(2, dim=2)
        y = torch.cat([F.silu(gate) * value, y], dim=2)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, final) if return_final_states else y
