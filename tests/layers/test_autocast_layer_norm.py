"""The layer norms of autocast against torch's."""

import pytest
import torch
from torch import nn

from mmvim.layers.norm import (
    AutocastLayerNorm,
    AutocastLayerNorm2d,
    LayerNorm2d,
    StreamLayerNorm,
)
from mmvim.ops import extension
from mmvim.ops.layer_norm import layer_norm

ON_BOTH = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])


def run(layer, x, grad, dtype):
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        out = layer(x)
    out.backward(grad.to(out.dtype))
    return out, x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()


@ON_BOTH
@pytest.mark.parametrize('kind', [AutocastLayerNorm, StreamLayerNorm])
@pytest.mark.parametrize('autocast', [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize('given', ['float32', 'autocast'])
@pytest.mark.parametrize(
    'shape',
    [(3, 5, 7, 96), (0, 96), (1, 4), (70, 30), (33, 48), (5, 300), (7, 600), (9, 1000), (5, 1100)],
    ids=str,
)
def test_is_torchs_rounded_once(shape, given, autocast, kind, device):
    torch.manual_seed(0)
    layer = kind(shape[-1]).to(device)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = 2 * torch.randn(shape, device=device) + 1
    if given == 'autocast':
        x = x.to(autocast or torch.float32)
    result = autocast or torch.float32
    if kind is StreamLayerNorm:  # autocast has a rule for layer norms on GPUs alone
        result = torch.float32 if device == 'cuda' else x.dtype
    grad = torch.randn(shape, device=device).to(result)
    got = run(layer, x, grad, autocast)
    exact = nn.LayerNorm(shape[-1], device=device, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    expected = run(exact, x.double(), grad.double(), None)
    assert got[0].dtype == result
    assert got[1].dtype == x.dtype
    for one, two in zip(got, expected, strict=True):
        eps = torch.finfo(one.dtype).eps
        if device == 'cpu' and autocast:
            eps = torch.finfo(autocast).eps  # torch's own steps
        scale = two.abs().max().item() if two.numel() else 1
        torch.testing.assert_close(one.double(), two, rtol=4 * eps, atol=8 * eps * scale)


@ON_BOTH
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ('of_maps', 'of_rows'),
    [(LayerNorm2d, StreamLayerNorm), (AutocastLayerNorm2d, AutocastLayerNorm)],
)
def test_of_maps_is_that_of_rows(of_maps, of_rows, layout, device):
    torch.manual_seed(0)
    maps, rows = of_maps(48).to(device), of_rows(48).to(device)
    nn.init.normal_(maps.weight)
    nn.init.normal_(maps.bias)
    rows.load_state_dict(maps.state_dict())
    x = torch.randn(2, 48, 5, 7, device=device).to(torch.bfloat16, memory_format=layout)
    grad = torch.randn(2, 48, 5, 7, device=device)
    out, *gradients = run(maps, x, grad, torch.bfloat16)
    expected, dx, *expected_gradients = run(
        rows, x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1), torch.bfloat16
    )
    kept = of_maps is LayerNorm2d and device == 'cuda'
    assert out.dtype == (torch.float32 if kept else torch.bfloat16)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for one, two in zip(
        (out, *gradients),
        (expected.permute(0, 3, 1, 2), dx.permute(0, 3, 1, 2), *expected_gradients),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-5)


@ON_BOTH
@pytest.mark.parametrize('used', ['both', 'norm', 'input'])
def test_gradient_of_a_residual_connection(used, device):
    torch.manual_seed(0)
    x = torch.randn(6, 5, 40, device=device, requires_grad=True)
    weight = torch.randn(40, device=device, requires_grad=True)
    bias = torch.randn(40, device=device, requires_grad=True)

    def gradients(with_input):
        with torch.autocast(device, torch.bfloat16):
            out = layer_norm(x, weight, bias, 1e-5, with_input=with_input)
        normed, passed = out if with_input else (out, x)
        loss = 0
        if used != 'input':
            loss = loss + normed.float().pow(2).sum()
        if used != 'norm':
            loss = loss + passed.pow(3).sum()
        return torch.autograd.grad(loss, (x, weight, bias), allow_unused=True)

    for one, two in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.gpu
def test_has_kernels():
    assert extension.supports('layer_norm', 'cuda', torch.bfloat16)
