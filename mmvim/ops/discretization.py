r"""Discretizations of the diagonal state-space model h' = A h + v(t), v = B u.

With Δ the step, z = ΔA, every method is a recurrence

.. math:: h_t = a\,h_{t-1} + w_0\,v_t + w_1\,v_{t-1}

whose coefficients are built from φ0 = e^z, φ1 = (φ0 − 1)/z, φ2 = (φ1 − 1)/z, φ3 = (φ2 − ½)/z
(Hochbruck and Ostermann, *Exponential integrators*, Acta Numerica 2010):

============== ===================== ============================== ===========
name           a                     w0                             w1
============== ===================== ============================== ===========
``zoh``        φ0                    Δ                              –
``zoh_exact``  φ0                    Δ φ1                           –
``foh``        φ0                    Δ² φ2                          –
``bilinear``   (1 + z/2)/(1 − z/2)   Δ/(1 − z/2)                    –
``poly``       φ0                    Δ φ1 + ½Δ² φ2                  –
``highorder``  φ0                    Δ φ1 + Δ² φ2 + ½Δ³ φ3          –
``rk4``        φ0                    Δ(1 + z/2 + z²/6 + z³/24)      –
``foh_hold``   φ0                    Δ φ2                           Δ(φ1 − φ2)
``tustin``     (1 + z/2)/(1 − z/2)   Δ/(2(1 − z/2))                 = w0
============== ===================== ============================== ===========

``zoh`` is Mamba's simplified zero-order hold (Gu and Dao, arXiv 2312.00752, and its code), which
released checkpoints use; ``zoh_exact`` is that paper's equation 4. ``foh`` to ``rk4`` are the
methods of the VisionMambaUpgrades documents, in closed form rather than as truncated series.
``foh_hold`` (input linear between samples) and ``tustin`` (trapezoidal rule) are the textbook
second-order methods. ``rk4`` is a polynomial in z and grows for large −z.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

DISCRETIZATIONS = (
    'zoh',
    'zoh_exact',
    'foh',
    'bilinear',
    'poly',
    'highorder',
    'rk4',
    'foh_hold',
    'tustin',
)
"""Names of the methods."""

TWO_TAP = frozenset({'foh_hold', 'tustin'})
"""Methods that also use the previous input, which is then part of the state."""


_HIGHEST_PHI = {'zoh_exact': 1, 'foh': 2, 'poly': 2, 'highorder': 3, 'foh_hold': 2}


class Coefficients(NamedTuple):
    """Coefficients of one step; ``w1`` is None for one-tap methods."""

    a: Tensor
    w0: Tensor
    w1: Tensor | None


class Derivatives(NamedTuple):
    """Partial derivatives with respect to Δ (at fixed z) and z (at fixed Δ); None where zero."""

    a_z: Tensor
    w0_delta: Tensor
    w0_z: Tensor | None
    w1_delta: Tensor | None
    w1_z: Tensor | None


# Below this |z| the closed forms lose digits to cancellation and the Taylor series takes over.
_SERIES_RADIUS = 1.0


@functools.lru_cache
def _series(k: int, dtype: torch.dtype) -> tuple[float, ...]:
    """Taylor coefficients of φ_k, as many as count for |z| < 1."""
    coefficients = []
    while not coefficients or coefficients[-1] > coefficients[0] * torch.finfo(dtype).eps:
        coefficients.append(1 / math.factorial(k + len(coefficients)))
    return tuple(coefficients)


def phi_functions(z: Tensor, highest: int) -> list[Tensor]:
    """φ0 … φ_highest of z (any sign), each to a few units in the last place.

    φ1 is (e^z − 1)/z by ``expm1``. For the others, where |z| < 1, the highest one is a Taylor
    series and the rest follow by the stable downward recurrence φ_{k−1} = z φ_k + 1/(k−1)!;
    elsewhere they follow upward from φ1.

    Args:
        z: float32 or float64.
        highest: 0 to 4.
    """
    result = [torch.exp(z)]
    if highest == 0:
        return result
    result.append(torch.expm1(z).div_(z).masked_fill_(z == 0, 1))
    if highest == 1:
        return result
    small = z.abs() < _SERIES_RADIUS
    # The series only matters inside its radius; the clamp keeps it finite outside.
    x = z.clamp(-_SERIES_RADIUS, _SERIES_RADIUS)
    *others, last, end = _series(highest, z.dtype)
    value = (x * end).add_(last)
    for coefficient in reversed(others):
        value.mul_(x).add_(coefficient)
    near = [value]
    for k in range(highest - 1, 1, -1):
        near.append(torch.mul(near[-1], x).add_(1 / math.factorial(k)))
    far = result[1]
    for k in range(2, highest + 1):
        far = (far - 1 / math.factorial(k - 1)).div_(z)
        result.append(torch.where(small, near.pop(), far))
    return result


def _phi_derivative(phi: list[Tensor], z: Tensor, k: int) -> Tensor:
    """φ_k′ = φ_k − kφ_{k+1} = (φ_{k−1} − kφ_k)/z, by the form that does not cancel."""
    near = phi[k] - k * phi[k + 1]
    far = (phi[k - 1] - k * phi[k]).div_(z)
    return torch.where(z.abs() < _SERIES_RADIUS, near, far)


def phi_of(method: str, z: Tensor, *, for_derivatives: bool) -> list[Tensor] | None:
    """The φ functions that ``method`` uses, or None.

    Args:
        method: One of :data:`DISCRETIZATIONS`.
        z: ΔA.
        for_derivatives: :func:`derivatives` needs one more than :func:`coefficients`.
    """
    highest = _HIGHEST_PHI.get(method)
    return None if highest is None else phi_functions(z, highest + for_derivatives)


def coefficients(
    method: str,
    delta: Tensor,
    z: Tensor,
    phi: list[Tensor] | None = None,
    *,
    overwrite: bool = False,
) -> Coefficients:
    """Coefficients of ``method``.

    Args:
        method: One of :data:`DISCRETIZATIONS`.
        delta: Δ, broadcastable to ``z``.
        z: ΔA.
        phi: The result of :func:`phi_of`, if already computed.
        overwrite: Whether z may be overwritten by a.

    Returns:
        ``w0`` has the shape of ``delta`` for ``'zoh'``, else of ``z``.
    """
    if method == 'zoh':
        return Coefficients(z.exp_() if overwrite else torch.exp(z), delta, None)
    if method in ('bilinear', 'tustin'):
        r = torch.rsub(z, 1, alpha=0.5).reciprocal_()
        a = (1 + 0.5 * z).mul_(r)
        if method == 'bilinear':
            return Coefficients(a, r.mul_(delta), None)
        w = r.mul_(0.5 * delta)
        return Coefficients(a, w, w)
    if method == 'rk4':
        return Coefficients(torch.exp(z), _rk4(z).mul_(delta), None)
    phi = phi or phi_of(method, z, for_derivatives=False)
    if phi is None:
        raise ValueError(f'discretization must be one of {DISCRETIZATIONS}, got {method!r}')
    if method == 'zoh_exact':
        return Coefficients(phi[0], phi[1] * delta, None)
    if method == 'foh':
        return Coefficients(phi[0], phi[2] * (delta * delta), None)
    if method == 'poly':
        w = torch.addcmul(phi[1], phi[2], 0.5 * delta)
        return Coefficients(phi[0], w.mul_(delta), None)
    if method == 'highorder':
        w = torch.addcmul(phi[2], phi[3], 0.5 * delta)
        return Coefficients(phi[0], w.mul_(delta).add_(phi[1]).mul_(delta), None)
    # foh_hold: φ1 − φ2 = φ1′, which has a form that does not cancel for large −z.
    w1 = _phi_derivative(phi, z, 1).mul_(delta)
    return Coefficients(phi[0], phi[2] * delta, w1)


def derivatives(
    method: str, delta: Tensor, z: Tensor, a: Tensor, phi: list[Tensor] | None = None
) -> Derivatives:
    """Partial derivatives of the coefficients of ``method``.

    Args:
        method: One of :data:`DISCRETIZATIONS`.
        delta: Δ, broadcastable to ``z``.
        z: ΔA; ignored by ``'zoh'``.
        a: The coefficient a, from :func:`coefficients`.
        phi: The result of :func:`phi_of`, if already computed.

    Returns:
        No argument is modified, but results may be a or one of phi.
    """
    if method == 'zoh':
        return Derivatives(a, torch.ones_like(delta), None, None, None)
    if method in ('bilinear', 'tustin'):
        r = torch.rsub(z, 1, alpha=0.5).reciprocal_()
        r2 = r * r
        if method == 'bilinear':
            return Derivatives(r2, r, 0.5 * delta * r2, None, None)
        half, w_z = 0.5 * r, 0.25 * delta * r2
        return Derivatives(r2, half, w_z, half, w_z)
    if method == 'rk4':
        slope = (z * 0.125).add_(1 / 3).mul_(z).add_(0.5)
        return Derivatives(a, _rk4(z), slope.mul_(delta), None, None)
    phi = phi or phi_of(method, z, for_derivatives=True)
    if phi is None:
        raise ValueError(f'discretization must be one of {DISCRETIZATIONS}, got {method!r}')
    d1 = _phi_derivative(phi, z, 1)
    if method == 'zoh_exact':
        return Derivatives(a, phi[1], d1.mul_(delta), None, None)
    d2 = _phi_derivative(phi, z, 2)
    if method == 'foh':
        return Derivatives(a, 2 * delta * phi[2], d2.mul_(delta * delta), None, None)
    if method == 'poly':
        w_z = d1.addcmul_(d2, 0.5 * delta).mul_(delta)
        return Derivatives(a, torch.addcmul(phi[1], phi[2], delta), w_z, None, None)
    if method == 'highorder':
        d3 = _phi_derivative(phi, z, 3)
        w_delta = torch.addcmul(phi[1], phi[2], 2 * delta).addcmul_(phi[3], 1.5 * delta * delta)
        w_z = d1.addcmul_(d2.addcmul_(d3, 0.5 * delta), delta).mul_(delta)
        return Derivatives(a, w_delta, w_z, None, None)
    # foh_hold: w1 = Δφ1′, so its slope is φ1″ = φ1′ − φ2′ = (φ0 − 2φ1′)/z.
    near, far = d1 - d2, (phi[0] - 2 * d1).div_(z)
    second = torch.where(z.abs() < _SERIES_RADIUS, near, far)
    return Derivatives(a, phi[2], d2.mul_(delta), d1, second.mul_(delta))


def _rk4(z: Tensor) -> Tensor:
    return (z / 24).add_(1 / 6).mul_(z).add_(0.5).mul_(z).add_(1)
