"""Several sequences in one row give what each gives alone, in every layer that mixes along it."""

import pytest
import torch
from torch.testing import assert_close

from mmvim.layers import BiMamba, Mamba, MambaBlock, MambaStack

LENGTHS = (5, 1, 9, 2)
LAYERS = {
    'mamba': lambda **kw: Mamba(8, d_state=4, **kw),
    'mamba-reverse': lambda **kw: Mamba(8, d_state=4, reverse=True, discretization='tustin', **kw),
    'v1': lambda **kw: BiMamba(8, d_state=4, bimamba='v1', **kw),
    'v2': lambda **kw: BiMamba(8, d_state=4, d_conv=3, discretization='foh_hold', **kw),
    'v2-reverse': lambda **kw: BiMamba(8, d_state=4, reverse=True, **kw),
    'block': lambda **kw: MambaBlock(8, bidirectional='v2', **kw),
    'stack': lambda **kw: MambaStack(8, 2, bidirectional='v2', residual_in_fp32=False, **kw),
}


def seq_idx_of(lengths):
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).int()[None]


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize('backend', ['torch', 'auto'])
@pytest.mark.parametrize('name', LAYERS)
def test_packed_equals_alone(name, backend):
    layer = LAYERS[name](ops_backend=backend, dtype=torch.float64)
    # Parameters that are kept in float32 elsewhere.
    layer = layer.double()
    x = torch.randn(1, sum(LENGTHS), 8, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    packed = first(layer(x, seq_idx=seq_idx_of(LENGTHS)))
    alone = torch.cat([first(layer(part)) for part in x.split(LENGTHS, dim=1)], 1)
    assert_close(packed, alone)
    weights = torch.randn_like(packed)
    for one, two in zip(
        torch.autograd.grad((packed * weights).sum(), leaves),
        torch.autograd.grad((alone * weights).sum(), leaves),
        strict=True,
    ):
        assert_close(one, two)


@pytest.mark.parametrize('reverse', [False, True])
def test_states_are_those_of_the_first_and_the_last_sequence(reverse):
    layer = Mamba(8, d_state=4, reverse=reverse)
    x = torch.randn(1, sum(LENGTHS), 8)
    _, before = layer(torch.randn(1, 3, 8), return_state=True)
    out, state = layer(x, before, return_state=True, seq_idx=seq_idx_of(LENGTHS))
    parts = list(x.split(LENGTHS, dim=1))
    parts = parts[::-1] if reverse else parts
    expected, _ = layer(parts[0], before, return_state=True)
    span = slice(-LENGTHS[-1], None) if reverse else slice(LENGTHS[0])
    assert_close(out[:, span], expected)
    _, last = layer(parts[-1], return_state=True)
    for one, two in zip(state, last, strict=True):
        assert_close(one, two)


def test_stack_with_states():
    stack = MambaStack(8, n_layers=2, d_state=4)
    x = torch.randn(1, sum(LENGTHS), 8)
    out, states = stack(x, return_state=True, seq_idx=seq_idx_of(LENGTHS))
    *_, tail = x.split(LENGTHS, dim=1)
    expected, last = stack(tail, return_state=True)
    assert_close(out[:, -LENGTHS[-1] :], expected)
    for one, two in zip(states, last, strict=True):
        for a, b in zip(one, two, strict=True):
            assert_close(a, b)


def test_a_change_reaches_its_own_sequence_alone():
    layer = BiMamba(8, d_state=4)
    x = torch.randn(1, sum(LENGTHS), 8)
    other = x.clone()
    other[:, 7] += 1
    seq_idx = seq_idx_of(LENGTHS)
    changed = (layer(x, seq_idx) != layer(other, seq_idx)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == list(range(6, 15))
