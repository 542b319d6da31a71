"""Residual branches as one op equal their modules one by one."""

import copy
import functools
from unittest import mock

import pytest
import torch
from test_fused import kept_bytes, moved, run, step_by_step
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from mmvim.layers import SS2D, Attention, MambaVisionMixer, residual
from mmvim.layers.norm import AutocastLayerNorm
from mmvim.models.backbones.mambavision import TokenBlock
from mmvim.models.backbones.vmamba import VSSBlock
from mmvim.ops import backend_info, intercept_ops, use_backend
from mmvim.ops.branch import branch

DIM = 16


def attention_block(layer_scale=None, drop_path=0.0):
    return TokenBlock(DIM, Attention(DIM, 2), 2, drop_path, layer_scale)


def mixer_block(layer_scale=None, drop_path=0.0, **options):
    mixer = MambaVisionMixer(DIM, d_state=3, dt_rank=2, **options)
    return TokenBlock(DIM, mixer, 2, drop_path, layer_scale)


def scan_block(layer_scale=None, drop_path=0.0, dim=DIM, **options):
    # The GPU kernels of one state want pairs of ranks.
    block = VSSBlock(dim, SS2D(dim, **{'d_state': 1, 'dt_rank': 2, **options}), 2, drop_path)
    block.mlp.recompute = 'routes' in options
    return block


KINDS = {
    'attention': attention_block,
    'scaled attention': functools.partial(attention_block, layer_scale=0.3),
    'mixer': mixer_block,
    'scaled mixer': functools.partial(mixer_block, layer_scale=0.3, recompute=True),
    'single bias': functools.partial(mixer_block, double_dt_bias=False, discretization='tustin'),
    'scan': scan_block,
    'two routes': functools.partial(
        scan_block,
        d_state=3,
        ssm_ratio=1.5,
        dt_rank=3,
        d_conv=5,
        conv_bias=False,
        bias=True,
        routes=('rows', 'columns_reversed'),
        discretization='bilinear',
    ),
    # More columns than the kernels of the norm behind the scans take.
    'wide scan': functools.partial(scan_block, ssm_ratio=66.0),
    # And columns that none of these kernels takes.
    'odd scan': functools.partial(scan_block, dim=18, ssm_ratio=1.5),
}
SCANS = 'scan', 'two routes', 'wide scan', 'odd scan'
# Ops that a step makes with each branch fused.
BRANCHES = dict.fromkeys(KINDS, 2)


def make(kind, dtype=torch.float64, **options):
    torch.manual_seed(0)
    block = KINDS[kind](**options).to(dtype)
    shape = (3, 5, 4, block.op.d_model) if kind in SCANS else (3, 7, DIM)
    return moved(block), torch.randn(shape, dtype=dtype)


def branches(function):
    """The result, and how often the op was called."""
    with mock.patch('mmvim.layers.residual.branch', wraps=branch) as called:
        result = function()
    return result, called.call_count


@pytest.fixture(params=KINDS)
def kind(request):
    """Of a block; the op is compiled code or nothing, whatever MMVIM_BACKEND says."""
    if not backend_info()['loaded']:
        pytest.skip('no compiled library')
    with use_backend('compiled'):
        yield request.param


def compare(found, expected, **tolerance):
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in found[2].items():
        torch.testing.assert_close(gradient, expected[2][name], msg=name, **tolerance)


@pytest.mark.parametrize('drop_path', [0.0, 0.5])
@pytest.mark.parametrize('backend', [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_equals_step_by_step(kind, drop_path, backend):
    block, x = make(kind, drop_path=drop_path)

    def outcome():
        torch.manual_seed(1)
        return run(block, x)

    with sdpa_kernel(backend):
        found, calls = branches(outcome)
        assert calls == BRANCHES[kind]
        with step_by_step(block):
            expected, calls = branches(outcome)
            assert calls == 0
    compare(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('given', [torch.float32, torch.bfloat16])
def test_error_in_low_precision(kind, dtype, given):
    """Under autocast at most twice the error of the steps, against float64."""
    block, x = make(kind, torch.float32)
    exact = run(copy.deepcopy(block).double(), x.double())

    def outcome():
        inputs = x.to(given).requires_grad_()
        block.zero_grad()
        with torch.autocast('cpu', dtype):
            y = block(inputs)
        y.to(torch.float32).pow(3).sum().backward()
        return y, inputs.grad, {name: p.grad for name, p in block.named_parameters()}

    found, calls = branches(outcome)
    assert calls == BRANCHES[kind]
    with step_by_step(block):
        steps = outcome()
    assert found[0].dtype == steps[0].dtype

    def error(result, of):
        return ((of(result).double() - of(exact)).norm() / of(exact).norm()).item()

    parts = [lambda r: r[0], lambda r: r[1]]
    parts += [lambda r, name=name: r[2][name] for name in exact[2]]
    for of in parts:
        assert of(found).dtype == of(steps).dtype
        assert error(found, of) <= 2 * error(steps, of) + 2e-3


@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
def test_without_a_gradient(kind, autocast):
    block, x = make(kind, torch.float32, drop_path=0.5)
    block.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autocast('cpu', autocast, enabled=autocast is not None):
            found, calls = branches(lambda: block(x))
            assert calls == BRANCHES[kind]
            with step_by_step(block):
                expected = block(x)
        assert found.dtype == expected.dtype
        # The sum is rounded once more in steps.
        tolerance = 1e-5 if autocast is None else 0.03
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_only_what_is_needed(kind):
    """Whatever is frozen, the other gradients are what they were."""
    block, x = make(kind)
    _, dx, expected = run(block, x)
    for trained in ('x', *expected):
        block.zero_grad()
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name == trained)
        inputs = x.clone().requires_grad_(trained == 'x')
        block(inputs).pow(3).sum().backward()
        grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        assert grads.keys() == ({trained} - {'x'})
        wanted, found = (dx, inputs.grad) if trained == 'x' else (expected[trained], grads[trained])
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing(kind, use_reentrant):
    block, x = make(kind, drop_path=0.5)

    def outcome(function):
        torch.manual_seed(1)
        block.zero_grad()
        inputs = x.clone().requires_grad_()
        function(inputs).pow(3).sum().backward()
        return inputs.grad, [p.grad for p in block.parameters()]

    checkpointed = functools.partial(checkpoint, block, use_reentrant=use_reentrant)
    torch.testing.assert_close(outcome(checkpointed), outcome(block), rtol=0, atol=0)


def test_keeps_no_more(kind):
    """But for biases in the dtype of autocast."""
    block, x = make(kind, torch.float32)
    x = x.repeat_interleave(20, 1)
    with torch.autocast('cpu', torch.bfloat16):
        fused = kept_bytes(block, x.clone())
        block.fused = False
        assert fused <= 1.001 * kept_bytes(block, x.clone())


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_compilers_modes_and_interceptors_meet_the_modules(kind):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    block, x = make(kind)

    def in_mode():
        with Mode():
            return block(x)

    def intercepted():
        with intercept_ops(selective_scan=lambda op, *args: op(*args)):
            return block(x)

    expected = block(x)
    compiled = torch.compile(block, backend='aot_eager', fullgraph=True)
    for function in (
        in_mode,
        intercepted,
        functools.partial(compiled, x),
        lambda: torch.jit.trace(block, x, check_trace=False)(x),
        lambda: torch.export.export(block.eval(), (x,), strict=False).module()(x),
    ):
        found, calls = branches(function)
        assert calls == 0
        torch.testing.assert_close(found, expected)


def test_second_derivatives_are_refused(kind):
    block, x = make(kind)
    (dx,) = torch.autograd.grad(block(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'a second time|derivative for'):
        dx.sum().backward()


def test_tangents_are_refused(kind):
    """They would be lost, also where no parameter wants a gradient."""
    block, x = make(kind)
    for wanted in (True, False):
        block.requires_grad_(wanted)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r'jvp|forward'):
            block(forward_ad.make_dual(x, torch.ones_like(x)))


def test_whatever_is_changed_is_called(kind):
    """Each branch falls back by itself."""
    block, x = make(kind)
    norm, body = ('norm', 'op') if kind in SCANS else ('norm1', 'mixer')

    def other_norm(block):
        setattr(block, norm, nn.GroupNorm(1, DIM).double())

    def no_bias(block):
        getattr(block, norm).bias = None

    for change in (
        lambda block: getattr(block, body).register_forward_hook(lambda *_: None),
        lambda block: getattr(block, norm).register_forward_pre_hook(lambda *_: None),
        lambda block: setattr(block, body, nn.Sequential(getattr(block, body))),
        no_bias,
    ):
        changed = copy.deepcopy(block)
        change(changed)
        found, calls = branches(lambda changed=changed: changed(x))
        assert calls == BRANCHES[kind] - 1
        with step_by_step(changed):
            torch.testing.assert_close(found, changed(x))
    block.drop_path.register_forward_hook(lambda *_: None)
    assert branches(lambda: block(x))[1] == 0


@pytest.mark.parametrize(
    ('position', 'wrong', 'message'),
    [
        (0, torch.zeros(DIM), r'x must be \(batch, ..., channels\)'),
        (0, torch.zeros(1, 2, DIM - 1), 'a parameter must have shape'),
        (0, torch.zeros(1, 2, DIM, dtype=torch.int), 'x must be float32'),
        (1, torch.ones(2, 1, 1), 'keep must have shape'),
        (2, [torch.zeros(DIM)] * 3, 'there must be 7 parameters'),
        (2, [None] * 7, 'parameter 0 is missing'),
        (3, 'lstm', "kind must be 'attention', 'mlp', 'mixer' or 'ss2d', got 'lstm'"),
        (5, 3, 'heads must divide the 16 channels, got 3'),
    ],
)
def test_wrong_arguments(position, wrong, message):
    if not backend_info()['loaded']:
        pytest.skip('no compiled library')
    block, _ = make('attention', torch.float32)
    norm, body = block.norm1, block.mixer
    parameters = [norm.weight, norm.bias, None, *body.qkv.parameters(), *body.proj.parameters()]
    arguments = [torch.zeros(1, 2, DIM), None, parameters, 'attention', torch.float32, 2, 1e-5]
    arguments += [1.0, 'zoh', False, False, [], 0, 1e-5, 16]
    torch.ops.mmvim.branch(*arguments)
    arguments[position] = wrong
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match=message):
        torch.ops.mmvim.branch(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize('autocast', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('given', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    'backend',
    [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ],
)
def test_on_cuda(kind, backend, given, autocast, monkeypatch):
    """At most twice the error of the steps, against float64."""
    monkeypatch.setattr(residual, 'DEVICES', ('cuda',))
    if autocast is None and given != torch.float32:
        pytest.skip('parameters are float32')
    block, x = make(kind, torch.float32)
    exact = run(copy.deepcopy(block).double(), x.double())
    block, x = block.cuda(), x.cuda().to(given)

    def outcome():
        inputs = x.clone().requires_grad_()
        block.zero_grad()
        with torch.autocast('cuda', autocast, enabled=autocast is not None):
            y = block(inputs)
        y.to(torch.float32).pow(3).sum().backward()
        return [y, inputs.grad, *(p.grad for p in block.parameters())]

    # Flash and cuDNN have no kernels for float32.
    with sdpa_kernel([backend, SDPBackend.MATH]):
        found, calls = branches(outcome)
        assert calls == BRANCHES[kind]
        with step_by_step(block):
            steps = outcome()
    for a, b, right in zip(found, steps, [*exact[:2], *exact[2].values()], strict=True):
        assert a.dtype == b.dtype
        error, allowed = ((t.cpu().double() - right).norm() / right.norm() for t in (a, b))
        assert error <= 2 * allowed + (1e-4 if autocast is None else 5e-3)


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_dtypes(kind, dtype, device):
    """At most twice the error of the steps, against float64."""
    if device == 'cuda' and dtype == torch.float64:
        pytest.skip('GPUs have no kernels of float64')
    block, x = make(kind, torch.float32)
    exact = run(copy.deepcopy(block).double(), x.double())
    block, x = block.to(device, dtype), x.to(device, dtype)
    found = run(block, x)
    with step_by_step(block):
        steps = run(block, x)
    assert found[2].keys() == steps[2].keys()
    outcomes = zip(*([*r[:2], *r[2].values()] for r in (found, steps, exact)), strict=True)
    for a, b, right in outcomes:
        assert a.dtype == b.dtype == dtype
        error, allowed = ((t.cpu().double() - right).norm() / right.norm() for t in (a, b))
        assert error <= 2 * allowed + 8 * torch.finfo(dtype).eps


def test_a_norm_without_bias_behind_the_scans():
    block, x = make('scan')
    block.op.out_norm = AutocastLayerNorm(DIM * 2, bias=False).double()
    found = block(x)
    with step_by_step(block):
        torch.testing.assert_close(found, block(x))
