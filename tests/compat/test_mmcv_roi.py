import mmcv_reference as reference
import pytest
import torch
from torch.autograd import gradcheck


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    # A permutation: no two pixels are equal, so that maxima are unique.
    values = torch.randperm(2 * 3 * 9 * 11, generator=generator).double()
    return (values / 100).view(2, 3, 9, 11)


@pytest.fixture
def rois():
    """Inside, across the border, tiny, whole image, far outside."""
    return torch.tensor(
        [
            [0, 1.3, 2.1, 12.7, 9.4],
            [1, -6.0, -3.0, 8.0, 25.0],
            [1, 5.0, 5.0, 5.5, 5.2],
            [0, 0.0, 0.0, 22.0, 18.0],
            [1, 50.0, 40.0, 60.0, 44.0],
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 1, 2])
@pytest.mark.parametrize('size', [(3, 3), (2, 4)])
def test_roi_align(mmcv_ops, features, rois, device, aligned, sampling_ratio, size):
    layer = mmcv_ops.RoIAlign(size, 0.5, sampling_ratio, 'avg', aligned)
    expected = reference.roi_align(features, rois, size, 0.5, sampling_ratio, aligned)
    out = layer(features.to(device), rois.to(device))
    torch.testing.assert_close(out.cpu(), expected)
    single = layer(features.float().to(device), rois.float().to(device))
    torch.testing.assert_close(single.cpu(), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align_gradient(mmcv_ops, features, rois, device, aligned, sampling_ratio):
    layer = mmcv_ops.RoIAlign((2, 3), 0.5, sampling_ratio, 'avg', aligned)
    features = features[:, :1].to(device).requires_grad_()
    assert gradcheck(lambda x: layer(x, rois.to(device)), features, nondet_tol=1e-10)


def test_roi_align_gradient_is_that_of_the_definition(mmcv_ops, features, rois, device):
    left = features.clone().requires_grad_()
    right = features.to(device).requires_grad_()
    expected = reference.roi_align(left, rois, (3, 3), 0.5, 2, True)
    out = mmcv_ops.roi_align(right, rois.to(device), (3, 3), 0.5, 2, 'avg', True)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    expected.backward(grad)
    # A gradient that is not contiguous, as heads that permute their input produce.
    out.backward(grad.to(device).permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1))
    torch.testing.assert_close(right.grad.cpu(), left.grad)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('layer', ['RoIAlign', 'RoIPool'])
def test_half_precision_rounds_once(mmcv_ops, features, rois, device, dtype, layer):
    """The result is that of float32, rounded; so is the gradient."""
    make = getattr(mmcv_ops, layer)((3, 3), 0.5)
    low = features.to(device, dtype).requires_grad_()
    full = low.detach().float().requires_grad_()
    low_rois = rois.to(device, dtype)
    out, expected = make(low, low_rois), make(full, low_rois.float())
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    out.backward(torch.ones_like(out))
    expected.backward(torch.ones_like(expected))
    assert low.grad.dtype == dtype
    torch.testing.assert_close(low.grad, full.grad.to(dtype))


@pytest.mark.parametrize('layer', ['RoIAlign', 'RoIPool'])
def test_no_rois(mmcv_ops, features, layer):
    features.requires_grad_()
    out = getattr(mmcv_ops, layer)((3, 2))(features, torch.zeros(0, 5).double())
    assert out.shape == (0, 3, 3, 2)
    out.sum().backward()
    assert not features.grad.any()


def test_maximum_pooling_names_what_it_needs(mmcv_ops, features, rois):
    with pytest.raises(NotImplementedError, match="pool_mode 'max' needs an mmcv with compiled"):
        mmcv_ops.roi_align(features, rois, 3, 0.5, 2, 'max', True)


@pytest.mark.parametrize('scale', [0.5, 0.7])
@pytest.mark.parametrize('size', [(3, 3), (2, 5)])
def test_roi_pool(mmcv_ops, features, rois, device, scale, size):
    rois = torch.cat([rois, rois.new_tensor([[0, 9.0, 9.0, 3.0, 3.0], [1, 2.0, 2.0, 7.0, 7.0]])])
    expected = reference.roi_pool(features, rois, size, scale)
    assert expected.any()
    out = mmcv_ops.RoIPool(size, scale)(features.to(device), rois.to(device))
    assert torch.equal(out.cpu(), expected)


def test_roi_pool_gradient(mmcv_ops, features, rois, device):
    left = features.clone().requires_grad_()
    right = features.to(device).requires_grad_()
    expected = reference.roi_pool(left, rois, (3, 3), 0.5)
    out = mmcv_ops.roi_pool(right, rois.to(device), (3, 3), 0.5)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    expected.backward(grad)
    out.backward(grad.to(device))
    torch.testing.assert_close(right.grad.cpu(), left.grad)
