"""Every op stays finite for extreme but legal inputs, forward and backward, on each backend.

Extreme: biases of Δ of ±20, A from -1e-4 to -1e4, activations up to the largest of their dtype. A
result may be infinite only where the exact one, in float64, is beyond what its dtype can hold. So
what is largest is one input at a time (two of 3e38 have no product in float32), and Δ is at most
1e12.
"""

import itertools
import random

import pytest
import torch

from mmvim import ops
from mmvim.ops import DISCRETIZATIONS, ScanInputs, extension

DTYPES = {
    'fp16': torch.float16,
    'bf16': torch.bfloat16,
    'fp32': torch.float32,
    'fp64': torch.float64,
}
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
BACKENDS = ['torch', 'compiled']
B, L, D, N = 1, 24, 4, 4

BIASES = (-20.0, 0.0, 20.0)
DECAYS = {
    'slow': (-1e-4,) * N,
    'one': (-1.0,) * N,
    'fast': (-1e4,) * N,
    'all': (-1e-4, -1e-2, -10.0, -1e4),
}
LARGE = (None, 'u', 'delta', 'delta < 0', 'B', 'C', 'z', 'z < 0')
# 'rk4' is a polynomial in ΔA, which grows for fast decay: with it, activations are moderate.
CASES = [
    case
    for case in itertools.product(DISCRETIZATIONS, BIASES, DECAYS, LARGE, (False, True))
    if case[0] != 'rk4' or case[3] is None
]


def largest(dtype: torch.dtype) -> float:
    """As large as a sum of some products with numbers around 10 leaves room for in float32."""
    return 6e4 if dtype == torch.float16 else min(torch.finfo(dtype).max, 1e38) / 1e4


def need(op: str, device: str, dtype: torch.dtype, backend: str) -> None:
    if backend == 'compiled' and not extension.supports(op, device, dtype):
        pytest.skip(f'no compiled {op} for {dtype} on {device}')


def inputs(bias: float, decay: str, large: str | None, dtype: torch.dtype, seed: int) -> dict:
    """Exact in ``dtype``, returned in float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # The third power of Δ is a coefficient of one of the methods.
    top = min(largest(dtype), 1e12) if large and 'delta' in large else largest(dtype)
    given = {
        'u': randn(B, L, D),
        'delta': randn(B, L, D),
        'A': torch.tensor(DECAYS[decay], dtype=torch.float64).repeat(D, 1),
        'B': randn(B, L, N),
        'C': randn(B, L, N),
        'D': randn(D),
        'z': randn(B, L, D),
        'delta_bias': bias + 0.1 * randn(D),
    }
    # Products stay in range where one factor is large.
    small = {'u': 'BC', 'B': 'uC', 'C': 'uB', 'delta': 'uBC', 'z': 'uBC', None: ''}
    name = large and large.split()[0]
    for other in small[name]:
        given[other] = given[other] * (1e-6 if name == 'delta' else 1e-3)
    if name is not None:
        sign = -1 if '<' in large else torch.sign(given[name])
        sign = 1 if large == 'delta' else sign
        given[name] = sign * top * (0.5 + 0.5 * torch.rand(given[name].shape, generator=generator))
        if name == 'u':
            given['D'] = given['D'] * 1e-3
    half = {k: v.to(dtype).double() for k, v in given.items()}
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    for k in ('A', 'D', 'delta_bias'):
        half[k] = given[k].to(parameter).double()
    return half


def scan(given: dict, method: str, reverse: bool, dtype, device: str, backend: str) -> dict:
    """Outputs and gradients, by name."""
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        k: v.to(device, parameter if k in ('A', 'D', 'delta_bias') else dtype).requires_grad_()
        for k, v in given.items()
    }
    options = dict(delta_softplus=True, discretization=method, backend=backend)
    out, state = ops.selective_scan(**leaves, **options, reverse=reverse, return_last_state=True)
    # As small as a loss makes it.
    gradient = torch.full_like(out, 1e-3) * torch.linspace(-1, 1, D, device=device).to(dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), gradient)
    return {'out': out, 'state': state, **{f'd{k}': g for k, g in zip(leaves, grads, strict=True)}}


def wrong(ours: dict, exact: dict) -> list[str]:
    """Names of what is not finite although the exact values fit."""
    found = []
    for name, value in ours.items():
        if value.numel() == 0:
            continue
        reference = exact[name].detach().cpu()
        # With room for the terms that a sum of both signs has.
        fits = reference.abs() < min(0.4 * torch.finfo(value.dtype).max, 1e36)
        bad = ~torch.isfinite(value.detach().cpu().double())
        if value.dtype != torch.float64:
            # Also in float32 on the way, of which the state tells.
            fits &= bool(torch.isfinite(exact['state']).all() and exact['state'].abs().max() < 1e36)
        if bool((bad & fits).any()):
            found.append(name)
    return found


def check(cases: list, dtype: torch.dtype, device: str, backend: str) -> None:
    failures = []
    for i, (method, bias, decay, large, reverse) in enumerate(cases):
        given = inputs(bias, decay, large, dtype, i)
        exact = scan(given, method, reverse, torch.float64, 'cpu', 'torch')
        ours = scan(given, method, reverse, dtype, device, backend)
        if names := wrong(ours, exact):
            failures.append((method, bias, decay, large, reverse, names))
    assert not failures, f'{len(failures)} of {len(cases)}:\n' + '\n'.join(map(str, failures[:40]))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
def test_selective_scan_is_finite(dtype, device, backend, count):
    need('selective_scan', device, dtype, backend)
    cases = random.Random(f'{dtype}').sample(CASES, 40 if device == 'cpu' else 200)
    check(cases, dtype, device, backend)
    count('cases', len(cases))


@pytest.mark.slow
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
def test_selective_scan_is_finite_in_every_case(dtype, device, backend, count):
    need('selective_scan', device, dtype, backend)
    check(CASES, dtype, device, backend)
    count('cases', len(CASES))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
def test_bidirectional_scan_is_finite(dtype, device, backend, count):
    need('bidirectional_scan', device, dtype, backend)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    cases = [case for case in random.Random(f'both {dtype}').sample(CASES, 60) if not case[-1]]
    failures = []
    for i, (method, bias, decay, large, _) in enumerate(cases):
        results = []
        for kind, place, path in ((torch.float64, 'cpu', 'torch'), (dtype, device, backend)):
            param = torch.float64 if kind == torch.float64 else parameter
            leaves, sides = [], []
            for side in range(2):
                given = inputs(bias, decay, large, dtype, 2 * i + side)
                z = given.pop('z')
                for k, v in given.items():
                    wanted = param if k in ('A', 'D', 'delta_bias') else kind
                    given[k] = v.to(place, wanted).requires_grad_()
                leaves += given.values()
                sides.append(ScanInputs(**given))
            z = z.to(place, kind).requires_grad_()
            out = ops.bidirectional_scan(
                *sides, z, scale=0.5, delta_softplus=True, discretization=method, backend=path
            )
            grads = torch.autograd.grad(out, [*leaves, z], torch.full_like(out, 1e-3))
            results.append({'out': out, **{str(k): g for k, g in enumerate(grads)}})
        exact, ours = results
        # How large a state becomes on the way is known from each direction alone.
        exact['state'] = torch.cat(
            [
                scan(
                    inputs(bias, decay, large, dtype, 2 * i + side),
                    method,
                    bool(side),
                    torch.float64,
                    'cpu',
                    'torch',
                )['state']
                for side in range(2)
            ]
        )
        if names := wrong(ours, exact):
            failures.append((method, bias, decay, large, names))
    assert not failures, '\n'.join(map(str, failures))
    count('cases', len(cases))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
def test_convolutions_are_finite(dtype, device, backend, count):
    need('causal_conv1d', device, dtype, backend)
    top = largest(dtype)
    for i, (mode, scale) in enumerate(
        itertools.product(('causal', 'reverse', 'same', 'both'), (1.0, 1e-30, top))
    ):
        generator = torch.Generator().manual_seed(i)
        x = scale * (2 * torch.rand(2, 24, D, generator=generator) - 1).double()
        x = x.to(device, dtype).requires_grad_()
        weights = [
            (0.2 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()
            for shape in ((D, 4), (D,), (D, 4), (D,))
        ]
        if mode == 'both':
            out = sum(ops.bidirectional_conv1d(x, *weights, activation='silu', backend=backend))
        else:
            out = ops.causal_conv1d(x, *weights[:2], activation='silu', mode=mode, backend=backend)
            weights = weights[:2]
        gradient = torch.full_like(out, 1e-4)
        grads = torch.autograd.grad(out, [x, *weights], gradient)
        for value in (out, *grads):
            assert torch.isfinite(value).all(), (mode, scale)
    count('cases', 12)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
def test_add_rms_norm_is_finite(dtype, device, backend, count):
    need('add_rms_norm', device, dtype, backend)
    top = largest(dtype)
    scales = (0.0, torch.finfo(dtype).tiny, 1e-6, 1.0, 1e4, top)
    for i, (scale, with_residual) in enumerate(itertools.product(scales, (False, True))):
        generator = torch.Generator().manual_seed(i)
        x, residual = (
            (scale * torch.randn(2, 7, 32, generator=generator).clamp(-1, 1).double())
            .to(device, kind)
            .requires_grad_()
            for kind in (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
        )
        weight = torch.ones(32, device=device, dtype=residual.dtype, requires_grad=True)
        given = residual if with_residual else None
        out, stream = ops.add_rms_norm(x, weight, given, backend=backend)
        leaves = [x, weight, *([residual] if with_residual else [])]
        grads = torch.autograd.grad((out, stream), leaves, (out.detach(), 1e-3 * stream.detach()))
        for value in (out, stream, *grads):
            assert torch.isfinite(value).all(), (scale, with_residual)
    count('cases', 12)
