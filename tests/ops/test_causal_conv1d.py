"""The short convolutions against torch's own."""

import itertools

import pytest
import torch
from ops_support import HALF, assert_error_bounded, gradients, need, randn

from mmvim.ops import bidirectional_conv1d, causal_conv1d, reference

MODES = ('causal', 'reverse', 'same')
DTYPES = (torch.float64, torch.float32, *HALF)


def inputs_of(b, length, d, width, *, dtype=torch.float64, device='cpu', state=True, bias=True):
    tensors = {
        'x': randn(b, length, d, seed=1, dtype=dtype, device=device),
        'weight': randn(d, width, seed=2, dtype=dtype, device=device),
    }
    if bias:
        tensors['bias'] = randn(d, seed=3, dtype=dtype, device=device)
    if state:
        tensors['initial_state'] = randn(b, d, width - 1, seed=4, dtype=dtype, device=device)
    return tensors


def run(tensors, **options):
    tensors = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    with_state = options.get('mode') != 'same'
    outputs = causal_conv1d(**tensors, return_last_state=with_state, **options)
    outputs = outputs if with_state else (outputs,)
    return (*outputs, *gradients(outputs, list(tensors.values())))


def run_reference(tensors, dtype, cast, **options):
    tensors = {k: v.detach().cpu().to(dtype).requires_grad_() for k, v in tensors.items()}
    outputs = reference.causal_conv1d(**tensors, **options)
    outputs = outputs[:1] if options.get('mode') == 'same' else outputs
    results = (*outputs, *gradients(outputs, list(tensors.values()), cast=cast))
    if dtype == torch.float64:
        return results
    return tuple(x.to(c.dtype) for x, c in zip(results, cast, strict=True))


def compare(tensors, **options):
    got = run(tensors, **options)
    exact = run_reference(tensors, torch.float64, got, **options)
    plain = run_reference(tensors, torch.float32, got, **options)
    states = ('out',) if options.get('mode') == 'same' else ('out', 'last_state')
    assert_error_bounded((*states, *tensors), got, plain, exact)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize(('mode', 'width'), list(itertools.product(MODES, (2, 3, 4))))
def test_modes_widths_dtypes(backend, device, dtype, activation, mode, width):
    need(backend, 'causal_conv1d', device, dtype)
    tensors = inputs_of(2, 17, 7, width, dtype=dtype, device=device, state=mode != 'same')
    compare(tensors, activation=activation, mode=mode)


@pytest.mark.parametrize('length', [0, 1, 2, 3, 4, 49, 64, 65, 196, 197, 1025])
@pytest.mark.parametrize('mode', MODES)
def test_lengths(backend, device, length, mode):
    need(backend, 'causal_conv1d', device, torch.float32)
    for state in (False, True) if mode != 'same' else (False,):
        tensors = inputs_of(2, length, 5, 4, dtype=torch.float32, device=device, state=state)
        compare(tensors, mode=mode, activation='silu')


def test_empty_batch(backend, device):
    need(backend, 'causal_conv1d', device, torch.float32)
    compare(inputs_of(0, 5, 3, 4, dtype=torch.float32, device=device), activation='silu')


def test_without_bias(backend, device):
    need(backend, 'causal_conv1d', device, torch.float32)
    compare(inputs_of(2, 9, 3, 3, dtype=torch.float32, device=device, bias=False))


@pytest.mark.parametrize('dtype', HALF)
def test_parameters_and_state_may_be_float32(backend, device, dtype):
    need(backend, 'causal_conv1d', device, dtype)
    tensors = inputs_of(2, 9, 3, 4, dtype=torch.float32, device=device)
    tensors['x'] = tensors['x'].to(dtype)
    got = run(tensors, activation='silu')
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, *[torch.float32] * 3]
    compare(tensors, activation='silu')


@pytest.mark.parametrize('mode', ['causal', 'reverse'])
@pytest.mark.parametrize('width', [2, 3, 4])
def test_streaming_equals_one_pass(backend, device, mode, width):
    need(backend, 'causal_conv1d', device, torch.float32)
    given = inputs_of(2, 23, 5, width, dtype=torch.float32, device=device)
    x, state = given.pop('x'), given.pop('initial_state')
    options = {**given, 'mode': mode, 'activation': 'silu', 'return_last_state': True}
    whole, last = causal_conv1d(x, initial_state=state, **options)
    pieces = []
    cuts = list(itertools.pairwise([0, 1, 2, 2, 9, 23]))
    for start, stop in reversed(cuts) if mode == 'reverse' else cuts:
        out, state = causal_conv1d(x[:, start:stop], initial_state=state, **options)
        pieces.append(out)
    pieces = torch.cat(pieces[::-1] if mode == 'reverse' else pieces, 1)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, last)


def test_same_is_torchs_same(backend, device):
    need(backend, 'causal_conv1d', device, torch.float32)
    for width in (2, 3, 4):
        conv = torch.nn.Conv1d(6, 6, width, padding='same', groups=6).to(device)
        x = randn(2, 14, 6, dtype=torch.float32, device=device)
        got = causal_conv1d(x, conv.weight[:, 0], conv.bias, mode='same')
        torch.testing.assert_close(got.transpose(1, 2), conv(x.transpose(1, 2)))


@pytest.mark.parametrize('pattern', ['slice', 'channels first'])
def test_strides(backend, device, pattern):
    need(backend, 'causal_conv1d', device, torch.float32)
    given = inputs_of(2, 13, 6, 4, dtype=torch.float32, device=device, state=False)
    x = given.pop('x')
    if pattern == 'slice':
        other = torch.full((2, 13, 15), float('nan'), device=device)[..., 4:10]
    else:
        other = torch.empty(2, 6, 13, device=device).transpose(1, 2)
    other.copy_(x)
    assert not other.is_contiguous()
    got = causal_conv1d(other, **given, activation='silu')
    assert got.is_contiguous()
    assert torch.equal(got, causal_conv1d(x, **given, activation='silu'))


@pytest.mark.parametrize('mode', MODES)
def test_gradcheck(mode):
    given = inputs_of(2, 4, 2, 3, state=mode != 'same')

    def function(*values):
        return causal_conv1d(
            **dict(zip(given, values, strict=True)),
            mode=mode,
            activation='silu',
            return_last_state=mode != 'same',
            backend='torch',
        )

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in given.values()])


def test_gradients_only_where_needed(backend, device):
    need(backend, 'causal_conv1d', device, torch.float32)
    given = inputs_of(2, 5, 3, 4, dtype=torch.float32, device=device)
    given['weight'].requires_grad_()
    causal_conv1d(**given).sum().backward()
    assert [k for k, v in given.items() if v.grad is not None] == ['weight']


@pytest.mark.parametrize('which', ['out', 'state'])
def test_only_one_output_is_used(backend, device, which):
    need(backend, 'causal_conv1d', device, torch.float64)
    given = inputs_of(2, 5, 3, 4, device=device)
    results = []
    for function, place in ((causal_conv1d, device), (reference.causal_conv1d, 'cpu')):
        tensors = {k: v.detach().to(place).requires_grad_() for k, v in given.items()}
        extra = {'return_last_state': True} if function is causal_conv1d else {}
        outputs = function(**tensors, activation='silu', **extra)
        results.append(gradients([outputs[which == 'state']], list(tensors.values())))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one.cpu(), two)


def test_repeated_runs_are_equal(backend, device):
    need(backend, 'causal_conv1d', device, torch.float32)
    given = inputs_of(2, 197, 33, 4, dtype=torch.float32, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (run(given, activation='silu') for _ in range(3))
        assert all(torch.equal(x, y) for again in others for x, y in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('bias', [True, False])
def test_both_directions(backend, device, dtype, activation, bias):
    need(backend, 'bidirectional_conv1d', device, dtype)
    for length in (0, 1, 2, 17):
        given = inputs_of(2, length, 5, 4, dtype=dtype, device=device, state=False, bias=bias)
        other = randn(5, 4, seed=9, dtype=dtype, device=device)
        tensors = (given['x'], given['weight'], given.get('bias'), other, given.get('bias'))
        names = ('out_f', 'out_b', 'x', 'weight_f', 'bias_f', 'weight_b', 'bias_b')

        def run_one(function, convert, tensors=tensors, cast=None):
            values = [None if v is None else convert(v).requires_grad_() for v in tensors]
            outputs = function(*values)
            wanted = [v for v in values if v is not None]
            return (*outputs, *gradients(outputs, wanted, cast=cast))

        def expected(*values):
            return reference.bidirectional_conv1d(*values, activation=activation)

        got = run_one(
            lambda *v: bidirectional_conv1d(*v, activation=activation), lambda v: v.detach().clone()
        )
        exact = run_one(expected, lambda v: v.detach().cpu().double(), cast=got)
        plain = run_one(expected, lambda v: v.detach().cpu().float(), cast=got)
        plain = [x.to(c.dtype) for x, c in zip(plain, got, strict=True)]
        present = [n for n in names if bias or not n.startswith('bias')]
        assert_error_bounded(present, got, plain, exact)
