"""VMamba's package around its compiled module: a scan without gate."""

from torch import Tensor

from mmvim.dropin import scans

__all__ = ['selective_scan_fn', 'selective_scan_ref']


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Scan; arguments and results as for :func:`mmvim.dropin.scans.scan`."""
    return scans.scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


selective_scan_ref = selective_scan_fn
