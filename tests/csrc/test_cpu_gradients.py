"""gradcheck in float64 on the compiled kernels themselves, and opcheck."""

import pytest
import torch

from mmvim import ops
from mmvim.ops import DISCRETIZATIONS, extension

pytestmark = pytest.mark.skipif(
    not extension.supports('selective_scan', 'cpu', torch.float64), reason='no compiled library'
)


def randn(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def scan_inputs(b, length, d, n, groups, seed=0):
    shapes = {
        'u': (b, length, d),
        'delta': (b, length, d),
        'A': (d, n),
        'B': (b, length, groups, n),
        'C': (b, length, groups, n),
        'D': (d,),
        'delta_bias': (d,),
    }
    values = {k: randn(*s, seed=seed + i) for i, (k, s) in enumerate(shapes.items())}
    # On both sides of |z| = 1, where the series of the phi functions end.
    values['A'] = -torch.exp(values['A'] + torch.linspace(-1, 2, n))
    return values


def check(function, values):
    values = [None if v is None else v.requires_grad_() for v in values]
    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('state', [False, True], ids=['zero', 'state'])
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('method', DISCRETIZATIONS)
def test_selective_scan(method, reverse, state, groups):
    # Longer than the 16 steps between checkpoints; channels that fill no vector.
    values = scan_inputs(1, 18, 2, 2, groups)
    values['z'] = randn(1, 18, 2, seed=8)
    parts = 2 if method in ('foh_hold', 'tustin') else 1
    values['initial_state'] = randn(1, 2, parts * 2, seed=9) if state else None

    def function(*inputs):
        u, delta, A, B, C, D, bias, z, initial_state = inputs
        return ops.selective_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            bias,
            delta_softplus=True,
            initial_state=initial_state,
            return_last_state=state,
            discretization=method,
            reverse=reverse,
            backend='compiled',
        )

    check(function, values.values())


@pytest.mark.parametrize('gated', [True, False])
def test_bidirectional_scan(gated):
    one, two = scan_inputs(2, 5, 3, 2, 1), scan_inputs(2, 5, 3, 2, 3, seed=20)
    z = randn(2, 5, 3, seed=40) if gated else None

    def function(*inputs):
        return ops.bidirectional_scan(
            ops.ScanInputs(*inputs[:7]),
            ops.ScanInputs(*inputs[7:14]),
            inputs[14],
            scale=0.5,
            delta_softplus=True,
            backend='compiled',
        )

    check(function, (*one.values(), *two.values(), z))


@pytest.mark.parametrize('width', [2, 3, 4])
@pytest.mark.parametrize('length', [0, 1, 5])
@pytest.mark.parametrize('mode', ['causal', 'reverse', 'same'])
def test_causal_conv1d(mode, length, width):
    state = mode != 'same'
    values = [randn(2, length, 3, seed=1), randn(3, width, seed=2), randn(3, seed=3)]
    values.append(randn(2, 3, width - 1, seed=4) if state else None)

    def function(x, weight, bias, initial_state):
        return ops.causal_conv1d(
            x,
            weight,
            bias,
            activation='silu',
            mode=mode,
            initial_state=initial_state,
            return_last_state=state,
            backend='compiled',
        )

    check(function, values)


def test_bidirectional_conv1d():
    values = [randn(2, 6, 3, seed=1)]
    for i in range(2):
        values += [randn(3, 4, seed=2 + i), randn(3, seed=4 + i)]

    def function(*inputs):
        return ops.bidirectional_conv1d(*inputs, activation='silu', backend='compiled')

    check(function, values)


@pytest.mark.parametrize('residual', [True, False])
def test_add_rms_norm(residual):
    values = [randn(2, 3, 5, seed=1), randn(5, seed=2), randn(2, 3, 5, seed=3)]

    def function(x, weight, r):
        return ops.add_rms_norm(x, weight, r, backend='compiled')

    check(function, values if residual else [*values[:2], None])


CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    def cast(values, *parameters):
        return [
            None if v is None else v.to(torch.float32 if k in parameters else dtype).detach()
            for k, v in values.items()
        ]

    one = cast(scan_inputs(2, 20, 5, 3, 1), 'A', 'D', 'delta_bias')
    u, delta, A, B, C, D, bias = one
    compiled = torch.ops.mmvim
    calls = [
        (
            compiled.selective_scan,
            (u, delta, A, B, C, D, u, bias, None, True, 'tustin', True, True, 16),
        ),
        (compiled.bidirectional_scan, (*one, *one, u, 0.5, True, 'zoh', 16)),
        (compiled.causal_conv1d, (u, A, D, None, 'reverse', True, True)),
        (compiled.bidirectional_conv1d, (u, A, D, A, None, True)),
        (compiled.add_rms_norm, (u, None, D, 1e-5, True)),
    ]
    for op, inputs in calls:
        torch.library.opcheck(op.default, inputs, test_utils=CHECKS)
        inputs = tuple(
            x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs
        )
        torch.library.opcheck(op.default, inputs, test_utils=CHECKS)
