"""The fused bidirectional mixer equals the mixer step by step, and keeps less."""

import contextlib

import pytest
import torch
from torch import nn

from mmvim.layers import BiMamba, MambaVisionMixer, Mlp
from mmvim.layers.patch_embed import _matrix_product
from mmvim.ops import intercept_ops


def make(dtype=torch.float64, kind=BiMamba, **options):
    torch.manual_seed(0)
    mixer = kind(12, d_state=3, dt_rank=2, **options).to(dtype)
    return moved(mixer)


def moved(mixer):
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mixer


def run(mixer, x, autocast=None):
    """Output and gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    device = x.device.type
    with torch.autocast(device, autocast) if autocast else contextlib.nullcontext():
        y = mixer(x)
    y.to(x.dtype).pow(3).sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in mixer.named_parameters()}


@contextlib.contextmanager
def step_by_step(mixer):
    mixer.fused = False
    try:
        yield
    finally:
        mixer.fused = True


OPTIONS = [
    {},
    {'merge': 'sum', 'bias': True, 'conv_bias': False},
    {'reverse': True, 'layer_scale': 0.3},
    {'discretization': 'foh_hold', 'd_conv': 2},
    {'kind': MambaVisionMixer},
    {'kind': MambaVisionMixer, 'double_dt_bias': False, 'dt_init': 'proper'},
]


@pytest.mark.parametrize('backend', ['auto', 'torch'])
@pytest.mark.parametrize('recompute', [True, False])
@pytest.mark.parametrize('options', OPTIONS)
def test_equals_step_by_step(options, recompute, backend):
    mixer = make(recompute=recompute, ops_backend=backend, **options)
    x = torch.randn(2, 37, 12, dtype=torch.float64)
    y, dx, grads = run(mixer, x)
    with step_by_step(mixer):
        expected_y, expected_dx, expected = run(mixer, x)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=1e-14)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-10, atol=1e-12)
    assert grads.keys() == expected.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('autocast', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('options', OPTIONS)
def test_without_a_gradient_equals_step_by_step(options, autocast):
    dtype = torch.float32 if autocast else torch.float64
    mixer, x = make(dtype, **options), torch.randn(2, 37, 12, dtype=dtype)
    with torch.no_grad(), torch.autocast('cpu', autocast, enabled=autocast is not None):
        y = mixer(x)
        with step_by_step(mixer):
            expected = mixer(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize('kind', [BiMamba, MambaVisionMixer])
def test_tracers_see_the_modules(kind, monkeypatch):
    mixer, x = make(kind=kind).eval(), torch.randn(2, 9, 12, dtype=torch.float64)
    for name in ('_bimamba', '_half_scan'):
        monkeypatch.delattr(f'mmvim.ops.mixers.{name}')
    with torch.no_grad():
        for traced in (
            torch.jit.trace(mixer, (x,), check_trace=False),
            torch.compile(mixer, backend='eager', fullgraph=True),
            torch.export.export(mixer, (x,), strict=False).module(),
        ):
            assert traced(x).shape == x.shape
        with pytest.raises(NameError):
            mixer(x)


@pytest.mark.parametrize('recompute', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', [BiMamba, MambaVisionMixer])
def test_error_in_low_precision(kind, dtype, recompute):
    """At most twice the error of the steps, against float64."""
    x = torch.randn(2, 50, 12)
    _, *exact = run(make(kind=kind), x.double())
    mixer = make(torch.float32, kind, recompute=recompute)
    _, *fused = run(mixer, x, dtype)
    with step_by_step(mixer):
        _, *steps = run(mixer, x, dtype)

    def error(found, name=None):
        dx, grads = found
        wrong, right = (dx, exact[0]) if name is None else (grads[name], exact[1][name])
        return ((wrong.double() - right).norm() / right.norm()).item()

    for name in (None, *exact[1]):
        assert error(fused, name) <= 2 * error(steps, name) + 1e-3, name


@pytest.mark.parametrize('length', [0, 1])
def test_short_sequences(length):
    y, dx, grads = run(make(recompute=True), torch.randn(2, length, 12, dtype=torch.float64))
    assert y.shape == dx.shape == (2, length, 12)
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_frozen_parameters_have_no_gradient():
    mixer = make(recompute=True)
    mixer.x_proj.requires_grad_(False)
    mixer.A_log.requires_grad_(False)
    _, dx, grads = run(mixer, torch.randn(1, 9, 12, dtype=torch.float64))
    assert {name for name, grad in grads.items() if grad is None} == {'x_proj.weight', 'A_log'}
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize('kind', [BiMamba, MambaVisionMixer])
def test_a_frozen_mixer_keeps_nothing(kind, monkeypatch):
    mixer, x = make(kind=kind), torch.randn(1, 40, 12, dtype=torch.float64)
    expected = mixer(x).detach()
    mixer.requires_grad_(False)
    for name in ('_BiMamba', '_HalfScan'):
        monkeypatch.delattr(f'mmvim.ops.mixers.{name}')
    y = mixer(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, expected)


def kept_bytes(mixer, x):
    """Bytes that autograd keeps between forward and backward, parameters not counted."""
    own = {parameter.data_ptr() for parameter in mixer.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mixer(x.requires_grad_())
    return sum(kept.values())


@pytest.mark.parametrize(('kind', 'share'), [(BiMamba, 0.5), (MambaVisionMixer, 0.7)])
def test_recomputation_keeps_less(kind, share):
    x = torch.randn(2, 256, 64)
    lean, full = (kept_bytes(kind(64, recompute=flag), x) for flag in (True, False))
    assert lean < share * full


def test_what_is_put_around_a_part_is_called():
    mixer = make()
    calls = []
    mixer.x_proj_b.register_forward_hook(lambda *_: calls.append('hook'))
    mixer(torch.randn(1, 5, 12, dtype=torch.float64))
    assert calls == ['hook']

    class Adapter(nn.Linear):
        def forward(self, x):
            calls.append('adapter')
            return super().forward(x)

    mixer = make()
    mixer.out_proj = Adapter(24, 12, bias=False).double()
    mixer(torch.randn(1, 5, 12, dtype=torch.float64))
    assert calls == ['hook', 'adapter']


@pytest.mark.parametrize('kind', [BiMamba, MambaVisionMixer])
def test_intercepted_ops_are_called(kind):
    calls = []

    def counted(op, *args):
        calls.append(op)
        return op(*args)

    mixer, x = make(kind=kind), torch.randn(1, 5, 12, dtype=torch.float64)
    scan = 'bidirectional_scan' if kind is BiMamba else 'selective_scan'
    with intercept_ops(**{scan: counted}):
        mixer(x)
    assert len(calls) == 1


def test_compiles_in_one_graph():
    mixer, x = make(recompute=True), torch.randn(2, 9, 12, dtype=torch.float64)
    _, dx, grads = run(mixer, x)
    compiled = torch.compile(mixer, backend='aot_eager', fullgraph=True)
    mixer.zero_grad()
    inputs = x.clone().requires_grad_()
    compiled(inputs).pow(3).sum().backward()
    torch.testing.assert_close(inputs.grad, dx)
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name])


@pytest.mark.parametrize('kind', [BiMamba, MambaVisionMixer, Mlp])
def test_a_compiler_meets_the_fused_function_where_there_is_a_gradient(kind):
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    module = kind(12, 24) if kind is Mlp else kind(12)
    torch.compile(module, backend=backend, fullgraph=True)(torch.randn(1, 5, 12))
    assert any('autograd_function' in target for target in targets)


def test_recompute_of_v1_is_refused():
    with pytest.raises(ValueError, match="recompute=True needs bimamba='v2', not 'v1'"):
        BiMamba(12, bimamba='v1', recompute=True)


def test_mlp():
    torch.manual_seed(0)
    mlp, x = Mlp(6, 20).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    y, dx, grads = run(mlp, x)
    with step_by_step(mlp):
        expected_y, expected_dx, expected = run(mlp, x)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(dx, expected_dx)
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name])
    # Its input and the input of the GELU.
    assert kept_bytes(mlp, x.clone()) == 8 * 2 * 3 * (6 + 20)


@pytest.mark.parametrize('dims', [2, 3])
def test_patches_by_matrix_product(dims):
    size = (2, 4, 3)[-dims:]
    convolution = (nn.Conv2d if dims == 2 else nn.Conv3d)(3, 8, size, size).double()
    x = torch.randn(2, 3, *(5, 11, 13)[-dims:], dtype=torch.float64, requires_grad=True)
    found, expected = _matrix_product(x, convolution), convolution(x).movedim(1, -1)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        *(
            torch.autograd.grad(y.square().sum(), (x, convolution.weight))
            for y in (found, expected)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
