import mmcv_reference as reference
import pytest
import torch
from torch.autograd import gradcheck

from mmvim.compat import mmcv_ext


@pytest.fixture
def case(device):
    generator = torch.Generator().manual_seed(0)
    shapes = torch.tensor([[4, 6], [2, 3]])
    value = torch.randn(2, 30, 2, 3, generator=generator, dtype=torch.float64)
    # Some samples fall beyond the border.
    locations = torch.rand(2, 3, 2, 2, 2, 2, generator=generator, dtype=torch.float64) * 1.3 - 0.15
    weights = torch.rand(2, 3, 2, 2, 2, generator=generator, dtype=torch.float64)
    start = torch.tensor([0, 24])
    return [t.to(device) for t in (value, shapes, start, locations, weights)]


@pytest.fixture
def attention(mmcv_ops):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    return MultiScaleDeformableAttnFunction.apply


def test_forward(attention, case):
    out = attention(*case, 64)
    value, shapes, _, locations, weights = (t.cpu() for t in case)
    expected = reference.deform_attention(value, shapes, locations, weights)
    torch.testing.assert_close(out.cpu(), expected)


def test_gradients(attention, case):
    value, shapes, start, locations, weights = case
    leaves = [t.requires_grad_() for t in (value, locations, weights)]

    def run(value, locations, weights):
        return attention(value, shapes, start, locations, weights, 64)

    assert gradcheck(run, leaves, nondet_tol=1e-10)


def test_half_precision_rounds_once(attention, case):
    value, shapes, start, locations, weights = case
    low = [t.half().requires_grad_() for t in (value, locations, weights)]
    full = [t.detach().float().requires_grad_() for t in low]
    out, expected = (attention(v, shapes, start, at, w, 64) for v, at, w in (low, full))
    assert torch.equal(out, expected.half())
    out.sum().backward()
    expected.sum().backward()
    for a, b in zip(low, full, strict=True):
        torch.testing.assert_close(a.grad, b.grad.half())


def test_functions_are_the_ones_under_test(attention):
    import mmcv._ext

    assert mmcv._ext.ms_deform_attn_forward is mmcv_ext.deform_attention.ms_deform_attn_forward
