"""The layer norm of autocast against torch's."""

import pytest
import torch
from torch import nn

from mmvim.layers.norm import AutocastLayerNorm
from mmvim.ops import extension


def run(layer, x, grad, dtype):
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        out = layer(x)
    out.backward(grad.to(out.dtype))
    return out, x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('autocast', [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize('given', ['float32', 'autocast'])
@pytest.mark.parametrize(
    'shape', [(3, 5, 7, 96), (0, 96), (1, 4), (70, 30), (9, 1000), (5, 1100)], ids=str
)
def test_is_torchs_rounded_once(shape, given, autocast, device):
    torch.manual_seed(0)
    layer = AutocastLayerNorm(shape[-1]).to(device)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = 2 * torch.randn(shape, device=device) + 1
    if given == 'autocast':
        x = x.to(autocast or torch.float32)
    grad = torch.randn(shape, device=device).to(autocast or torch.float32)
    got = run(layer, x, grad, autocast)
    exact = nn.LayerNorm(shape[-1], device=device, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    expected = run(exact, x.double(), grad.double(), None)
    assert got[0].dtype == (autocast or torch.float32)
    assert got[1].dtype == x.dtype
    for one, two in zip(got, expected, strict=True):
        eps = torch.finfo(one.dtype).eps
        if device == 'cpu' and autocast:
            eps = torch.finfo(autocast).eps  # torch's own steps
        scale = two.abs().max().item() if two.numel() else 1
        torch.testing.assert_close(one.double(), two, rtol=4 * eps, atol=8 * eps * scale)


@pytest.mark.gpu
def test_has_kernels():
    assert extension.supports('layer_norm', 'cuda', torch.bfloat16)
