"""Autocast: activations are cast, parameters and states are not, gradients come back as given."""

import pytest
import torch
from ops_support import cross_scan_inputs, need, randn, scan_inputs

from mmvim.ops import (
    ScanInputs,
    add_rms_norm,
    bidirectional_conv1d,
    bidirectional_scan,
    causal_conv1d,
    cross_scan,
    selective_scan,
)

CASTS = ('u', 'delta', 'B', 'C', 'z')


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def low(request):
    return request.param


def test_selective_scan(backend, device, low):
    need(backend, 'selective_scan', device, low)
    tensors = scan_inputs(2, 9, 4, 3, dtype=torch.float32, device=device)
    tensors = {k: v.requires_grad_() for k, v in tensors.items()}
    state = randn(2, 4, 3, seed=30, dtype=torch.float32, device=device).requires_grad_()
    with torch.autocast(device, low):
        out, last = selective_scan(
            **tensors, initial_state=state, return_last_state=True, delta_softplus=True
        )
    assert out.dtype == low
    assert last.dtype == torch.float32
    cast = {k: v.detach().to(low) if k in CASTS else v.detach() for k, v in tensors.items()}
    expected = selective_scan(**cast, initial_state=state.detach(), delta_softplus=True)
    assert torch.equal(out, expected)
    (out.float().sum() + last.sum()).backward()
    for value in (*tensors.values(), state):
        assert value.grad.dtype == torch.float32


def test_arithmetic_inside_is_not_cast(device, low):
    """The PyTorch implementation uses matrix products, which autocast would make in ``low``."""
    tensors = scan_inputs(2, 33, 8, 16, dtype=torch.float32, device=device)
    tensors = {k: v.to(low).float() for k, v in tensors.items()}
    exact = selective_scan(**tensors, delta_softplus=True, backend='torch')
    ops = torch.ops.mmvim_torch
    values = [v.unsqueeze(2) if k in 'BC' else v for k, v in tensors.items()]
    with torch.autocast(device, low):
        out = ops.selective_scan(*values, None, True, 'zoh', False, False, 0)[0]
    assert torch.equal(out, exact)


def test_bidirectional_scan(backend, device, low):
    need(backend, 'bidirectional_scan', device, low)
    tensors = scan_inputs(2, 9, 4, 3, dtype=torch.float32, device=device)
    z = tensors.pop('z')
    inputs = ScanInputs(**tensors)
    with torch.autocast(device, low):
        out = bidirectional_scan(inputs, inputs, z, delta_softplus=True)
    assert out.dtype == low
    cast = ScanInputs(**{k: v.to(low) if k in CASTS else v for k, v in tensors.items()})
    assert torch.equal(out, bidirectional_scan(cast, cast, z.to(low), delta_softplus=True))


def test_cross_scan(backend, device, low):
    need(backend, 'selective_scan', device, torch.float32)
    tensors = cross_scan_inputs(2, 3, 4, 5, 3, rank=2, dtype=torch.float32, device=device)
    tensors = {k: v.requires_grad_() for k, v in tensors.items()}
    with torch.autocast(device, low):
        out = cross_scan(**tensors, delta_softplus=True)
    assert out.dtype == low
    given = {k: v.detach() for k, v in tensors.items()}
    cast = {k: v.to(low) if k in ('x', 'delta', 'B', 'C') else v for k, v in given.items()}
    assert torch.equal(out, cross_scan(**cast, delta_softplus=True))
    out.float().sum().backward()
    assert all(value.grad.dtype == torch.float32 for value in tensors.values())


def test_convolutions(backend, device, low):
    need(backend, 'causal_conv1d', device, low)
    need(backend, 'bidirectional_conv1d', device, low)
    x = randn(2, 9, 4, dtype=torch.float32, device=device).requires_grad_()
    weight = randn(4, 4, seed=1, dtype=torch.float32, device=device).requires_grad_()
    with torch.autocast(device, low):
        out = causal_conv1d(x, weight, activation='silu')
        two = bidirectional_conv1d(x, weight, None, weight, None)
    assert out.dtype == two[0].dtype == two[1].dtype == low
    assert torch.equal(out, causal_conv1d(x.to(low), weight, activation='silu'))
    out.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_add_rms_norm(backend, device, low):
    need(backend, 'add_rms_norm', device, low)
    x = randn(2, 9, 4, dtype=torch.float32, device=device)
    residual = randn(2, 9, 4, seed=1, dtype=torch.float32, device=device)
    weight = torch.ones(4, device=device)
    with torch.autocast(device, low):
        out, total = add_rms_norm(x, weight, residual)
    assert out.dtype == low
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, x.to(low).float() + residual)


def test_parameters_of_another_low_precision(device, low):
    """Those of a model in half precision, under autocast to the other half precision."""
    other = torch.float16 if low == torch.bfloat16 else torch.bfloat16

    def random(*shape, seed=0):
        return randn(*shape, seed=seed, dtype=torch.float32, device=device)

    scan = scan_inputs(2, 5, 4, 3, dtype=torch.float32, device=device)
    cross = cross_scan_inputs(1, 2, 3, 4, 3, rank=2, dtype=torch.float32, device=device)
    x, weight, bias = random(2, 5, 4), random(4, 3, seed=1), random(4, seed=2)
    both = dict(weight_f=weight, bias_f=bias, weight_b=weight + 1, bias_b=bias)
    for op, inputs in (
        (selective_scan, scan),
        (cross_scan, cross),
        (causal_conv1d, dict(x=x, weight=weight, bias=bias)),
        (bidirectional_conv1d, dict(x=x, **both)),
        (add_rms_norm, dict(x=x, weight=bias)),
    ):
        half = {k: v if k in ('x', *CASTS) else v.to(other) for k, v in inputs.items()}
        wide = {k: v.float() for k, v in half.items()}
        with torch.autocast(device, low):
            torch.testing.assert_close(op(**half), op(**wide), rtol=0, atol=0)


def test_float64_is_left_alone(low):
    tensors = scan_inputs(2, 5, 4, 3)
    with torch.autocast('cpu', low):
        assert selective_scan(**tensors).dtype == torch.float64
        x = tensors['u']
        assert causal_conv1d(x, torch.ones(4, 3, dtype=x.dtype)).dtype == torch.float64


def test_compiles(low):
    tensors = scan_inputs(2, 5, 4, 3, dtype=torch.float32)

    def function(**tensors):
        with torch.autocast('cpu', low):
            return selective_scan(**tensors, delta_softplus=True)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
    assert torch.equal(compiled(**tensors), function(**tensors))
