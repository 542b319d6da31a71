"""Stages of VMamba as one op equal their blocks one by one."""

import copy
from unittest import mock

import pytest
import torch

from mmvim import VMamba
from mmvim.models.backbones import vmamba
from mmvim.ops import backend_info, use_backend

ARCHES = {
    'tiny': {'embed_dims': 16, 'depths': (2, 1, 2, 1), 'dt_rank': 2},
    'no mlp': {'embed_dims': 16, 'depths': (2, 1, 1, 1), 'd_state': 2, 'mlp_ratio': 0.0},
}


@pytest.fixture(params=ARCHES)
def model(request):
    if not backend_info()['loaded']:
        pytest.skip('no compiled library')
    torch.manual_seed(0)
    model = VMamba(ARCHES[request.param], out_type='featmap', out_indices=(0, 1, 2, 3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    with use_backend('compiled'):
        yield model


def outputs(model, x, autocast=None):
    with torch.no_grad(), torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        return model(x)


def by_block(model, x, autocast=None):
    with mock.patch.object(vmamba, 'STAGE_DEVICES', ()):
        return outputs(model, x, autocast)


def calls(function, *args):
    with mock.patch.object(vmamba, 'ss2d_blocks', wraps=vmamba.ss2d_blocks) as called:
        return function(*args), called.call_count


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
def test_equals_blocks(model, dtype, autocast):
    model, x = model.to(dtype), torch.randn(2, 3, 40, 36, dtype=dtype)
    found, count = calls(outputs, model, x, autocast)
    assert count == 4
    expected, count = calls(by_block, model, x, autocast)
    assert count == 0
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_whatever_is_changed_is_called(model):
    x = torch.randn(1, 3, 32, 32)
    assert calls(outputs, model, x)[1] == 4
    block = model.layers[0].blocks[1]
    seen = []
    for place in (block, block.norm, block.op, block.op.conv2d):
        hook = place.register_forward_hook(lambda *_: seen.append(1))
        assert calls(outputs, model, x)[1] == 3
        hook.remove()
    assert len(seen) == 4
    block.op.routes = ('rows', 'rows', 'columns', 'columns')
    found, count = calls(outputs, model, x)
    assert count == 3
    for a, b in zip(found, by_block(model, x), strict=True):
        torch.testing.assert_close(a, b)
    assert calls(model, x)[1] == 0  # with gradients
    assert calls(outputs, model.train(), x)[1] == 0


@pytest.mark.gpu
@pytest.mark.parametrize('autocast', [torch.bfloat16, torch.float16, None])
def test_on_cuda(model, autocast):
    """At most 1.2 times the error of the blocks, against float64."""
    x = torch.randn(2, 3, 64, 80)
    exact = by_block(copy.deepcopy(model).double(), x.double())
    model, x = model.cuda(), x.cuda()
    found, count = calls(outputs, model, x, autocast)
    assert count == 4
    for a, b, right in zip(found, by_block(model, x, autocast), exact, strict=True):
        assert a.dtype == b.dtype
        error, allowed = ((t.cpu().double() - right).norm() / right.norm() for t in (a, b))
        assert error <= 1.2 * allowed + 1e-5


@torch.no_grad()
def test_a_stage_without_blocks():
    x = torch.randn(1, 2, 3, 8)
    assert vmamba.ScanStage([], None, False).eval()(x).equal(x)
