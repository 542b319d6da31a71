"""What the benchmark of the four-route scan compares computes the same."""

import pytest
import torch

from mmvim import ops
from mmvim.dropin.packages import selective_scan_cuda
from mmvim.layers import SS2D

SHAPE = (2, 3, 5, 8, 1, 2)


@pytest.fixture(scope='module')
def bench(load_script):
    script = load_script('benchmark/cross_scan.py')
    script.MambaSsmScan.module = selective_scan_cuda
    return script


@pytest.mark.parametrize('options', [{'d_state': 1, 'ssm_ratio': 1}, {'forward_type': 'v0'}])
def test_the_peer_is_the_same_layer(bench, options):
    torch.manual_seed(0)
    own = SS2D(8, **options)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x, weight = torch.randn(2, 2, 3, 5, 8)
    results = []
    for kind in (SS2D, bench.OnMambaSsm):
        own.__class__ = kind
        given = x.clone().requires_grad_()
        out = own(given)
        leaves = [given, *own.parameters()]
        results.append((out, *torch.autograd.grad(out, leaves, weight)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_what_is_timed(bench):
    """The kernels of all routes, a scan of each route, and the peer's, each way."""
    if not ops.extension.supports('cross_scan_fused', 'cpu', torch.float32):
        pytest.skip('the compiled kernels are not built')
    x = bench.inputs_of(SHAPE, torch.float32, 'cpu')
    outputs, gradients = [], []
    for fused in (True, False):
        forward, training, backward = bench.ours(x, fused)
        outputs += [forward()[0], training()[0]]
        gradients.append(backward())
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], rtol=1e-4, atol=1e-5)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    for forward, backward, both in bench.peer_calls(x).values():
        for call in filter(None, (forward, backward, both)):
            call()
