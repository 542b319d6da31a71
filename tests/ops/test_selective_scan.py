"""The selective scan against a loop over time, with all gradients."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_support import (
    HALF,
    assert_error_bounded,
    gradients,
    need,
    randn,
    scan_inputs,
    wide,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmvim.ops import (
    DISCRETIZATIONS,
    TWO_TAP,
    reference,
    selective_scan,
    selective_scan_torch,
    use_backend,
)

OPTIONS = ('delta_softplus', 'discretization', 'reverse')


def run(tensors, state=None, **options):
    """Output, last state and all gradients."""
    tensors = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    inputs = list(tensors.values())
    if state is not None:
        state = state.detach().clone().requires_grad_()
        inputs.append(state)
    outputs = selective_scan(**tensors, initial_state=state, return_last_state=True, **options)
    return (*outputs, *gradients(outputs, inputs))


def run_reference(tensors, state=None, dtype=torch.float64, cast=None, **options):
    """The same by the loop, computed in ``dtype``; results rounded as ``cast`` (tensors) are."""
    tensors = {k: v.detach().cpu().to(dtype).requires_grad_() for k, v in tensors.items()}
    inputs = list(tensors.values())
    if state is not None:
        state = state.detach().cpu().to(dtype).requires_grad_()
        inputs.append(state)
    outputs = reference.selective_scan(**tensors, initial_state=state, **options)
    results = (*outputs, *gradients(outputs, inputs, cast=cast))
    if dtype == torch.float64:
        return results
    return tuple(x.to(c.dtype) for x, c in zip(results, cast, strict=True))


def compare(tensors, state=None, slack=8.0, **options):
    got = run(tensors, state, **options)
    names = ('out', 'last_state', *tensors, 'initial_state')[: len(got)]
    exact = run_reference(tensors, state, cast=got, **options)
    if got[0].dtype == torch.float64:
        for name, value, truth in zip(names, got, exact, strict=True):
            scale = truth.abs().max().item() if truth.numel() else 0
            torch.testing.assert_close(
                value.cpu(),
                truth,
                rtol=0,
                atol=1e-12 + 1e-12 * scale,
                msg=lambda m, n=name: f'{n}: {m}',
            )
        return
    plain = run_reference(tensors, state, torch.float32, cast=got, **options)
    assert_error_bounded(names, got, plain, exact, slack=slack)


def initial_state(tensors, method='zoh', seed=50):
    b, _, d = tensors['u'].shape
    n = tensors['A'].shape[1] * (2 if method in TWO_TAP else 1)
    A = tensors['A']
    return randn(b, d, n, seed=seed, dtype=A.dtype, device=A.device)


LENGTHS = (0, 1, 2, 49, 64, 65, 196, 197, 1025)
STATES = (1, 8, 16, 17)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ('length', 'n'), [*zip(LENGTHS, itertools.cycle(STATES), strict=False), (197, 16)]
)
def test_lengths_states_dtypes(backend, device, dtype, length, n):
    need(backend, 'selective_scan', device, dtype)
    tensors = scan_inputs(2, length, 7, n, dtype=dtype, device=device)
    compare(tensors, initial_state(tensors), delta_softplus=True)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('method', DISCRETIZATIONS)
def test_methods_directions_groups(backend, device, dtype, method, reverse):
    need(backend, 'selective_scan', device, dtype)
    tensors = scan_inputs(2, 37, 6, 5, 2, dtype=dtype, device=device)
    options = {'delta_softplus': True, 'discretization': method, 'reverse': reverse}
    compare(tensors, initial_state(tensors, method), **options)


@pytest.mark.parametrize('optional', list(itertools.product([False, True], repeat=4)))
def test_optional_inputs(backend, device, optional):
    need(backend, 'selective_scan', device, torch.float64)
    tensors = scan_inputs(2, 11, 3, 4, device=device)
    for name, keep in zip(('D', 'z', 'delta_bias'), optional, strict=False):
        if not keep:
            del tensors[name]
    tensors['delta'] = tensors['delta'].abs()
    compare(tensors, initial_state(tensors) if optional[3] else None, delta_softplus=optional[0])


@pytest.mark.parametrize('method', sorted(TWO_TAP))
def test_state_without_the_previous_drive(backend, device, method):
    need(backend, 'selective_scan', device, torch.float64)
    tensors = scan_inputs(2, 5, 3, 4, device=device)
    compare(tensors, initial_state(tensors), delta_softplus=True, discretization=method)


@pytest.mark.parametrize('shape', [(0, 5, 3, 4), (2, 0, 3, 4), (0, 0, 3, 4), (1, 1, 1, 1)])
@pytest.mark.parametrize('method', ['zoh', 'tustin'])
def test_empty_and_smallest(backend, device, method, shape):
    need(backend, 'selective_scan', device, torch.float64)
    tensors = scan_inputs(*shape, device=device)
    compare(tensors, initial_state(tensors, method), discretization=method, delta_softplus=True)
    compare(tensors, discretization=method, delta_softplus=True)


@pytest.mark.parametrize('groups', [1, 2, 3, 6])
def test_groups(backend, device, groups):
    need(backend, 'selective_scan', device, torch.float64)
    compare(scan_inputs(2, 9, 6, 3, groups, device=device), delta_softplus=True)


@pytest.mark.parametrize('n', [64, 255, 256])
def test_many_states(backend, device, n):
    need(backend, 'selective_scan', device, torch.float32)
    compare(scan_inputs(1, 9, 3, n, dtype=torch.float32, device=device), delta_softplus=True)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    b=st.integers(1, 3),
    length=st.integers(0, 70),
    groups=st.integers(1, 3),
    width=st.integers(1, 5),
    n=st.integers(1, 20),
    method=st.sampled_from(DISCRETIZATIONS),
    reverse=st.booleans(),
    with_state=st.booleans(),
)
@pytest.mark.parametrize('name', ['torch', 'compiled'])
def test_drawn_shapes(name, b, length, groups, width, n, method, reverse, with_state):
    need(name, 'selective_scan', 'cpu', torch.float32)
    tensors = scan_inputs(b, length, groups * width, n, groups, dtype=torch.float32)
    state = initial_state(tensors, method) if with_state else None
    # Small shapes may cancel to far less than their terms, so the floor is higher than elsewhere.
    with use_backend(name):
        compare(tensors, state, 200, delta_softplus=True, discretization=method, reverse=reverse)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('method', DISCRETIZATIONS)
def test_gradcheck(method, reverse):
    for groups, with_state, gated in ((1, True, True), (2, False, True), (2, True, False)):
        tensors = scan_inputs(1, 3, 2, 2, groups)
        if not gated:
            del tensors['z']
        names = list(tensors)
        state = initial_state(tensors, method) if with_state else None

        def function(*values, names=names, with_state=with_state):
            given = dict(zip(names, values, strict=False))
            return selective_scan(
                **given,
                initial_state=values[-1] if with_state else None,
                return_last_state=True,
                delta_softplus=True,
                discretization=method,
                reverse=reverse,
                backend='torch',
            )

        values = [*tensors.values()] + ([state] if with_state else [])
        assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in values])


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('method', DISCRETIZATIONS)
def test_streaming_equals_one_pass(backend, device, method, reverse):
    need(backend, 'selective_scan', device, torch.float64)
    tensors = scan_inputs(2, 41, 5, 4, device=device)
    options = {'delta_softplus': True, 'discretization': method, 'reverse': reverse}
    state = initial_state(tensors, method)
    whole, last = selective_scan(**tensors, initial_state=state, return_last_state=True, **options)
    pieces = []
    cuts = list(itertools.pairwise([0, 1, 2, 18, 18, 34, 41]))
    for start, stop in reversed(cuts) if reverse else cuts:
        piece = {k: v[:, start:stop] if v.dim() == 3 else v for k, v in tensors.items()}
        out, state = selective_scan(**piece, initial_state=state, return_last_state=True, **options)
        pieces.append(out)
    pieces = torch.cat(pieces[::-1] if reverse else pieces, 1)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('method', ['zoh', 'foh_hold'])
def test_gradients_flow_through_the_state(backend, device, method, reverse):
    """Gradients of two calls joined by the state equal those of one call."""
    need(backend, 'selective_scan', device, torch.float64)
    options = {'delta_softplus': True, 'discretization': method, 'reverse': reverse}
    tensors = scan_inputs(2, 12, 3, 4, device=device)
    tensors = {k: v.requires_grad_() for k, v in tensors.items()}
    whole = selective_scan(**tensors, **options)
    first, second = (slice(7, 12), slice(0, 7)) if reverse else (slice(0, 7), slice(7, 12))
    state, parts = None, []
    for piece in (first, second):
        out, state = selective_scan(
            **{k: v[:, piece] if v.dim() == 3 else v for k, v in tensors.items()},
            initial_state=state,
            return_last_state=True,
            **options,
        )
        parts.append(out)
    joined = torch.cat(parts[::-1] if reverse else parts, 1)
    inputs = list(tensors.values())
    for one, two in zip(gradients([whole], inputs), gradients([joined], inputs), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-11, atol=1e-12)


def strided(x, pattern):
    """The values of x (b, l, ...) in another layout."""
    if pattern == 'slice':
        big = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), float('nan'), dtype=x.dtype)
        view = big.to(x.device)[..., 2 : 2 + x.shape[-1]]
    elif pattern == 'channels first':
        view = torch.empty_like(x.transpose(1, -1).contiguous()).transpose(1, -1)
    elif pattern == 'time first':
        view = torch.empty_like(x.transpose(0, 1).contiguous()).transpose(0, 1)
    else:
        view = torch.empty((*x.shape, 2), dtype=x.dtype, device=x.device)[..., 1]
    view.copy_(x)
    return view


# 64 channels fill vectors, which a CPU reads where they lie, aligned or not.
@pytest.mark.parametrize(('channels', 'reverse'), [(6, False), (64, False), (64, True)])
@pytest.mark.parametrize('pattern', ['slice', 'channels first', 'time first', 'every other'])
def test_strides(backend, device, pattern, channels, reverse):
    need(backend, 'selective_scan', device, torch.float32)
    tensors = scan_inputs(2, 19, channels, 4, 2, dtype=torch.float32, device=device)
    layouts = {k: strided(v, pattern) if v.dim() > 2 else v for k, v in tensors.items()}
    assert not layouts['u'].is_contiguous()
    options = {'delta_softplus': True, 'reverse': reverse}
    plain = run(tensors, **options)
    inputs = {k: v.requires_grad_() for k, v in layouts.items()}
    outputs = selective_scan(**inputs, **options, return_last_state=True)
    assert outputs[0].is_contiguous()
    results = (*outputs, *gradients(outputs, list(inputs.values())))
    for one, two in zip(plain, results, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


def test_expanded_inputs(backend, device):
    need(backend, 'selective_scan', device, torch.float64)
    tensors = scan_inputs(3, 8, 4, 2, device=device)
    one = {k: v[:1] if v.dim() == 3 else v for k, v in tensors.items()}
    same = {k: v.expand(3, -1, -1) if v.dim() == 3 else v for k, v in one.items()}
    expected = selective_scan(**one, delta_softplus=True)
    got = selective_scan(**same, delta_softplus=True)
    torch.testing.assert_close(got, expected.expand(3, -1, -1))


def test_repeated_runs_are_equal(backend, device):
    need(backend, 'selective_scan', device, torch.float32)
    tensors = scan_inputs(2, 65, 17, 16, dtype=torch.float32, device=device)
    first = run(tensors, delta_softplus=True)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [run(tensors, delta_softplus=True) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], again, strict=True))
    for x, y in zip(first, runs[0], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('which', ['out', 'state'])
def test_only_one_output_is_used(backend, device, which):
    need(backend, 'selective_scan', device, torch.float64)
    tensors = scan_inputs(2, 6, 3, 2, device=device)
    exact = {k: v.requires_grad_() for k, v in wide(tensors).items()}
    tensors = {k: v.requires_grad_() for k, v in tensors.items()}
    state, last = selective_scan(**tensors, delta_softplus=True, return_last_state=True)
    result = state if which == 'out' else last
    expected = reference.selective_scan(**exact, delta_softplus=True)[which == 'state']
    got = gradients([result], list(tensors.values()))
    for name, x, y in zip(tensors, got, gradients([expected], list(exact.values())), strict=True):
        torch.testing.assert_close(x.cpu(), y, msg=lambda m, n=name: f'{n}: {m}')


def test_gradients_only_where_needed(backend, device):
    need(backend, 'selective_scan', device, torch.float64)
    tensors = scan_inputs(2, 6, 3, 2, device=device)
    tensors['A'].requires_grad_()
    selective_scan(**tensors, delta_softplus=True).sum().backward()
    assert tensors['A'].grad is not None
    assert all(v.grad is None for k, v in tensors.items() if k != 'A')


def test_inference_keeps_nothing():
    tensors = scan_inputs(1, 40, 3, 2)
    with torch.inference_mode():
        out = selective_scan(**tensors)
    assert not out.requires_grad
    with torch.no_grad():
        out = selective_scan(**{k: v.requires_grad_() for k, v in tensors.items()})
    assert not out.requires_grad


def test_second_derivative_is_refused():
    tensors = scan_inputs(1, 4, 2, 2)
    tensors['u'].requires_grad_()
    out = selective_scan(**tensors, backend='torch')
    (grad,) = torch.autograd.grad(out.sum(), tensors['u'], create_graph=True)
    with pytest.raises(NotImplementedError, match='selective_scan_backward'):
        grad.sum().backward()


@pytest.mark.parametrize('dtype', [torch.float32, *HALF])
def test_fast_decay_neither_overflows_nor_underflows_to_nan(backend, device, dtype):
    """Products of e^z over time vanish here, where dividing by them would give inf or NaN."""
    need(backend, 'selective_scan', device, dtype)
    tensors = scan_inputs(1, 16, 3, 4, dtype=dtype, device=device)
    tensors['delta'] = torch.full_like(tensors['delta'], 30)
    tensors['A'] = torch.full_like(tensors['A'], -16)
    for method in set(DISCRETIZATIONS) - {'rk4'}:  # which itself overflows float16 here
        got = run(tensors, discretization=method)
        exact = run_reference(tensors, cast=got, discretization=method)
        for value, truth in zip(got, exact, strict=True):
            error = (value.cpu().double() - truth).abs().max().item()
            assert error <= 0.02 * truth.abs().max().item() + 1e-7, method


def test_softplus_is_the_identity_beyond_20(backend, device):
    need(backend, 'selective_scan', device, torch.float32)
    tensors = scan_inputs(1, 4, 2, 3, dtype=torch.float32, device=device)
    tensors['delta'] = torch.tensor([19.9, 20.1, 50.0, -90.0], device=device)[None, :, None].repeat(
        1, 1, 2
    )
    tensors['A'] *= 0.01
    compare(tensors, delta_softplus=True)


class Largest(TorchDispatchMode):
    """Remembers how many values the largest result of any operation holds."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.values = max(self.values, x.numel())
        return result


@pytest.mark.parametrize('interval', [0, 16, 1024])
def test_memory_is_bounded_by_the_chunk(monkeypatch, interval):
    """Nothing larger than the inputs or a chunk exists, in forward or backward."""
    monkeypatch.setattr(selective_scan_torch, '_CHUNK_VALUES_CPU', 2**12)
    b, length, d, n = 1, 1024, 32, 16
    tensors = scan_inputs(b, length, d, n, 1, dtype=torch.float32)
    u, delta, A, B, C, D, _, bias = tensors.values()
    options = (True, 'zoh', False)
    # The implementations themselves: a dispatch mode does not see into an op.
    with Largest() as seen:
        y, _, checkpoints = selective_scan_torch.scan_forward(
            u, delta, A, B, C, D, bias, None, *options, False, interval
        )
        selective_scan_torch.scan_backward(
            y, None, u, delta, A, B, C, D, bias, None, checkpoints, *options, interval, True
        )
    assert seen.values <= max(b * length * d, 2**12 + d * n)


@pytest.mark.parametrize('tree', [False, True], ids=['steps', 'tree'])
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('method', ['zoh', 'foh', 'tustin'])
def test_chunks_and_checkpoints_change_nothing(monkeypatch, method, reverse, tree):
    """Any chunk, any checkpoint interval, step by step or as a tree: one result."""
    tensors = scan_inputs(2, 21, 3, 4, 1)
    state = initial_state(tensors, method)
    inputs = (*tensors.values(), state)
    options = (True, method, reverse)
    expected = run(tensors, state, delta_softplus=True, discretization=method, reverse=reverse)
    monkeypatch.setattr(selective_scan_torch, '_STEP_VALUES_CPU', 10**9 if tree else 0)
    ops = torch.ops.mmvim_torch
    for chunk, interval in itertools.product((1, 2, 5, 20, 21, 64), (0, 1, 2, 7, 20, 21, 100)):
        monkeypatch.setattr(selective_scan_torch, '_CHUNK_VALUES_CPU', chunk * 2 * 3 * 4)
        out, last, checkpoints = ops.selective_scan(*inputs, *options, True, interval)
        if interval:
            assert checkpoints.shape == (2, (21 - 1) // interval, 3, 4)
        cotangents = [randn(*x.shape, seed=1000 + i) for i, x in enumerate((out, last))]
        grads = ops.selective_scan_backward(*cotangents, *inputs, checkpoints, *options, interval)
        for one, two in zip(expected, (out, last, *grads), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)


def made_up(method, delta, z, phi=None, *, overwrite=False):
    """A rational method of one tap, or of two that share its weight out: a = 1/(1 - z)."""
    a = 1 / (1 - z)
    w = delta * a
    return (a, w, None) if method == 'one tap' else (a, 0.75 * w, 0.25 * w)


def made_up_derivatives(method, delta, z, a, phi=None):
    slope = delta * a * a
    if method == 'one tap':
        return a * a, a, slope, None, None
    return a * a, 0.75 * a, 0.75 * slope, 0.25 * a, 0.25 * slope


@pytest.mark.parametrize('tree', [False, True], ids=['steps', 'tree'])
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('method', ['one tap', 'two taps'])
def test_a_method_that_is_new_and_rational_passes_through_chunks(
    monkeypatch, method, reverse, tree
):
    """Nothing but its coefficients and its number of taps is asked of a method."""
    monkeypatch.setattr(selective_scan_torch, 'coefficients', made_up)
    monkeypatch.setattr(selective_scan_torch, 'derivatives', made_up_derivatives)
    monkeypatch.setattr(selective_scan_torch, 'TWO_TAP', {'two taps'})
    monkeypatch.setattr(selective_scan_torch, '_STEP_VALUES_CPU', 10**9 if tree else 0)
    monkeypatch.setattr(selective_scan_torch, '_CHUNK_VALUES_CPU', 9 * 2 * 3 * 4)
    tensors = scan_inputs(2, 301, 3, 4, 1)
    leaves = [x.clone().requires_grad_() for x in tensors.values()]
    u, delta, A, B, C, D, z, bias = leaves
    h = v = torch.zeros(2, 3, 4, dtype=torch.float64)
    y = [None] * 301
    for t in reversed(range(301)) if reverse else range(301):
        step = F.softplus(delta[:, t] + bias).unsqueeze(-1)
        a, w0, w1 = made_up(method, step, step * A)
        drive = B[:, t] * u[:, t].unsqueeze(-1)
        h = a * h + w0 * drive + (0 if w1 is None else w1 * v)
        v = drive
        y[t] = (C[:, t] * h).sum(-1) + D * u[:, t]
    y = torch.stack(y, 1) * F.silu(z)
    cotangent = randn(*y.shape, seed=7)
    expected = (y, *torch.autograd.grad(y, leaves, cotangent))
    inputs = (*tensors.values(), None)
    out, _, checkpoints = torch.ops.mmvim_torch.selective_scan(
        *inputs, True, method, reverse, False, 16
    )
    grads = torch.ops.mmvim_torch.selective_scan_backward(
        cotangent, None, *inputs, checkpoints, True, method, reverse, 16
    )
    for one, two in zip(expected, (out, *grads[:8]), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('length', [1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 33, 100])
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
def test_tree_equals_steps(monkeypatch, length, reverse):
    a, h = randn(length, 2, 3).abs(), randn(length + 1, 2, 3, seed=1)
    results = []
    for threshold in (0, 10**9):
        monkeypatch.setattr(selective_scan_torch, '_STEP_VALUES_CPU', threshold)
        result = h.clone()
        selective_scan_torch.linear_scan_(a.clone(), result, reverse)
        results.append(result)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('precision', ['high', 'medium'])
def test_precision_of_matmul_does_not_matter(precision):
    tensors = scan_inputs(2, 33, 8, 16, dtype=torch.float32)
    exact = run(tensors, delta_softplus=True, backend='torch')
    torch.set_float32_matmul_precision(precision)
    try:
        got = run(tensors, delta_softplus=True, backend='torch')
    finally:
        torch.set_float32_matmul_precision('highest')
    for one, two in zip(exact, got, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=2e-5)


LONG = [
    *itertools.product(DISCRETIZATIONS, [196, 1025], [16, 17]),
    ('zoh', 4097, 16),
    ('tustin', 4097, 16),
]


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(('method', 'length', 'n'), LONG)
def test_long(backend, device, dtype, method, length, n):
    need(backend, 'selective_scan', device, dtype)
    b, d = (1, 9) if length == 4097 else (2, 33)
    tensors = scan_inputs(b, length, d, n, 3, dtype=dtype, device=device)
    compare(tensors, initial_state(tensors, method), delta_softplus=True, discretization=method)
