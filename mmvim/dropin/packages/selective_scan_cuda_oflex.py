"""A compiled module of VMamba, on :mod:`mmvim.ops`: a scan without gate, with a float32 output."""

import torch
from torch import Tensor

from mmvim.dropin import scans
from mmvim.ops import _validation as check

__all__ = ['bwd', 'fwd']


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_: Tensor | None,
    delta_bias_: Tensor | None,
    delta_softplus: bool,
    nrows: int,
    out_float: bool,
) -> list[Tensor]:
    """Scan; see :func:`mmvim.dropin.scans.forward`.

    ``nrows`` has no effect on the result; with ``out_float`` the output is float32 and not rounded
    to the dtype of u.
    """
    check.check_flag('out_float', out_float)
    scans.check_rows('nrows', nrows, B, u)
    if out_float:
        u, delta, B, C = scans.widened(u, delta, B, C)
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
    nrows: int,
) -> list[Tensor | None]:
    """Differentiate; see :func:`mmvim.dropin.scans.backward`. ``x_`` is not needed.

    ``dout`` has the dtype of the output, float32 or that of u.
    """
    scans.check_rows('nrows', nrows, B, u)
    given = u, delta, A, B, C
    if dout.dtype == torch.float32 and u.dtype != torch.float32:
        u, delta, B, C = scans.widened(u, delta, B, C)
    grads = scans.backward(
        u, delta, A, B, C, D_, None, delta_bias_, dout, None, None, delta_softplus, False
    )
    return [*(g.to(x.dtype) for g, x in zip(grads, given, strict=False)), *grads[5:]]
