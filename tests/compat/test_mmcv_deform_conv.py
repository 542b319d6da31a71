import mmcv_reference as reference
import pytest
import torch

ARGUMENTS = ('stride', 'padding', 'dilation', 'groups', 'deform_groups')
GEOMETRIES = {
    'plain': ((1, 1), (1, 1), (1, 1), 1, 1),
    'uneven': ((2, 1), (0, 2), (1, 2), 1, 1),
    'groups': ((1, 2), (1, 1), (1, 1), 2, 1),
    'deform_groups': ((1, 1), (1, 0), (2, 1), 2, 4),
}


@pytest.fixture(params=GEOMETRIES, ids=str)
def case(request):
    """Operands in float64: input, offset, mask, weight and bias, and their geometry."""
    geometry = dict(zip(ARGUMENTS, GEOMETRIES[request.param], strict=True))
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kernel = (3, 2)
    x = randn(2, 4, 7, 8)
    out = [
        (x.size(d + 2) + 2 * geometry['padding'][d] - geometry['dilation'][d] * (kernel[d] - 1) - 1)
        // geometry['stride'][d]
        + 1
        for d in (0, 1)
    ]
    taps = geometry['deform_groups'] * kernel[0] * kernel[1]
    operands = {
        'input': x,
        'offset': randn(2, 2 * taps, *out) * 1.5,
        'mask': randn(2, taps, *out).sigmoid(),
        'weight': randn(6, 4 // geometry['groups'], *kernel),
        'bias': randn(6),
    }
    return operands, geometry


def leaves(operands, names, device='cpu', dtype=torch.float64):
    return [operands[name].to(device, dtype).requires_grad_() for name in names]


def outputs_and_gradients(function, inputs):
    out = function(*inputs)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    gradients = torch.autograd.grad(out, inputs, grad.to(out))
    return [t.detach().cpu() for t in (out, *gradients)]


def run_v1(mmcv_ops, geometry):
    return lambda *tensors: mmcv_ops.deform_conv2d(*tensors, *geometry.values())


def run_v2(mmcv_ops, geometry):
    def run(x, offset, mask, weight, bias=None):
        return mmcv_ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *geometry.values())

    return run


def test_deform_conv(mmcv_ops, case, device):
    operands, geometry = case
    names = ('input', 'offset', 'weight')
    found = outputs_and_gradients(run_v1(mmcv_ops, geometry), leaves(operands, names, device))
    expected = outputs_and_gradients(
        lambda x, offset, weight: reference.deform_conv(x, offset, weight, **geometry),
        leaves(operands, names),
    )
    for name, a, b in zip(('out', *names), found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f'{name}: {m}')


@pytest.mark.parametrize('with_bias', [True, False])
def test_modulated_deform_conv(mmcv_ops, case, device, with_bias):
    operands, geometry = case
    names = ('input', 'offset', 'mask', 'weight', 'bias')[: 5 if with_bias else 4]
    found = outputs_and_gradients(run_v2(mmcv_ops, geometry), leaves(operands, names, device))
    expected = outputs_and_gradients(
        lambda x, offset, mask, weight, bias=None: reference.deform_conv(
            x, offset, weight, mask=mask, bias=bias, **geometry
        ),
        leaves(operands, names),
    )
    for name, a, b in zip(('out', *names), found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f'{name}: {m}')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(mmcv_ops, case, device, dtype):
    operands, geometry = case
    names = ('input', 'offset', 'mask', 'weight', 'bias')
    low = leaves(operands, names, device, dtype)
    full = [t.detach().float().requires_grad_() for t in low]
    found = outputs_and_gradients(run_v2(mmcv_ops, geometry), low)
    out = run_v2(mmcv_ops, geometry)(*full)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
    expected = [out, *torch.autograd.grad(out, full, grad.float().to(out.device))]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.detach().cpu().to(dtype), rtol=0.02, atol=1e-4)


def test_weight_gradient_alone_and_repeated(mmcv_ops, case):
    """Without input gradients, and over two backward passes with different gradients."""
    operands, geometry = case
    names = ('input', 'offset', 'weight')
    run = run_v1(mmcv_ops, geometry)
    x, offset, weight = leaves(operands, names)
    out = run(x, offset, weight)
    first, second = torch.ones_like(out), torch.linspace(0, 1, out.numel()).double().view(out.shape)
    both = [
        torch.autograd.grad(out, [x, offset, weight], grad, retain_graph=True)[2]
        for grad in (first, second)
    ]
    alone = run(x.detach(), offset.detach(), weight)
    for grad, expected in zip((first, second), both, strict=True):
        (found,) = torch.autograd.grad(alone, weight, grad, retain_graph=True)
        torch.testing.assert_close(found, expected)
    assert not torch.allclose(both[0], both[1])


def test_layers(mmcv_ops):
    """Zero offsets and full masks make an ordinary convolution of each."""
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    layer = mmcv_ops.DeformConv2d(3, 5, 3, padding=1, im2col_step=2)
    expected = torch.nn.functional.conv2d(x, layer.weight, padding=1)
    torch.testing.assert_close(layer(x, x.new_zeros(4, 18, 6, 6)), expected)
    layer = mmcv_ops.ModulatedDeformConv2d(3, 5, 3, padding=1)
    torch.nn.init.normal_(layer.bias)
    expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    found = layer(x, x.new_zeros(4, 18, 6, 6), x.new_ones(4, 9, 6, 6))
    torch.testing.assert_close(found, expected)
    pack = mmcv_ops.ModulatedDeformConv2dPack(3, 5, 3, padding=1)
    expected = torch.nn.functional.conv2d(x, pack.weight / 2, pack.bias, padding=1)
    torch.testing.assert_close(pack(x), expected)
