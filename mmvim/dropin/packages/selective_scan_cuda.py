"""The compiled module of mamba_ssm 1 and 2, on :mod:`mmvim.ops`."""

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
    z_: Tensor | None,
    delta_bias_: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """Scan; see :func:`mmvim.dropin.scans.forward`."""
    return scans.forward(u, delta, A, B, C, D_, z_, delta_bias_, delta_softplus)


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_: Tensor | None,
    z_: Tensor | None,
    delta_bias_: Tensor | None,
    dout: Tensor,
    x_: Tensor | None,
    out_: Tensor | None,
    dz_: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """Differentiate; see :func:`mmvim.dropin.scans.backward`. ``x_`` is not needed."""
    inputs = u, delta, A, B, C, D_, z_, delta_bias_
    return scans.backward(*inputs, dout, out_, dz_, delta_softplus, recompute_out_z)
