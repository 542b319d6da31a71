"""opcheck, torch.compile and torch.export, with fixed and symbolic sizes."""

import pytest
import torch
import torch._dynamo.testing
from ops_support import cross_scan_inputs, gradients, randn, scan_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from mmvim import ops

NAMESPACES = ('mmvim', 'mmvim_torch')


def sequences(length):
    return torch.tensor([[0] * 4 + [1] * (length - 4), [2] * length], dtype=torch.int32)


def scan_cases():
    for method, reverse, with_state, interval in (
        ('zoh', False, True, 4),
        ('zoh', True, False, 0),
        ('foh_hold', True, True, 4),
        ('tustin', False, False, 16),
    ):
        tensors = scan_inputs(2, 9, 4, 3, 2, dtype=torch.float32)
        values = [x.requires_grad_() for x in tensors.values()]
        n = 6 if method in ('foh_hold', 'tustin') else 3
        state = randn(2, 4, n, dtype=torch.float32).requires_grad_() if with_state else None
        yield *values, state, True, method, reverse, with_state, interval
        yield *values, state, True, method, reverse, with_state, interval, sequences(9)
    bare = list(scan_inputs(2, 9, 4, 3, 1, dtype=torch.float32, optional=False).values())
    yield *bare, None, None, None, None, True, 'zoh', False, False, 0


def bidirectional_cases():
    for gated, interval in ((True, 4), (True, 0), (False, 4)):
        tensors = scan_inputs(2, 9, 4, 3, 2, dtype=torch.float32)
        z = tensors.pop('z').requires_grad_()
        one = [x.requires_grad_() for x in tensors.values()]
        two = [x.detach().clone().requires_grad_() for x in one]
        yield *one, *two, z if gated else None, 0.5, True, 'zoh', interval
    yield *one, *two, z, 0.5, True, 'zoh', 4, sequences(9)


def cross_cases():
    order = ('x', 'delta', 'delta_weight', 'A', 'B', 'C', 'D', 'delta_bias')
    for routes, rank, optional, interval in (
        ((0, 1, 2, 3), 2, True, 4),
        ((0, 1, 2, 3), None, True, 0),
        ((3,), 1, False, 4),
        ((2, 1), None, False, 16),
    ):
        tensors = cross_scan_inputs(
            2, 3, 5, 4, 3, len(routes), rank, dtype=torch.float32, optional=optional
        )
        tensors = {k: v.requires_grad_() for k, v in tensors.items()}
        yield *map(tensors.get, order), list(routes), True, 'zoh', interval


def conv_cases():
    x = randn(2, 7, 3, dtype=torch.float32).requires_grad_()
    weight, bias = (randn(*s, seed=1, dtype=torch.float32).requires_grad_() for s in ((3, 4), (3,)))
    state = randn(2, 3, 3, seed=2, dtype=torch.float32).requires_grad_()
    yield x, weight, bias, state, 'causal', True, True
    yield x, weight, None, None, 'reverse', False, False
    yield x, weight, bias, None, 'same', True, False
    half = x.detach().bfloat16().requires_grad_()
    yield half, weight, bias, state, 'reverse', True, True
    yield x, weight, bias, state, 'causal', True, True, sequences(7)


def both_conv_cases():
    for x, weight, bias, *_ in list(conv_cases())[:2]:
        yield x, weight, bias, weight.detach().clone().requires_grad_(), None, True


def norm_cases():
    x, residual = (randn(2, 5, 4, seed=i, dtype=torch.float32).requires_grad_() for i in (0, 1))
    weight = randn(4, seed=2, dtype=torch.float32).requires_grad_()
    yield x, None, weight, 1e-5, True
    yield x, residual, weight, 1e-5, True
    yield x.detach().bfloat16().requires_grad_(), residual, weight, 1e-5, False


CASES = [
    pytest.param(op, case, id=f'{op}-{i}')
    for op, cases in (
        ('selective_scan', scan_cases),
        ('bidirectional_scan', bidirectional_cases),
        ('cross_scan', cross_cases),
        ('causal_conv1d', conv_cases),
        ('bidirectional_conv1d', both_conv_cases),
        ('add_rms_norm', norm_cases),
    )
    for i, case in enumerate(cases())
]


@pytest.mark.parametrize('namespace', NAMESPACES)
@pytest.mark.parametrize(('op', 'case'), CASES)
def test_opcheck(namespace, op, case):
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), op).default, case)


@pytest.mark.gpu
@pytest.mark.parametrize('namespace', NAMESPACES)
@pytest.mark.parametrize(('op', 'case'), CASES)
def test_opcheck_on_cuda(namespace, op, case):
    case = tuple(
        x.detach().cuda().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in case
    )
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), op).default, case)


class BackwardCalls(TorchDispatchMode):
    """Keeps the calls of backward ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in NAMESPACES and function._opname.endswith('_backward'):
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize('namespace', NAMESPACES)
@pytest.mark.parametrize(('op', 'case'), CASES)
def test_results_are_fresh_and_as_the_fake_kernel_says(namespace, op, case):
    """Also of the backward ops, which opcheck does not see by themselves."""
    function = getattr(getattr(torch.ops, namespace), op).default
    case = tuple(
        x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x
        for x in case
    )
    outputs = [x for x in as_tuple(function(*case)) if x.requires_grad and x.numel()]
    with BackwardCalls() as mode:
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    assert len(mode.calls) == 1
    for call, values in ((function, case), *mode.calls):
        arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in values)
        results = as_tuple(call(*arguments))
        meta = call(*(x.to('meta') if isinstance(x, torch.Tensor) else x for x in arguments))
        given = {x.data_ptr() for x in arguments if isinstance(x, torch.Tensor) and x.numel()}
        for real, fake in zip(results, as_tuple(meta), strict=True):
            assert real.shape == fake.shape
            assert real.dtype == fake.dtype
            assert real.stride() == fake.stride()
            assert real.is_contiguous()
        fresh = [x.data_ptr() for x in results if x.numel()]
        assert len(set(fresh)) == len(fresh)
        assert not given & set(fresh)


def block(u, delta, A, B, C, D, z, delta_bias, weight):
    """Every op once."""
    u = ops.causal_conv1d(u, weight, activation='silu')
    f, b = ops.bidirectional_conv1d(u, weight, None, weight, D)
    one = ops.selective_scan(f, delta, A, B, C, D, z, delta_bias, delta_softplus=True)
    inputs = ops.ScanInputs(b, delta, A, B, C, D, delta_bias)
    two = ops.bidirectional_scan(inputs, inputs, z, delta_softplus=True, discretization='tustin')
    routes = ('columns', 'rows_reversed')
    x, *parts = (t.unflatten(1, (1, -1)) for t in (two, delta, B.mean(2), C.mean(2)))
    delta, B, C = (torch.stack((t, t), 3) for t in parts)
    three = ops.cross_scan(x, delta, torch.stack((A, A)), B, C, routes=routes, delta_softplus=True)
    out, total = ops.add_rms_norm(one, D, three[:, 0])
    return out + total


def block_inputs(b=2, length=9):
    tensors = scan_inputs(b, length, 4, 3, 2, dtype=torch.float32)
    return [*tensors.values(), randn(4, 4, seed=9, dtype=torch.float32)]


def check_compiled(compiled, sizes):
    for size in sizes:
        results = []
        for function in (block, compiled):
            inputs = [x.requires_grad_() for x in block_inputs(*size)]
            out = function(*inputs)
            results.append((out, *gradients([out], inputs)))
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dynamic', [False, True])
def test_compile_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend='aot_eager')
    check_compiled(compiled, [(5, 9), (6, 40)] if dynamic else [(2, 9)])


def test_dynamic_compile_does_not_recompile_for_a_new_length():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        counts = []
        # At first no two sizes are equal, or they would count as one.
        for size in ((5, 9), (6, 14), (7, 40), (10, 11)):
            compiled(*block_inputs(*size))
            counts.append(counter.frame_count)
    assert len(set(counts)) == 1


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    check_compiled(torch.compile(block, fullgraph=True), [(2, 9)])
    torch._dynamo.reset()
    check_compiled(torch.compile(block, fullgraph=True, dynamic=True), [(2, 9), (3, 33)])


@pytest.mark.parametrize('strict', [False, True])
def test_export(strict):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return block(*inputs)

    b, length = torch.export.Dim('b', min=2, max=64), torch.export.Dim('l', min=2, max=4096)
    both = {0: b, 1: length}
    shapes = tuple(both if x.dim() > 2 else None for x in block_inputs())
    program = torch.export.export(
        Module(), tuple(block_inputs()), strict=strict, dynamic_shapes=(shapes,)
    )
    for size in ((2, 9), (3, 21)):
        inputs = block_inputs(*size)
        torch.testing.assert_close(program.module()(*inputs), block(*inputs))
    # An exported graph is for inference: it keeps no states for a backward pass.
    intervals = [n.args[-1] for n in program.graph.nodes if 'scan.default' in str(n.target)]
    assert intervals == [0, 0, 0]


def test_exported_program_survives_saving(tmp_path):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return block(*inputs)

    program = torch.export.export(Module(), tuple(block_inputs()))
    torch.export.save(program, tmp_path / 'block.pt2')
    loaded = torch.export.load(tmp_path / 'block.pt2')
    inputs = block_inputs()
    torch.testing.assert_close(loaded.module()(*inputs), block(*inputs))


def test_meta_and_fake_tensors():
    inputs = [x.to('meta') for x in block_inputs()]
    out = block(*inputs)
    assert out.is_meta
    assert out.shape == (2, 9, 4)
    with torch._subclasses.FakeTensorMode() as mode:
        out = block(*[torch.empty(x.shape) for x in block_inputs()])
    assert out.shape == (2, 9, 4)
    fake = [mode.from_tensor(x) for x in block_inputs()]
    assert block(*fake).shape == (2, 9, 4)
