"""The coefficients: accuracy, derivatives, and orders of convergence."""

import math
from itertools import pairwise

import mpmath
import pytest
import torch

from mmvim.ops import DISCRETIZATIONS, selective_scan
from mmvim.ops.discretization import coefficients, derivatives, phi_functions

# Tiny, around the change from series to closed form, large; a negative step gives positive z.
POINTS = torch.cat(
    (
        -torch.logspace(-30, 2.3, 90, dtype=torch.float64),
        -torch.linspace(0.9, 3, 60, dtype=torch.float64),
        torch.logspace(-8, 0.9, 30, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
    )
).float()


def exact_phi(k, z):
    with mpmath.workdps(60):
        z = mpmath.mpf(z)
        if abs(z) < 0.01:
            return mpmath.fsum(z**i / mpmath.factorial(i + k) for i in range(25))
        value = mpmath.exp(z)
        for i in range(1, k + 1):
            value = (value - 1 / mpmath.factorial(i - 1)) / z
        return value


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_phi_functions_are_accurate_everywhere(dtype):
    z = POINTS.to(dtype)
    values = phi_functions(z, 4)
    for k, value in enumerate(values):
        exact = [exact_phi(k, x) for x in z.tolist()]
        error = max(
            abs(v - e) / max(abs(e), torch.finfo(dtype).smallest_normal / torch.finfo(dtype).eps)
            for v, e in zip(value.tolist(), exact, strict=True)
        )
        assert error < 16 * torch.finfo(dtype).eps, f'phi_{k}: {mpmath.nstr(error, 3)}'


@pytest.mark.parametrize('highest', range(5))
def test_phi_functions_do_not_depend_on_the_highest(highest):
    z = POINTS.double()
    for few, many in zip(phi_functions(z, highest), phi_functions(z, 4), strict=False):
        torch.testing.assert_close(few, many, rtol=3e-15, atol=0)


def exact_coefficients(method, delta, z):
    """The table of the documentation, in 60 digits."""
    with mpmath.workdps(60):
        delta, z = mpmath.mpf(delta), mpmath.mpf(z)
        phi = [exact_phi(k, z) for k in range(4)]
        trapezoid = (1 + z / 2) / (1 - z / 2)
        r = 1 / (1 - z / 2)
        return {
            'zoh': (phi[0], delta, 0),
            'zoh_exact': (phi[0], delta * phi[1], 0),
            'foh': (phi[0], delta**2 * phi[2], 0),
            'bilinear': (trapezoid, delta * r, 0),
            'poly': (phi[0], delta * phi[1] + delta**2 * phi[2] / 2, 0),
            'highorder': (
                phi[0],
                delta * phi[1] + delta**2 * phi[2] + delta**3 * phi[3] / 2,
                0,
            ),
            'rk4': (phi[0], delta * (1 + z / 2 + z**2 / 6 + z**3 / 24), 0),
            'foh_hold': (phi[0], delta * phi[2], delta * (phi[1] - phi[2])),
            'tustin': (trapezoid, delta * r / 2, delta * r / 2),
        }[method]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('method', DISCRETIZATIONS)
def test_coefficients_match_the_table(method, dtype):
    # Not at the root of rk4's polynomial, nor at the pole of the trapezoid, z = 2.
    z = torch.cat((-torch.logspace(-12, 1.5, 40), torch.tensor([0.0, 0.3]))).to(dtype)
    z = z[(z + 2.3).abs() > 0.5]
    delta = torch.full_like(z, 0.375)
    got = coefficients(method, delta, z)
    exact = [exact_coefficients(method, 0.375, x) for x in z.tolist()]
    for i, value in enumerate(got):
        if value is None:
            assert all(e[i] == 0 for e in exact)
            continue
        expected = torch.tensor([float(e[i]) for e in exact], dtype=torch.float64)
        torch.testing.assert_close(
            value.double(), expected, rtol=24 * torch.finfo(dtype).eps, atol=1e-30
        )


@pytest.mark.parametrize('method', DISCRETIZATIONS)
def test_derivatives_match_differences_in_high_precision(method):
    delta_value = 0.375
    z = torch.tensor([0.0, -1e-9, -1e-3, -0.4, -0.999, -1.001, -2.7, -9.0, -60.0, 0.2]).double()
    delta = torch.full_like(z, delta_value)
    a = coefficients(method, delta, z).a
    a_z, w0_delta, w0_z, w1_delta, w1_z = derivatives(method, delta, z, a)
    zeros = torch.zeros_like(z)
    step = mpmath.mpf('1e-20')

    def slope(i, by_delta, by_z):
        values = []
        for x in z.tolist():
            with mpmath.workdps(60):
                ends = [
                    exact_coefficients(
                        method, delta_value + sign * by_delta * step, x + sign * by_z * step
                    )[i]
                    for sign in (1, -1)
                ]
                values.append(float((ends[0] - ends[1]) / (2 * step)))
        return torch.tensor(values, dtype=torch.float64)

    for got, expected in (
        (a_z, slope(0, 0, 1)),
        (w0_delta, slope(1, 1, 0)),
        (w0_z, slope(1, 0, 1)),
        (w1_delta, slope(2, 1, 0)),
        (w1_z, slope(2, 0, 1)),
    ):
        got = zeros if got is None else got.expand_as(z)
        torch.testing.assert_close(got, expected, rtol=2e-13, atol=1e-25)


@pytest.mark.parametrize('method', DISCRETIZATIONS)
def test_nothing_is_modified_and_all_is_finite(method):
    z = POINTS.clone()
    delta = torch.full_like(z, 0.1)
    a, w0, w1 = coefficients(method, delta, z)
    slopes = derivatives(method, delta, z, a)
    assert torch.equal(z, POINTS)
    assert torch.equal(delta, torch.full_like(z, 0.1))
    for value in (a, w0, w1, *slopes):
        assert value is None or value.isfinite().all()


def test_unknown_method():
    x = torch.ones(1)
    with pytest.raises(ValueError, match=r'discretization must be one of .*euler'):
        coefficients('euler', x, -x)
    with pytest.raises(ValueError, match=r'discretization must be one of .*euler'):
        derivatives('euler', x, -x, x)


def solution_error(method, steps):
    """Error at t = 2 of h' = A h + B sin(3 t), h(0) = 0, against the closed-form solution."""
    a, w, end = -1.7, 3.0, 2.0
    t = torch.linspace(0, end, steps + 1, dtype=torch.float64)[1:]
    u = torch.sin(w * t).view(1, steps, 1)
    one = torch.ones(1, steps, 1, dtype=torch.float64)
    h = selective_scan(
        u,
        torch.full_like(u, end / steps),
        torch.full((1, 1), a, dtype=torch.float64),
        one,
        one,
        discretization=method,
    )[0, -1, 0]
    exact = (w * math.exp(a * end) - a * math.sin(w * end) - w * math.cos(w * end)) / (a**2 + w**2)
    return abs(h.item() - exact)


@pytest.mark.parametrize(
    ('method', 'order'),
    [
        ('zoh', 1),
        ('zoh_exact', 1),
        ('bilinear', 1),
        ('rk4', 1),
        ('foh_hold', 2),
        ('tustin', 2),
    ],
)
def test_order_of_convergence(method, order):
    errors = [solution_error(method, steps) for steps in (200, 400, 800)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)
