"""A compiled module of VMamba, on :mod:`mmvim.ops`: a scan of one state, without an axis for it."""

from torch import Tensor

from mmvim.dropin import vmamba
from mmvim.ops import _validation as check

__all__ = ['bwd', 'fwd']


def _with_states(A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A (d,), B and C (b, g, l) with an axis for the one state."""
    for name, value, axes in (('A', A, 'd'), ('B', B, 'b g l'), ('C', C, 'b g l')):
        check.check_tensor(name, value)
        check.check_rank(name, value, axes)
    return A.unsqueeze(1), B.unsqueeze(2), C.unsqueeze(2)


def fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *others: Tensor | bool | int | None
) -> list[Tensor]:
    """Scan with A (d,), B and C (b, g, l); the rest as in :func:`mmvim.dropin.vmamba.fwd`."""
    return vmamba.fwd(u, delta, *_with_states(A, B, C), *others)


def bwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *others: Tensor | bool | int | None
) -> list[Tensor | None]:
    """Differentiate; the rest as in :func:`mmvim.dropin.vmamba.bwd`."""
    du, ddelta, dA, dB, dC, *rest = vmamba.bwd(u, delta, *_with_states(A, B, C), *others)
    return [du, ddelta, dA.squeeze(1), dB.squeeze(2), dC.squeeze(2), *rest]
