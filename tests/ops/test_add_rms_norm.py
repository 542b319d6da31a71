"""Addition and RMSNorm against their formula."""

import itertools

import pytest
import torch
from ops_support import HALF, assert_error_bounded, gradients, need, randn

from mmvim.ops import add_rms_norm, reference
from mmvim.ops._library import compute_dtype


def inputs_of(*shape, dtype=torch.float64, device='cpu', residual=None, weight=None):
    tensors = {
        'x': randn(*shape, seed=1, dtype=dtype, device=device),
        'weight': randn(shape[-1], seed=2, dtype=weight or dtype, device=device),
    }
    if residual is not None:
        tensors['residual'] = randn(*shape, seed=3, dtype=residual, device=device)
    return tensors


def compare(tensors, **options):
    def run(function, convert, cast=None):
        values = {k: convert(v).requires_grad_() for k, v in tensors.items()}
        outputs = function(**values)
        return (*outputs, *gradients(outputs, list(values.values()), cast=cast))

    got = run(lambda **v: add_rms_norm(**v, **options), lambda v: v.detach().clone())
    exact = run(reference.add_rms_norm, lambda v: v.detach().cpu().double(), got)

    def in_steps(x, weight, residual=None):
        total = x if residual is None else x + residual
        return reference.add_rms_norm(total.to(got[1].dtype).to(x.dtype), weight)

    plain = run(in_steps, lambda v: v.detach().cpu().to(compute_dtype(v.dtype)), got)
    plain = [x.to(c.dtype) for x, c in zip(plain, got, strict=True)]
    assert_error_bounded(('out', 'residual_out', *tensors), got, plain, exact, slack=8.0)
    return got


@pytest.mark.parametrize(
    'shape', [(1,), (5, 1), (2, 3, 7), (2, 197, 192), (0, 3, 4), (2, 0, 4), (3, 1025)]
)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('with_residual', [False, True])
def test_shapes(backend, device, dtype, shape, with_residual):
    need(backend, 'add_rms_norm', device, dtype)
    residual = dtype if with_residual else None
    compare(inputs_of(*shape, dtype=dtype, device=device, residual=residual))


@pytest.mark.parametrize(
    ('dtype', 'residual', 'weight', 'in_fp32'),
    [
        case
        for dtype in HALF
        for case in itertools.product(
            [dtype], [None, dtype, torch.float32], [dtype, torch.float32], [False, True]
        )
    ],
)
def test_half_precision(backend, device, dtype, residual, weight, in_fp32):
    need(backend, 'add_rms_norm', device, dtype)
    tensors = inputs_of(3, 9, 33, dtype=dtype, device=device, residual=residual, weight=weight)
    got = compare(tensors, residual_in_fp32=in_fp32)
    expected = torch.float32 if in_fp32 else residual or dtype
    assert got[0].dtype == dtype
    assert got[1].dtype == expected


def test_eps_counts(backend, device):
    need(backend, 'add_rms_norm', device, torch.float32)
    x = torch.full((2, 4), 1e-3, device=device)
    out, _ = add_rms_norm(x, torch.ones(4, device=device), eps=1e-6)
    torch.testing.assert_close(out, torch.full_like(x, 0.5**0.5))


def test_matches_torchs_rms_norm(backend, device):
    need(backend, 'add_rms_norm', device, torch.float32)
    tensors = inputs_of(4, 9, 24, dtype=torch.float32, device=device)
    out, total = add_rms_norm(**tensors, eps=1e-5)
    expected = torch.nn.functional.rms_norm(tensors['x'], (24,), tensors['weight'], 1e-5)
    torch.testing.assert_close(out, expected)
    assert torch.equal(total, tensors['x'])
    assert total.data_ptr() != tensors['x'].data_ptr()


@pytest.mark.parametrize('used', ['out', 'residual_out'])
def test_only_one_output_is_used(backend, device, used):
    need(backend, 'add_rms_norm', device, torch.float64)
    given = inputs_of(2, 5, device=device, residual=torch.float64)
    results = []
    for function, place in ((add_rms_norm, device), (reference.add_rms_norm, 'cpu')):
        tensors = {k: v.detach().to(place).requires_grad_() for k, v in given.items()}
        outputs = function(**tensors)
        results.append(gradients([outputs[used != 'out']], list(tensors.values())))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one.cpu(), two)


def test_gradients_only_where_needed(backend, device):
    need(backend, 'add_rms_norm', device, torch.float32)
    given = inputs_of(2, 5, dtype=torch.float32, device=device, residual=torch.float32)
    given['residual'].requires_grad_()
    add_rms_norm(**given)[0].sum().backward()
    assert [k for k, v in given.items() if v.grad is not None] == ['residual']


def test_gradients_of_both_summands_are_separate(backend, device):
    """Changing one gradient in place must not change the other."""
    need(backend, 'add_rms_norm', device, torch.float32)
    given = inputs_of(2, 5, dtype=torch.float32, device=device, residual=torch.float32)
    x, residual = given['x'].requires_grad_(), given['residual'].requires_grad_()
    add_rms_norm(**given)[0].square().sum().backward()
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)


def test_strides(backend, device):
    need(backend, 'add_rms_norm', device, torch.float32)
    given = inputs_of(3, 4, 8, dtype=torch.float32, device=device, residual=torch.float32)
    expected = add_rms_norm(**given)
    given['x'] = given['x'].transpose(0, 1).contiguous().transpose(0, 1)
    given['residual'] = torch.stack((given['residual'],) * 2, -1)[..., 0]
    got = add_rms_norm(**given)
    for one, two in zip(got, expected, strict=True):
        assert one.is_contiguous()
        assert torch.equal(one, two)


def test_gradcheck():
    for with_residual in (False, True):
        given = inputs_of(2, 3, 4, residual=torch.float64 if with_residual else None)

        def function(*values, given=given):
            return add_rms_norm(**dict(zip(given, values, strict=True)), backend='torch')

        assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in given.values()])
