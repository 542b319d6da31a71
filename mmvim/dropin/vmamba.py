"""The compiled modules of VMamba: a scan without gate, whose output may be float32."""

import torch
from torch import Tensor

from mmvim.ops import _validation as check
from mmvim.ops._library import compute_dtype

from . import scans


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_: Tensor | None,
    delta_bias_: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = False,
) -> list[Tensor]:
    """Scan; see :func:`mmvim.dropin.scans.forward`.

    ``nrows`` has no effect on the result; with ``out_float`` the output is float32 and not rounded
    to the dtype of u.
    """
    _check_rows(nrows, B, u)
    if check.as_flag('out_float', out_float):
        u, delta, B, C = _widened(u, delta, B, C)
    return scans.forward(u, delta, A, B, C, D_, None, delta_bias_, delta_softplus)


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_: Tensor | None,
    delta_bias_: Tensor | None,
    dout: Tensor,
    x_: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor | None]:
    """Differentiate; see :func:`mmvim.dropin.scans.backward`. ``x_`` is not needed.

    ``dout`` has the dtype of the output, float32 or that of u. The first release had the output, or
    None, in the place of ``delta_softplus`` and this in the place of ``nrows``.
    """
    if delta_softplus is None or isinstance(delta_softplus, Tensor):
        delta_softplus, nrows = nrows, 1
    _check_rows(nrows, B, u)
    given = u, delta, A, B, C
    if dout.dtype == torch.float32 and u.dtype != torch.float32:
        u, delta, B, C = _widened(u, delta, B, C)
    grads = scans.backward(
        u, delta, A, B, C, D_, None, delta_bias_, dout, None, None, delta_softplus, False
    )
    return [*(g.to(x.dtype) for g, x in zip(grads, given, strict=False)), *grads[5:]]


def _widened(u: Tensor, *others: Tensor) -> list[Tensor]:
    """All in float32, after a check of their dtypes, which a conversion would hide."""
    check.check_tensor('u', u)
    for name, value in zip(('delta', 'B', 'C'), others, strict=True):
        check.check_tensor(name, value)
        check.check_dtype(name, value, u.dtype, why='as u')
    return [x.to(compute_dtype(u.dtype)) for x in (u, *others)]


def _check_rows(rows: object, B: Tensor, u: Tensor) -> None:
    """Refuse a number of rows per block that the kernels refuse; here it has no effect."""
    if isinstance(rows, bool) or not isinstance(rows, int) or rows not in (1, 2, 3, 4):
        raise ValueError(f'nrows must be 1, 2, 3 or 4, got {rows!r}')
    groups = B.shape[1] if isinstance(B, Tensor) and B.dim() == 4 else 1
    if isinstance(u, Tensor) and u.dim() == 3 and u.shape[1] % (groups * rows):
        raise ValueError(
            f'nrows must divide the {u.shape[1] // groups} channels of a group, got {rows}; '
            'nrows=1 always does'
        )
