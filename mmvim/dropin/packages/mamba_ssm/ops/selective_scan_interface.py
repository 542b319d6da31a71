"""The selective scan, and whole Mamba mixers between the projections, channels before time."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mmvim.dropin import convolutions, scans
from mmvim.dropin.norms import add_norm
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
selective_scan_fn = scans.scan


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
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`selective_scan_fn` in float32 (float64 for float64) whatever the dtypes.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, seq_idx: As there.

    Returns:
        As there.
    """
    check.check_activation('u', u, 'b d l')
    wide = compute_dtype(u.dtype)
    inputs = [
        t.to(wide) if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in (u, delta, A, B, C, D, z, delta_bias)
    ]
    result = scans.scan(*inputs, delta_softplus, return_last_state, seq_idx)
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
    norm_weights: Sequence[Tensor | None] = (None, None, None),
    norm_eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    """u, delta, B, C and z of the scan, (b, d, l) views of memory with channels last.

    ``norm_weights`` are those of RMS norms of B, C and delta.
    """
    check.check_activation('xz', xz, 'b 2d l')
    check.check_real('A', A)
    check.check_rank('A', A, 'd n')
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
    check.check_shape('x_proj_weight', x_proj_weight, f'r+{rows - rank} d', (rows, d))
    low_rank = F.linear(u.transpose(1, 2), x_proj_weight)
    delta = F.linear(low_rank[..., :rank], delta_proj_weight)
    made = []
    for name, given, bias, rows_of, weight in (
        ('b', B, B_proj_bias, low_rank[..., rank : rank + n], norm_weights[0]),
        ('c', C, C_proj_bias, low_rank[..., rows - n :], norm_weights[1]),
        ('dt', None, None, delta, norm_weights[2]),
    ):
        if given is not None:
            if weight is not None:
                raise ValueError(f'{name}_rms_weight does not go with a given {name.upper()}')
            made.append(given)
            continue
        value = rows_of if bias is None else rows_of + bias.to(rows_of.dtype)
        if weight is not None:
            check.check_tensor(f'{name}_rms_weight', weight)
            axis = 'd' if name == 'dt' else 'n'
            check.check_shape(f'{name}_rms_weight', weight, axis, value.shape[-1:])
            value = add_norm(value, weight, None, None, norm_eps, False, False, True)
        made.append(value.transpose(1, 2).to(u.dtype))
    B, C, delta = made
    return u, delta, B, C, z


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
    weights = conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight
    u, delta, B, C, z = _inputs(xz, *weights, A, B, C, B_proj_bias, C_proj_bias)
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
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """:func:`mamba_inner_fn_no_out_proj` and out_proj.

    Args:
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias,
            B_proj_bias, C_proj_bias, delta_softplus, checkpoint_lvl: As there.
        out_proj_weight, out_proj_bias: (c, d) and (c,) or None.
        b_rms_weight, c_rms_weight, dt_rms_weight: Weights of RMS norms, (n,), (n,) and (d,), of
            derived B and C and of delta before its bias.
        b_c_dt_rms_eps: Added to their mean squares.

    Returns:
        (b, l, c).
    """
    weights = conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight
    norms = (b_rms_weight, c_rms_weight, dt_rms_weight), b_c_dt_rms_eps
    u, delta, B, C, z = _inputs(xz, *weights, A, B, C, B_proj_bias, C_proj_bias, *norms)
    y = scans.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, contiguous=False)
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
    weights = conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight
    u, delta, B, C, z = _inputs(xz, *weights, A, B, C, B_proj_bias, C_proj_bias)
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
