"""The compiled module of Spatial-Mamba, on :mod:`mmvim.ops`: VMamba's without C.

Its output are the states themselves, of one for each channel.
"""

import torch
from torch import Tensor

from mmvim.dropin import vmamba
from mmvim.ops import _validation as check

__all__ = ['bwd', 'fwd']


def _ones(A: Tensor, B: Tensor) -> Tensor:
    check.check_tensor('A', A)
    check.check_tensor('B', B)
    if A.dim() != 2 or A.shape[1] != 1:
        raise ValueError(
            f'A must have shape (d, 1), got {tuple(A.shape)}: the states of one per channel are '
            'given out; for a sum over several use selective_scan_cuda_oflex with C'
        )
    return torch.ones_like(B)


def fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *others: Tensor | bool | int | None
) -> list[Tensor]:
    """Scan with A (d, 1), B (b, g, 1, l); the rest as in :func:`mmvim.dropin.vmamba.fwd`."""
    return vmamba.fwd(u, delta, A, B, _ones(A, B), *others)


def bwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *others: Tensor | bool | int | None
) -> list[Tensor | None]:
    """Differentiate; the rest as in :func:`mmvim.dropin.vmamba.bwd`."""
    du, ddelta, dA, dB, _, *rest = vmamba.bwd(u, delta, A, B, _ones(A, B), *others)
    return [du, ddelta, dA, dB, *rest]
