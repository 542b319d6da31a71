"""The selective scan, and whole Mamba mixers between the projections, channels before time."""

import torch.nn.functional as F
from torch import Tensor

from mmvim.dropin import convolutions, scans
from mmvim.dropin.placeholders import attributes_of
from mmvim.ops import _validation as check
from mmvim.ops._library import compute_dtype

__all__ = [
    'BiMambaInnerFn',
    'MambaInnerFn',
    'MambaInnerFnNoOutProj',
    'SelectiveScanFn',
    'bimamba_inner_fn',
    'mamba_inner_fn',
    'mamba_inner_fn_no_out_proj',
    'mamba_inner_ref',
    'selective_scan_fn',
    'selective_scan_ref',
]
__getattr__ = attributes_of(__name__)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan; arguments and results as for :func:`mmvim.ops.selective_scan_fn`."""
    return scans.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`selective_scan_fn` in float32 (float64 for float64) whatever the dtypes."""
    check.check_activation('u', u, 'b d l')
    wide = compute_dtype(u.dtype)
    inputs = [
        t.to(wide) if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in (u, delta, A, B, C, D, z, delta_bias)
    ]
    result = scans.scan(*inputs, delta_softplus, return_last_state)
    if return_last_state:
        return result[0].to(u.dtype), result[1]
    return result.to(u.dtype)


def _inputs(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """u, delta, B, C and z of the scan, (b, d, l) views of memory with channels last."""
    check.check_activation('xz', xz, 'b 2d l')
    check.check_tensor('A', A)
    check.check_rank('A', A, 'd n')
    if A.is_complex():
        raise TypeError(
            f'A must be real, got {A.dtype}: complex states are not supported. '
            'Real ones are, such as A = -torch.exp(A_log)'
        )
    d, n = A.shape
    check.check_shape('xz', xz, 'b 2d l', (xz.shape[0], 2 * d, xz.shape[2]))
    check.check_tensor('conv1d_weight', conv1d_weight)
    check.check_shape('conv1d_weight', conv1d_weight, 'd 1 w', (d, 1, conv1d_weight.shape[-1]))
    x, z = xz.transpose(1, 2).contiguous().transpose(1, 2).chunk(2, dim=1)
    u = convolutions.convolve(x, conv1d_weight.squeeze(1), conv1d_bias, activation='silu')
    check.check_tensor('delta_proj_weight', delta_proj_weight)
    check.check_shape(
        'delta_proj_weight', delta_proj_weight, 'd r', (d, *delta_proj_weight.shape[1:])
    )
    rank = delta_proj_weight.shape[1]
    check.check_tensor('x_proj_weight', x_proj_weight)
    rows = rank + n * ((B is None) + (C is None))
    check.check_shape('x_proj_weight', x_proj_weight, 'r + 2n, without given B and C', (rows, d))
    low_rank = F.linear(u.transpose(1, 2), x_proj_weight)
    delta = F.linear(low_rank[..., :rank], delta_proj_weight).transpose(1, 2)
    if B is None:
        B = _matrix(low_rank[..., rank : rank + n], B_proj_bias).to(u.dtype)
    if C is None:
        C = _matrix(low_rank[..., rows - n :], C_proj_bias).to(u.dtype)
    return u, delta.to(u.dtype), B, C, z


def _matrix(rows: Tensor, bias: Tensor | None) -> Tensor:
    return (rows if bias is None else rows + bias.to(rows.dtype)).transpose(1, 2)


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """A Mamba mixer between in_proj and out_proj.

    Args:
        xz: (b, 2d, l): the input of the convolution, then the gate.
        conv1d_weight, conv1d_bias: (d, 1, w) and (d,) or None.
        x_proj_weight: (r + 2n, d), of which rows for a given B or C are left out.
        delta_proj_weight: (d, r).
        A: (d, n), real.
        B, C: None, which derives them from the input, or as for :func:`selective_scan_fn`.
        D, delta_bias: (d,).
        B_proj_bias, C_proj_bias: (n,), added to derived B and C.
        delta_softplus: Apply softplus to delta + delta_bias.
        checkpoint_lvl: No effect.

    Returns:
        The gated output (b, d, l), dtype of xz.
    """
    u, delta, B, C, z = _inputs(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        B_proj_bias,
        C_proj_bias,
    )
    return scans.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, contiguous=False)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: None = None,
    c_rms_weight: None = None,
    dt_rms_weight: None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """:func:`mamba_inner_fn_no_out_proj` and out_proj.

    Args:
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias,
            B_proj_bias, C_proj_bias, delta_softplus, checkpoint_lvl: As there.
        out_proj_weight, out_proj_bias: (c, d) and (c,) or None.
        b_rms_weight, c_rms_weight, dt_rms_weight: Must be None.
        b_c_dt_rms_eps: No effect.

    Returns:
        (b, l, c).
    """
    for name, value in (
        ('b_rms_weight', b_rms_weight),
        ('c_rms_weight', c_rms_weight),
        ('dt_rms_weight', dt_rms_weight),
    ):
        if value is not None:
            raise NotImplementedError(
                f'{name} is not supported by mmvim.dropin: leave it out, or normalise in the '
                'model and call selective_scan_fn'
            )
    y = mamba_inner_fn_no_out_proj(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """:func:`mamba_inner_fn` and the scan from the end with ``A_b`` (d, n), added before out_proj.

    The two share all but A, the convolution included (Vim's ``bimamba_type='v1'``).
    """
    u, delta, B, C, z = _inputs(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        B_proj_bias,
        C_proj_bias,
    )
    check.check_tensor('A_b', A_b)
    check.check_shape('A_b', A_b, 'd n', A.shape)
    common = (B, C, D, z, delta_bias, delta_softplus)
    y = scans.scan(u, delta, A, *common, contiguous=False)
    y = y + scans.scan(u, delta, A_b, *common, reverse=True, contiguous=False)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


mamba_inner_ref = mamba_inner_fn
bimamba_inner_ref = bimamba_inner_fn


class SelectiveScanFn:
    """:func:`selective_scan_fn` for code that calls the autograd function."""

    apply = staticmethod(selective_scan_fn)


class MambaInnerFn:
    """:func:`mamba_inner_fn` for code that calls the autograd function."""

    apply = staticmethod(mamba_inner_fn)


class MambaInnerFnNoOutProj:
    """:func:`mamba_inner_fn_no_out_proj` for code that calls the autograd function."""

    apply = staticmethod(mamba_inner_fn_no_out_proj)


class BiMambaInnerFn:
    """:func:`bimamba_inner_fn` for code that calls the autograd function."""

    apply = staticmethod(bimamba_inner_fn)
