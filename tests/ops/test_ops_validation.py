"""Bad input gets one clear error that names the argument, what it was and what is allowed."""

import pytest
import torch
from ops_support import scan_inputs

from mmvim.ops import (
    ScanInputs,
    add_rms_norm,
    bidirectional_conv1d,
    bidirectional_scan,
    causal_conv1d,
    cross_scan,
    selective_scan,
)


def good(**changes):
    tensors = scan_inputs(2, 5, 4, 3, dtype=torch.float32)
    state = torch.zeros(2, 4, 3)
    return tensors | {'initial_state': state} | changes


def t(*shape, dtype=torch.float32, **options):
    return -torch.ones(shape, dtype=dtype, **options)


SCAN_ERRORS = [
    ({'u': [1.0]}, TypeError, r'^u must be a tensor, got list'),
    ({'u': t(2, 5)}, ValueError, r'^u must have the axes \(b, l, d\), got shape \(2, 5\)'),
    ({'u': t(2, 5, 4, dtype=torch.int64)}, TypeError, r'^u must have one of .*got torch.int64'),
    ({'u': t(2, 5, 4).to_sparse()}, TypeError, r'^u must be a dense .* got layout torch.sparse'),
    ({'delta': None}, TypeError, r'^delta must be a tensor, got NoneType'),
    ({'delta': t(2, 5, 1)}, ValueError, r'^delta must have shape .* \(2, 5, 4\), got \(2, 5, 1\)'),
    ({'delta': t(2, 5, 4, dtype=torch.bfloat16)}, TypeError, r'^delta must be torch.float32 .*got'),
    ({'z': t(1, 5, 4)}, ValueError, r'^z must have shape .*= \(2, 5, 4\), got \(1, 5, 4\)'),
    ({'z': t(2, 5, 4, dtype=torch.float64)}, TypeError, r'^z must be torch.float32'),
    ({'A': t(4)}, ValueError, r'^A must have the axes \(d, n\), got shape \(4,\)'),
    ({'A': t(5, 3)}, ValueError, r'^A must have shape \(d, n\) = \(4, 3\), got \(5, 3\)'),
    ({'A': t(4, 257)}, ValueError, r'^A must have 1 to 256 states, got shape \(4, 257\)'),
    ({'A': t(4, 0)}, ValueError, r'^A must have 1 to 256 states'),
    # To look at all values of these would take minutes.
    ({'A': t(4, 1).expand(4, 2**40)}, ValueError, r'^A must have 1 to 256 states'),
    ({'A': t(1, 3).expand(2**40, 3)}, ValueError, r'^A must have shape \(d, n\) = \(4, 3\)'),
    (
        {'A': t(4, 3, dtype=torch.float16)},
        TypeError,
        r'^A must be torch.float32 .*got torch.float16',
    ),
    ({'A': t(4, 3).to(torch.complex64)}, TypeError, r'^A must be torch.float32 .*complex64'),
    ({'A': -t(4, 3)}, ValueError, r'^A must be negative .*got values up to 1'),
    ({'A': 0 * t(4, 3)}, ValueError, r'^A must be negative .*up to -?0'),
    ({'B': t(2, 5)}, ValueError, r'^B must have the axes \(b, l, n\) or \(b, l, g, n\), got shape'),
    ({'B': t(2, 5, 4)}, ValueError, r'^B must have shape .*\(2, 5, 1, 3\), got \(2, 5, 1, 4\)'),
    ({'B': t(2, 5, 3, 3)}, ValueError, r'^the number of groups of B must divide d = 4, got 3'),
    ({'B': t(2, 5, 2, 3)}, ValueError, r'^C must have shape .*\(2, 5, 2, 3\), got \(2, 5, 1, 3\)'),
    ({'C': t(2, 4, 3)}, ValueError, r'^C must have shape .*\(2, 5, 1, 3\), got \(2, 4, 1, 3\)'),
    ({'C': t(2, 5, 3, dtype=torch.float16)}, TypeError, r'^C must be torch.float32 .*got'),
    ({'D': t(4, 1)}, ValueError, r'^D must have shape \(d\) = \(4,\), got \(4, 1\)'),
    ({'D': t(4, dtype=torch.float64)}, TypeError, r'^D must be torch.float32'),
    ({'delta_bias': t(1)}, ValueError, r'^delta_bias must have shape \(d\) = \(4,\), got \(1,\)'),
    ({'delta_bias': 1.0}, TypeError, r'^delta_bias must be a tensor, got float'),
    ({'initial_state': t(2, 4, 6)}, ValueError, r'^initial_state must have shape .*\(2, 4, 3\)'),
    ({'initial_state': t(2, 4, 3).half()}, TypeError, r'^initial_state must be torch.float32'),
    (
        {'discretization': 'euler'},
        ValueError,
        r"^discretization must be one of .*'zoh'.*got 'euler'",
    ),
    ({'backend': 'gpu'}, ValueError, r"^backend must be one of .*got 'gpu'"),
    ({'B': t(2, 5, 3, device='meta')}, ValueError, r'^all tensors .*: u is on cpu, B on meta'),
    ({'A': t(4, 3, device='meta')}, ValueError, r'^all tensors .*: u is on cpu, A on meta'),
    ({'seq_idx': [[0] * 5] * 2}, TypeError, r'^seq_idx must be a tensor, got list'),
    *[
        (
            {'seq_idx': t(*shape, dtype=torch.int32)},
            ValueError,
            r'^seq_idx must have shape \(b, l\)',
        )
        for shape in ((5,), (1, 5), (2, 4), (2, 5, 1))
    ],
    ({'seq_idx': t(2, 5, dtype=torch.int64)}, TypeError, r'^seq_idx must be torch.int32 .*int64'),
    ({'seq_idx': t(2, 5)}, TypeError, r'^seq_idx must be torch.int32 .*got torch.float32'),
    (
        {'seq_idx': t(2, 5, dtype=torch.int32, device='meta')},
        ValueError,
        r'^all tensors .*: u is on cpu, seq_idx on meta',
    ),
]


@pytest.mark.parametrize(('changes', 'error', 'message'), SCAN_ERRORS)
def test_selective_scan(changes, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**good(**changes))


def test_unknown_keyword():
    with pytest.raises(TypeError, match='chunk'):
        selective_scan(**good(), chunk=3)


@pytest.mark.parametrize(
    ('which', 'changes', 'error', 'message'),
    [
        (0, {'A': -t(4, 3)}, ValueError, r'^A of forward must be negative'),
        (1, {'A': -t(4, 3)}, ValueError, r'^A of backward must be negative'),
        (0, {'B': t(2, 4, 3)}, ValueError, r'^B of forward must have shape'),
        (1, {'D': t(3)}, ValueError, r'^D of backward must have shape'),
        (1, {'u': t(2, 4, 4)}, ValueError, r'^delta of backward must have shape'),
        (1, {'A': t(4, 2), 'B': t(2, 5, 2), 'C': t(2, 5, 2)}, ValueError, r'^A of backward must'),
    ],
)
def test_bidirectional_scan(which, changes, error, message):
    tensors = scan_inputs(2, 5, 4, 3, dtype=torch.float32)
    z = tensors.pop('z')
    inputs = [ScanInputs(**tensors), ScanInputs(**tensors)]
    inputs[which] = inputs[which]._replace(**changes)
    with pytest.raises(error, match=message):
        bidirectional_scan(*inputs, z)


def test_bidirectional_directions_must_agree():
    one = ScanInputs(**scan_inputs(2, 5, 4, 3, dtype=torch.float32, optional=False))
    two = ScanInputs(**scan_inputs(2, 6, 4, 3, dtype=torch.float32, optional=False))
    with pytest.raises(ValueError, match=r'^u of backward must have shape .*\(2, 5, 4\)'):
        bidirectional_scan(one, two)
    half = ScanInputs(**scan_inputs(2, 5, 4, 3, dtype=torch.bfloat16, optional=False))
    with pytest.raises(TypeError, match=r'^u of backward must be torch.float32 \(as u of forward'):
        bidirectional_scan(one, half)
    with pytest.raises(ValueError, match=r'^z must have shape .*\(2, 5, 4\), got'):
        bidirectional_scan(one, one, t(2, 5, 3))
    with pytest.raises(ValueError, match=r'^seq_idx must have shape \(b, l\) = \(2, 5\), got'):
        bidirectional_scan(one, one, seq_idx=t(1, 5, dtype=torch.int32))


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        ({'x': t(2, 5, 4)}, ValueError, r'^x must have the axes \(b, h, w, d\), got'),
        ({'x': t(2, 5, 3, 4, dtype=torch.int64)}, TypeError, r'^x must have one of .*int64'),
        ({'A': t(4, 3)}, ValueError, r'^A must have the axes \(k, d, n\), got shape \(4, 3\)'),
        ({'A': t(2, 4, 257)}, ValueError, r'^A must have 1 to 256 states, got .*257'),
        ({'A': t(3, 4, 3)}, ValueError, r'^A must have shape .*\(2, 4, 3\), got \(3, 4, 3\)'),
        ({'A': t(1, 4, 3).expand(2**40, 4, 3)}, ValueError, r'^A must have shape \(k, d, n\)'),
        ({'A': -t(2, 4, 3)}, ValueError, r'^A must be negative .*got values up to 1'),
        ({'A': t(2, 4, 3).half()}, TypeError, r'^A must be torch.float32 .*float16'),
        ({'delta': t(2, 5, 3, 2, 4)}, ValueError, r'^delta must have shape \(b, h, w, k, r\)'),
        ({'delta_weight': None}, ValueError, r'^delta must have shape \(b, h, w, k, d\)'),
        ({'delta_weight': t(4, 1)}, ValueError, r'^delta_weight must have the axes \(k, d, r\)'),
        ({'delta_weight': t(2, 5, 1)}, ValueError, r'^delta_weight must have shape .*\(2, 4, 1\)'),
        ({'delta_weight': t(2, 4, 1).half()}, TypeError, r'^delta_weight must be torch.float32'),
        ({'B': t(2, 5, 3, 1, 3)}, ValueError, r'^B must have shape .*\(2, 5, 3, 2, 3\), got'),
        ({'C': None}, TypeError, r'^C must be a tensor, got NoneType'),
        ({'C': t(2, 5, 3, 2, 3).half()}, TypeError, r'^C must be torch.float32 \(as x\)'),
        ({'D': t(8)}, ValueError, r'^D must have shape \(k, d\) = \(2, 4\), got \(8,\)'),
        ({'delta_bias': t(2, 4).double()}, TypeError, r'^delta_bias must be torch.float32'),
        ({'D': t(2, 4, device='meta')}, ValueError, r'^all tensors .*: x is on cpu, D on meta'),
        ({'routes': 'rows'}, ValueError, r"^routes must be a sequence of .*got 'rows'"),
        ({'routes': ()}, ValueError, r'^routes must be a sequence of .*got \(\)'),
        ({'routes': ('rows', 'up')}, ValueError, r"^routes must be among .*got 'up'"),
        ({'routes': ('rows',)}, ValueError, r'^delta must have shape .*\(2, 5, 3, 1, 1\), got'),
        ({'discretization': 'euler'}, ValueError, r"^discretization must be one of .*'euler'"),
        ({'delta_softplus': 1}, TypeError, r'^delta_softplus must be True or False'),
        ({'backend': 'gpu'}, ValueError, r"^backend must be one of .*got 'gpu'"),
    ],
)
def test_cross_scan(changes, error, message):
    given = {
        'x': t(2, 5, 3, 4),
        'delta': t(2, 5, 3, 2, 1),
        'A': t(2, 4, 3),
        'B': t(2, 5, 3, 2, 3),
        'C': t(2, 5, 3, 2, 3),
        'delta_weight': t(2, 4, 1),
        'routes': ('rows', 'columns_reversed'),
    }
    with pytest.raises(error, match=message):
        cross_scan(**given | changes)


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        ({'x': t(2, 5)}, ValueError, r'^x must have the axes \(b, l, d\)'),
        ({'x': t(2, 5, 4, dtype=torch.int32)}, TypeError, r'^x must have one of the dtypes'),
        ({'weight': t(4, 1, 4)}, ValueError, r'^weight must have the axes \(d, w\)'),
        ({'weight': t(4, 5)}, ValueError, r'^weight must have a width in \(2, 3, 4\), .*\(4, 5\)'),
        ({'weight': t(3, 4)}, ValueError, r'^weight must have shape \(d, w\) = \(4, 4\)'),
        ({'weight': t(4, 4).half()}, TypeError, r'^weight must be torch.float32'),
        ({'bias': t(3)}, ValueError, r'^bias must have shape \(d\) = \(4,\), got \(3,\)'),
        ({'bias': t(4, device='meta')}, ValueError, r'x is on cpu, bias on meta'),
        ({'activation': 'relu'}, ValueError, r"^activation must be 'silu' or None, got 'relu'"),
        ({'mode': 'full'}, ValueError, r"^mode must be one of .*got 'full'"),
        (
            {'seq_idx': t(2, 4, dtype=torch.int32)},
            ValueError,
            r'^seq_idx must have .*\(2, 5\), got',
        ),
        ({'seq_idx': t(2, 5, dtype=torch.int64)}, TypeError, r'^seq_idx must be torch.int32'),
        ({'initial_state': t(2, 4, 4)}, ValueError, r'^initial_state must have .*\(2, 4, 3\)'),
        ({'initial_state': t(2, 4, 3).half()}, TypeError, r'^initial_state must be torch.float32'),
        ({'mode': 'same', 'return_last_state': True}, ValueError, r"^mode 'same' has no states"),
    ],
)
def test_causal_conv1d(changes, error, message):
    given = {'x': t(2, 5, 4), 'weight': t(4, 4), 'bias': t(4)} | changes
    with pytest.raises(error, match=message):
        causal_conv1d(**given)


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        ({'weight_b': t(4, 3)}, ValueError, r'^weight_b must have shape .*\(4, 4\), got \(4, 3\)'),
        ({'weight_f': t(3, 4)}, ValueError, r'^weight_f must have shape'),
        ({'bias_b': t(3)}, ValueError, r'^bias_b must have shape'),
        ({'activation': 'gelu'}, ValueError, r'^activation must be'),
    ],
)
def test_bidirectional_conv1d(changes, error, message):
    given = {'weight_f': t(4, 4), 'bias_f': None, 'weight_b': t(4, 4), 'bias_b': None} | changes
    with pytest.raises(error, match=message):
        bidirectional_conv1d(t(2, 5, 4), **given)


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        ({'x': t()}, ValueError, r'^x must have a last axis'),
        ({'x': t(2, 4, dtype=torch.int64)}, TypeError, r'^x must have one of the dtypes'),
        ({'weight': t(3)}, ValueError, r'^weight must have shape \(d\) = \(4,\), got \(3,\)'),
        ({'weight': t(4).double()}, TypeError, r'^weight must be torch.float32'),
        ({'residual': t(4)}, ValueError, r'^residual must have shape .*\(2, 4\), got \(4,\)'),
        ({'residual': t(2, 4).half()}, TypeError, r'^residual must be torch.float32'),
        ({'eps': -1.0}, ValueError, r'^eps must be 0 or more, got -1.0'),
        ({'eps': float('nan')}, ValueError, r'^eps must be 0 or more, got nan'),
    ],
)
def test_add_rms_norm(changes, error, message):
    given = {'x': t(2, 4), 'weight': t(4)} | changes
    with pytest.raises(error, match=message):
        add_rms_norm(**given)


class Looks(torch.overrides.TorchFunctionMode):
    """Counts comparisons."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.Tensor.__ge__ or function is torch.Tensor.ge
        return function(*args, **(kwargs or {}))


def test_values_of_A_are_looked_at_once_per_version():
    given = good()
    A = given['A']
    with Looks() as looks:
        selective_scan(**given)
        assert looks.count == 1
        selective_scan(**given)
        assert looks.count == 1
        with torch.no_grad():
            A.mul_(0.5)
        selective_scan(**given)
        assert looks.count == 2
        selective_scan(**(given | {'A': -torch.exp(torch.zeros(4, 3))}), check_values=False)
        assert looks.count == 2
    with torch.no_grad():
        A.neg_()
    with pytest.raises(ValueError, match=r'^A must be negative'):
        selective_scan(**given)


def test_values_of_A_in_inference_mode():
    with torch.inference_mode():
        given = good()
        selective_scan(**given)
        given['A'].neg_()
        with pytest.raises(ValueError, match=r'^A must be negative'):
            selective_scan(**given)
