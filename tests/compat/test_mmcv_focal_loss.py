import mmcv_reference as reference
import pytest
import torch
from torch.autograd import gradcheck

KINDS = ['sigmoid', 'softmax']


def case(kind, device, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(7, 4, generator=generator, dtype=torch.float64)
    # Background is an index past the classes for the sigmoid, a negative one for the softmax.
    background = 4 if kind == 'sigmoid' else -1
    target = torch.tensor([0, 1, 2, 3, 3, background, 1])
    return logits.to(device, dtype).requires_grad_(), target.to(device)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (0.0, 0.5), (0.5, 0.9), (1.5, 1.0)])
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
def test_focal_loss(mmcv_ops, device, kind, gamma, alpha, reduction):
    logits, target = case(kind, device)
    layer = mmcv_ops.SigmoidFocalLoss if kind == 'sigmoid' else mmcv_ops.SoftmaxFocalLoss
    found = layer(gamma, alpha, reduction=reduction)(logits, target)
    plain, _ = case(kind, 'cpu')
    expected = getattr(reference, f'{kind}_focal_loss')(plain, target.cpu(), gamma, alpha)
    if reduction != 'none':
        expected = expected.sum() / (len(plain) if reduction == 'mean' else 1)
    torch.testing.assert_close(found.detach().cpu(), expected.detach())
    if (kind, reduction) == ('softmax', 'none'):
        return  # mmcv's Python side cannot do this one's backward pass, with any extension.
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logits.grad.cpu(), plain.grad)


@pytest.mark.parametrize('kind', KINDS)
def test_gradcheck(mmcv_ops, device, kind):
    logits, target = case(kind, device)
    loss = getattr(mmcv_ops, f'{kind}_focal_loss')
    assert gradcheck(lambda x: loss(x, target, 2.0, 0.25, None, 'sum'), logits)


@pytest.mark.parametrize('kind', KINDS)
def test_class_weights(mmcv_ops, device, kind):
    logits, target = case(kind, device)
    target = target.clamp(0, 3)
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    found = getattr(mmcv_ops, f'{kind}_focal_loss')(
        logits, target, 2.0, 0.25, weight.to(device), 'sum'
    )
    plain, _ = case(kind, 'cpu')
    expected = getattr(reference, f'{kind}_focal_loss')(
        plain, target.cpu(), 2.0, 0.25, weight
    ).sum()
    torch.testing.assert_close(found.detach().cpu(), expected.detach())
    found.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.cpu(), plain.grad)


def test_class_weights_refuse_background(mmcv_ops):
    logits, target = case('sigmoid', 'cpu')
    with pytest.raises(ValueError, match=r'every target must be in 0\.\.3, found 0\.\.4'):
        mmcv_ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, torch.ones(4).double(), 'sum')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(mmcv_ops, device, kind, dtype):
    low, target = case(kind, device, dtype)
    full = low.detach().double().cpu().requires_grad_()
    found = getattr(mmcv_ops, f'{kind}_focal_loss')(low, target, 2.0, 0.25, None, 'none')
    expected = getattr(reference, f'{kind}_focal_loss')(full, target.cpu(), 2.0, 0.25)
    assert found.dtype == dtype
    # mmcv itself computes the softmax in the low precision, before the op.
    tolerance = torch.finfo(dtype).eps * (1 if kind == 'sigmoid' else 16)
    found = found.detach().cpu().double()
    torch.testing.assert_close(found, expected.detach(), rtol=tolerance, atol=tolerance)


def test_extreme_logits_stay_finite(mmcv_ops):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    target = torch.tensor([0, 0])
    for kind in KINDS:
        loss = getattr(mmcv_ops, f'{kind}_focal_loss')(logits, target, 2.0, 0.25, None, 'sum')
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert gradient[1, 0] < 0
