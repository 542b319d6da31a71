"""A compiled module of VMamba, on :mod:`mmvim.ops`: a scan without gate."""

from torch import Tensor

from mmvim.dropin import scans

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
) -> list[Tensor]:
    """Scan; see :func:`mmvim.dropin.scans.forward`. ``nrows`` has no effect on the result."""
    scans.check_rows('nrows', nrows, B, u)
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
    """Differentiate; see :func:`mmvim.dropin.scans.backward`. ``x_`` is not needed."""
    scans.check_rows('nrows', nrows, B, u)
    return scans.backward(
        u, delta, A, B, C, D_, None, delta_bias_, dout, None, None, delta_softplus, False
    )
