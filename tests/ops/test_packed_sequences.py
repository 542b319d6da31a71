"""Sequences packed into one row: what separate calls give, and no more."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_support import HALF, assert_error_bounded, gradients, need, randn, scan_inputs

from mmvim.ops import (
    DISCRETIZATIONS,
    TWO_TAP,
    ScanInputs,
    bidirectional_scan,
    causal_conv1d,
    reference,
    selective_scan,
    selective_scan_torch,
    use_backend,
)

DTYPES = (torch.float64, torch.float32, *HALF)
# Lengths and cuts at, beside and between the ends of tiles, checkpoints and chunks.
CUTS = {
    'none': (20, []),
    'first and last': (20, [1, 19]),
    'edges': (40, [15, 16, 32, 33, 39]),
    'every step': (9, range(1, 9)),
    'one step': (1, []),
    'empty': (0, []),
}


def numbers(*rows, device='cpu'):
    """seq_idx of rows, each given by its length and its cuts; the numbers are not in order."""
    seq_idx = torch.zeros(len(rows), rows[0][0], dtype=torch.int32)
    for row, (_, cuts) in zip(seq_idx, rows, strict=True):
        for i, cut in enumerate(cuts):
            row[cut:] = (7 * i + 3) % 5 - 2 if i % 2 else i + 100
    return seq_idx.to(device)


def two_rows(name, device='cpu'):
    """One row of :data:`CUTS`, and one with a cut elsewhere."""
    length, cuts = CUTS[name]
    return numbers((length, cuts), (length, [length // 2 + 1] if length > 2 else []), device=device)


def pieces(row, reverse=False):
    """Stretches of time of the sequences of a row, in the order of the scan."""
    row = row.tolist()
    starts = [t for t in range(len(row)) if t == 0 or row[t] != row[t - 1]]
    parts = [slice(*ends) for ends in itertools.pairwise([*starts, len(row)])]
    return parts[::-1] if reverse else parts


def state_of(tensors, method, seed=50):
    b, _, d = tensors['u'].shape
    A = tensors['A']
    n = A.shape[1] * (2 if method in TWO_TAP else 1)
    return randn(b, d, n, seed=seed, dtype=A.dtype, device=A.device)


def separate_scans(tensors, state, seq_idx, **options):
    rows, lasts = [], []
    for i, row in enumerate(seq_idx):
        outputs, before = {}, state[i : i + 1]
        for part in pieces(row, options['reverse']):
            inputs = {
                name: x if name in ('A', 'D', 'delta_bias') else x[i : i + 1, part]
                for name, x in tensors.items()
            }
            outputs[part.start], last = selective_scan(
                **inputs, initial_state=before, return_last_state=True, **options
            )
            before = None
        rows.append(torch.cat([outputs[start] for start in sorted(outputs)], 1))
        lasts.append(last)
    return torch.cat(rows), torch.cat(lasts)


def separate_convolutions(x, weight, bias, state, seq_idx, **options):
    rows, lasts = [], []
    for i, row in enumerate(seq_idx):
        outputs, before = {}, state[i : i + 1]
        for part in pieces(row, options['mode'] == 'reverse'):
            outputs[part.start], last = causal_conv1d(
                x[i : i + 1, part],
                weight,
                bias,
                initial_state=before,
                return_last_state=True,
                **options,
            )
            before = None
        rows.append(torch.cat([outputs[start] for start in sorted(outputs)], 1))
        lasts.append(last)
    return torch.cat(rows), torch.cat(lasts)


def assert_equal_gradients(names, one, two, leaves):
    for name, a, b in zip(
        (*('out', 'last_state'), *names),
        (*one, *gradients(one, leaves)),
        (*two, *gradients(two, leaves)),
        strict=True,
    ):
        torch.testing.assert_close(
            a, b, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f'{name}: {m}'
        )


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 45),
    cuts=st.sets(st.integers(1, 44)),
    others=st.sets(st.integers(1, 44), max_size=3),
    method=st.sampled_from(DISCRETIZATIONS),
    reverse=st.booleans(),
)
@pytest.mark.parametrize('name', ['torch', 'compiled'])
def test_scan_equals_separate_scans(name, length, cuts, others, method, reverse):
    need(name, 'selective_scan', 'cpu', torch.float64)
    rows = [(length, sorted(c for c in some if c < length)) for some in (cuts, others)]
    tensors = {k: v.requires_grad_() for k, v in scan_inputs(2, length, 4, 3, 2).items()}
    state = state_of(tensors, method).requires_grad_()
    seq_idx = numbers(*rows)
    options = {'delta_softplus': True, 'discretization': method, 'reverse': reverse}
    with use_backend(name):
        packed = selective_scan(
            **tensors, initial_state=state, return_last_state=True, seq_idx=seq_idx, **options
        )
        separate = separate_scans(tensors, state, seq_idx, **options)
        leaves = [*tensors.values(), state]
        assert_equal_gradients([*tensors, 'initial_state'], packed, separate, leaves)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 40),
    cuts=st.sets(st.integers(1, 39)),
    others=st.sets(st.integers(1, 39), max_size=3),
    width=st.integers(2, 4),
    mode=st.sampled_from(['causal', 'reverse']),
)
@pytest.mark.parametrize('name', ['torch', 'compiled'])
def test_convolution_equals_separate_ones(name, length, cuts, others, width, mode):
    need(name, 'causal_conv1d', 'cpu', torch.float64)
    rows = [(length, sorted(c for c in some if c < length)) for some in (cuts, others)]
    seq_idx = numbers(*rows)
    shapes = {
        'x': (2, length, 3),
        'weight': (3, width),
        'bias': (3,),
        'initial_state': (2, 3, width - 1),
    }
    leaves = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes.values())]
    *inputs, state = leaves
    options = {'mode': mode, 'activation': 'silu', 'backend': name}
    packed = causal_conv1d(
        *inputs, initial_state=state, return_last_state=True, seq_idx=seq_idx, **options
    )
    separate = separate_convolutions(*inputs, state, seq_idx, **options)
    assert_equal_gradients(list(shapes), packed, separate, leaves)


def compared(function, expected, leaves, names, slack=8.0):
    """Outputs and gradients against a reference that takes leaves of any precision."""

    def results(call, convert, cast=None):
        values = [convert(x).requires_grad_() for x in leaves]
        outputs = call(*values)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return (*outputs, *gradients(outputs, values, cast=cast))

    got = results(function, lambda x: x.detach().clone())
    exact = results(expected, lambda x: x.detach().cpu().double(), cast=got)
    plain = results(expected, lambda x: x.detach().cpu().float(), cast=got)
    plain = [x.to(c.dtype) for x, c in zip(plain, got, strict=True)]
    names = (*(f'out{i}' for i in range(len(got) - len(names))), *names)
    assert_error_bounded(names, got, plain, exact, slack=slack)


def check_scan(seq_idx, method, reverse, dtype, device, n=5, d=36):
    tensors = scan_inputs(2, seq_idx.shape[1], d, n, 2, dtype=dtype, device=device)
    names = (*tensors, 'initial_state')
    options = {'delta_softplus': True, 'discretization': method, 'reverse': reverse}

    def packed(*values):
        inputs = dict(zip(names, values, strict=True))
        return selective_scan(**inputs, return_last_state=True, seq_idx=seq_idx, **options)

    def expected(*values):
        inputs = dict(zip(names, values, strict=True))
        return reference.selective_scan(**inputs, seq_idx=seq_idx.cpu(), **options)

    compared(packed, expected, [*tensors.values(), state_of(tensors, method)], names)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', CUTS)
def test_cuts(backend, device, dtype, name):
    need(backend, 'selective_scan', device, dtype)
    for method, reverse in (('zoh', False), ('tustin', True)):
        check_scan(two_rows(name, device), method, reverse, dtype, device, d=6)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('method', DISCRETIZATIONS)
def test_methods(backend, device, method, reverse):
    need(backend, 'selective_scan', device, torch.float32)
    check_scan(two_rows('edges', device), method, reverse, torch.float32, device, d=6)


@pytest.mark.parametrize('steps', [1, 4])
@pytest.mark.parametrize('in_tree', [False, True])
def test_chunks_of_the_torch_backend(monkeypatch, in_tree, steps):
    monkeypatch.setattr(selective_scan_torch, '_CHUNK_VALUES_CPU', steps * 2 * 6 * 5)
    monkeypatch.setattr(selective_scan_torch, '_STEP_VALUES_CPU', 10**6 if in_tree else 0)
    with use_backend('torch'):
        for method, reverse in (('zoh', False), ('tustin', True), ('bilinear', False)):
            seq_idx = numbers((13, [4, 8, 9, 12]), (13, [5]))
            check_scan(seq_idx, method, reverse, torch.float64, 'cpu', d=6)


@pytest.mark.parametrize('interval', [0, 3, 64])
def test_any_distance_of_checkpoints(interval):
    need('compiled', 'selective_scan', 'cpu', torch.float64)
    seq_idx = two_rows('edges')
    inputs = list(scan_inputs(2, seq_idx.shape[1], 4, 3, 1).values())
    inputs += [None, True, 'foh_hold', False]
    grads = []
    for ops in (torch.ops.mmvim, torch.ops.mmvim_torch):
        out, last, checkpoints = ops.selective_scan(*inputs, True, interval, seq_idx)
        given = torch.cos(out), torch.cos(last), *inputs[:9], checkpoints, *inputs[9:]
        grads.append((out, last, *ops.selective_scan_backward(*given, interval, seq_idx)))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('plan', ['32x1', '32x2', '64x3', '32x5'])
@pytest.mark.parametrize('method', ['zoh', 'bilinear', 'foh_hold', 'tustin'])
def test_chunks(monkeypatch, dtype, method, plan):
    need('compiled', 'selective_scan', 'cuda', dtype)
    monkeypatch.setenv('MMVIM_SCAN_PLAN', plan)
    with use_backend('compiled'):
        for reverse in (False, True):
            seq_idx = numbers((140, [15, 32, 33, 64, 96, 128]), (140, []), device='cuda')
            check_scan(seq_idx, method, reverse, dtype, 'cuda')


@pytest.mark.gpu
@pytest.mark.parametrize('n', [1, 2, 40])
def test_few_and_many_states(n):
    need('compiled', 'selective_scan', 'cuda', torch.float32)
    with use_backend('compiled'):
        check_scan(two_rows('edges', 'cuda'), 'zoh', False, torch.float32, 'cuda', n=n, d=70)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(('method', 'gated'), [('zoh', True), ('tustin', False)])
def test_both_directions(backend, device, dtype, method, gated):
    need(backend, 'bidirectional_scan', device, dtype)
    seq_idx = two_rows('edges', device)
    leaves = []
    for seed in (0, 1):
        tensors = scan_inputs(2, seq_idx.shape[1], 6, 4, dtype=dtype, device=device, seed=seed)
        z = tensors.pop('z')
        leaves += tensors.values()
    leaves += [z] if gated else []
    options = {'scale': 0.5, 'delta_softplus': True, 'discretization': method}
    names = [f'{name}_{i}' for i in 'fb' for name in tensors] + ['z'] * gated

    def packed(*values):
        parts = ScanInputs(*values[:7]), ScanInputs(*values[7:14])
        return bidirectional_scan(*parts, *values[14:], seq_idx=seq_idx, **options)

    def expected(*values):
        parts = values[:7], values[7:14], *values[14:]
        return reference.bidirectional_scan(*parts, seq_idx=seq_idx.cpu(), **options)

    compared(packed, expected, leaves, [n.replace('A_', 'A') for n in names])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(('mode', 'width'), [('causal', 4), ('reverse', 3), ('same', 4)])
def test_convolutions(backend, device, dtype, mode, width):
    need(backend, 'causal_conv1d', device, dtype)
    streams = mode != 'same'
    # With and without whole vectors of channels, and an activation.
    options = zip(CUTS, (8, 8, 5, 8, 3, 8), itertools.cycle((True, False)), strict=False)
    for name, d, silu in options:
        seq_idx = two_rows(name, device)
        shapes = [(2, seq_idx.shape[1], d), (d, width), (d,), (2, d, width - 1)]
        leaves = [
            randn(*shape, seed=i, dtype=dtype, device=device)
            for i, shape in enumerate(shapes[: 3 + streams])
        ]
        options = {'mode': mode, 'activation': 'silu' if silu else None}

        def packed(*values, seq_idx=seq_idx, options=options):
            given = {'initial_state': values[3], 'return_last_state': True} if streams else {}
            return causal_conv1d(*values[:3], **given, seq_idx=seq_idx, **options)

        def expected(*values, seq_idx=seq_idx, options=options):
            out = reference.causal_conv1d(*values, seq_idx=seq_idx.cpu(), **options)
            return out if streams else out[0]

        compared(packed, expected, leaves, ['x', 'weight', 'bias', 'initial_state'][: len(leaves)])


@pytest.mark.parametrize('method', ['zoh', 'bilinear', 'foh_hold', 'tustin'])
def test_gradcheck(method):
    tensors = scan_inputs(1, 4, 2, 2)
    seq_idx = numbers((4, [1, 3]))

    def function(*values):
        *values, state = values
        inputs = dict(zip(tensors, values, strict=True))
        return selective_scan(
            **inputs,
            initial_state=state,
            return_last_state=True,
            seq_idx=seq_idx,
            delta_softplus=True,
            discretization=method,
            backend='torch',
        )

    leaves = [*tensors.values(), state_of(tensors, method)]
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves])


def test_only_changes_of_the_number_count(backend, device):
    need(backend, 'selective_scan', device, torch.float32)
    need(backend, 'causal_conv1d', device, torch.float32)
    tensors = scan_inputs(1, 6, 4, 3, dtype=torch.float32, device=device)
    x, weight = tensors['u'], randn(4, 4, dtype=torch.float32, device=device)
    results = []
    for row in ([0, 0, 1, 2, 2, 2], [5, 5, -1, 5, 5, 5], [2**31 - 1, 2**31 - 1, 0, 1, 1, 1]):
        seq_idx = torch.tensor([row], dtype=torch.int32, device=device)
        # Neither the layout in memory counts.
        other = torch.stack((seq_idx, seq_idx + 1), 2)[..., 0]
        assert not other.is_contiguous()
        for same in (seq_idx, other):
            results.append(
                (
                    selective_scan(**tensors, delta_softplus=True, seq_idx=same),
                    causal_conv1d(x, weight, seq_idx=same),
                )
            )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_sequence_equals_none(backend, device):
    need(backend, 'selective_scan', device, torch.float32)
    tensors = scan_inputs(2, 70, 6, 4, dtype=torch.float32, device=device)
    seq_idx = torch.full((2, 70), 3, dtype=torch.int32, device=device)
    whole = selective_scan(**tensors, delta_softplus=True)
    torch.testing.assert_close(
        selective_scan(**tensors, delta_softplus=True, seq_idx=seq_idx), whole
    )


def test_autocast_leaves_the_numbers(backend):
    need(backend, 'selective_scan', 'cpu', torch.bfloat16)
    tensors = scan_inputs(2, 9, 4, 3, dtype=torch.float32)
    seq_idx = numbers((9, [4]), (9, []))
    with torch.autocast('cpu', torch.bfloat16):
        out = selective_scan(**tensors, delta_softplus=True, seq_idx=seq_idx)
        conv = causal_conv1d(tensors['u'], torch.ones(4, 3), seq_idx=seq_idx)
    assert out.dtype == conv.dtype == torch.bfloat16
    tensors |= {name: tensors[name].bfloat16() for name in ('u', 'delta', 'B', 'C', 'z')}
    assert torch.equal(out, selective_scan(**tensors, delta_softplus=True, seq_idx=seq_idx))


def test_compiles_without_graph_breaks():
    def function(seq_idx, weight, z=None, **tensors):
        u = causal_conv1d(tensors.pop('u'), weight, activation='silu', seq_idx=seq_idx)
        one = selective_scan(u, **tensors, delta_softplus=True, seq_idx=seq_idx)
        inputs = ScanInputs(u, **tensors)
        return one + bidirectional_scan(inputs, inputs, z, delta_softplus=True, seq_idx=seq_idx)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend='aot_eager')
    for length in (9, 21):
        tensors = scan_inputs(2, length, 4, 3, 2, dtype=torch.float32)
        tensors['weight'] = randn(4, 4, dtype=torch.float32)
        tensors = {k: v.requires_grad_() for k, v in tensors.items()}
        results = []
        for call in (function, compiled):
            out = call(numbers((length, [4]), (length, [2, 3])), **tensors)
            results.append((out, *gradients([out], list(tensors.values()))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
