"""The borrowed signatures, against loops written from those packages' documentation."""

import pytest
import torch
from ops_support import gradients, need, randn, scan_inputs

from mmvim.ops import (
    SelectiveScanCuda,
    causal_conv1d_fn,
    causal_conv1d_update,
    reference,
    selective_scan_fn,
)

B, D, L, N = 2, 6, 11, 3


def channels_first(x):
    return x.transpose(1, 2).contiguous()


def mamba_inputs(b_form, c_form, dtype=torch.float64, device='cpu'):
    tensors = scan_inputs(B, L, D, N, 2, dtype=dtype, device=device)
    for name in ('u', 'delta', 'z'):
        tensors[name] = channels_first(tensors[name])
    for i, (name, form) in enumerate((('B', b_form), ('C', c_form))):
        shape = {'constant': (D, N), 'plain': (B, N, L), 'grouped': (B, 2, N, L)}[form]
        kind = tensors['A'].dtype if form == 'constant' else dtype
        tensors[name] = randn(*shape, seed=20 + i, dtype=kind, device=device)
    return tensors


def naive_selective_scan(u, delta, A, B, C, D, z, delta_bias):
    """One channel, batch row and step at a time, every shape of B and C written out."""

    def at(matrix, row, channel, t):
        if matrix.dim() == 2:
            return matrix[channel]
        if matrix.dim() == 3:
            return matrix[row, :, t]
        return matrix[row, channel // (u.shape[1] // matrix.shape[1]), :, t]

    rows, last = [], []
    for row in range(u.shape[0]):
        channels, ends = [], []
        for channel in range(u.shape[1]):
            h, y = torch.zeros_like(A[0]), []
            for t in range(u.shape[2]):
                step = torch.log1p(torch.exp(delta[row, channel, t] + delta_bias[channel]))
                x = u[row, channel, t]
                h = torch.exp(step * A[channel]) * h + step * at(B, row, channel, t) * x
                out = (at(C, row, channel, t) * h).sum() + D[channel] * x
                gate = z[row, channel, t]
                y.append(out * gate / (1 + torch.exp(-gate)))
            channels.append(torch.stack(y))
            ends.append(h)
        rows.append(torch.stack(channels))
        last.append(torch.stack(ends))
    return torch.stack(rows), torch.stack(last)


FORMS = [
    (b, c)
    for b in ('constant', 'plain', 'grouped')
    for c in ('constant', 'plain', 'grouped')
    if {b, c} != {'plain', 'grouped'}
]


@pytest.mark.parametrize('forms', FORMS)
def test_selective_scan_fn(backend, device, forms):
    need(backend, 'selective_scan', device, torch.float64)
    tensors = {k: v.requires_grad_() for k, v in mamba_inputs(*forms, device=device).items()}
    outputs = selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)
    exact = {k: v.detach().cpu().requires_grad_() for k, v in tensors.items()}
    expected = naive_selective_scan(**exact)
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want)
    got, want = (gradients(o, list(i.values())) for o, i in ((outputs, tensors), (expected, exact)))
    for name, one, two in zip(tensors, got, want, strict=True):
        torch.testing.assert_close(one.cpu(), two, msg=lambda m, n=name: f'{n}: {m}')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('form', ['plain', 'constant'])
def test_selective_scan_fn_dtypes(backend, device, dtype, form):
    need(backend, 'selective_scan', device, dtype, torch.float32)
    tensors = mamba_inputs(form, form, dtype, device)
    out, last = selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)
    assert (out.dtype, out.shape) == (dtype, (B, D, L))
    assert (last.dtype, last.shape) == (torch.float32, (B, D, N))
    expected, _ = naive_selective_scan(**{k: v.cpu().double() for k, v in tensors.items()})
    tolerance = 8 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=tolerance)


def test_selective_scan_fn_positional_and_bare():
    tensors = mamba_inputs('plain', 'plain')
    u, delta, A, B_, C = (tensors[k] for k in ('u', 'delta', 'A', 'B', 'C'))
    delta = delta.abs()
    got = selective_scan_fn(u, delta, A, B_, C, None, None, None, False, False)
    matrices = (x.transpose(1, 2) for x in (B_, C))
    want, _ = reference.selective_scan(u.transpose(1, 2), delta.transpose(1, 2), A, *matrices)
    torch.testing.assert_close(got, want.transpose(1, 2))


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        (
            {'A': torch.zeros(D, N, dtype=torch.complex64)},
            TypeError,
            r'^A must be real, .*complex64',
        ),
        ({'B': torch.zeros(B, N, L, dtype=torch.complex64)}, TypeError, r'^B must be real'),
        ({'B': torch.zeros(B, N, L + 1)}, ValueError, r'^B must have shape \(b, g, n, l\)'),
        ({'B': torch.zeros(N)}, ValueError, r'^B must have the axes \(d, n\), \(b, n, l\) or'),
        ({'C': torch.zeros(N, D)}, ValueError, r'^C must have shape \(d, n\)'),
        ({'C': torch.zeros(B, 4, N, L)}, ValueError, r'^the number of groups of C must divide'),
        ({'delta': torch.zeros(B, L, D)}, ValueError, r'^delta must have shape \(b, d, l\)'),
        ({'u': torch.zeros(B, D)}, ValueError, r'^u must have the axes \(b, d, l\)'),
        ({'A': torch.ones(D, N)}, ValueError, r'^A must be negative'),
        ({'A': torch.tensor(-1.0)}, ValueError, r'A must have the axes'),
        ({'delta': None}, TypeError, r'^delta must be'),
    ],
)
def test_selective_scan_fn_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        selective_scan_fn(**(mamba_inputs('plain', 'plain', torch.float32) | changes))


def conv_inputs(device, width=4, dtype=torch.float64, length=9):
    return (
        randn(B, D, length, seed=1, dtype=dtype, device=device),
        randn(D, width, seed=2, dtype=dtype, device=device),
        randn(D, seed=3, dtype=dtype, device=device),
        randn(B, D, width - 1, seed=4, dtype=dtype, device=device),
    )


def naive_conv(x, weight, bias, history, activation):
    """Output and all inputs, one step at a time."""
    width = weight.shape[1]
    x = torch.cat((history, x), -1)
    steps = [
        (x[..., t : t + width] * weight).sum(-1) + bias for t in range(x.shape[-1] - width + 1)
    ]
    out = torch.stack(steps, -1)
    return (out / (1 + torch.exp(-out)) if activation else out), x


@pytest.mark.parametrize('activation', [None, 'silu', 'swish'])
@pytest.mark.parametrize('width', [2, 3, 4])
def test_causal_conv1d_fn(backend, device, width, activation):
    need(backend, 'causal_conv1d', device, torch.float64)
    tensors = [x.requires_grad_() for x in conv_inputs(device, width)]
    x, weight, bias, state = tensors
    outputs = causal_conv1d_fn(
        x, weight, bias, initial_states=state, return_final_states=True, activation=activation
    )
    exact = [x.detach().cpu().requires_grad_() for x in tensors]
    want, inputs = naive_conv(*exact, activation)
    expected = (want, inputs[..., 1 - width :])
    got = (*outputs, *gradients(outputs, tensors))
    for one, two in zip(got, (*expected, *gradients(expected, exact)), strict=True):
        torch.testing.assert_close(one.cpu(), two)
    zeros = torch.zeros_like(exact[3])
    plain = causal_conv1d_fn(x, weight, bias, None, None, False, None, activation)
    torch.testing.assert_close(plain.cpu(), naive_conv(*exact[:3], zeros, activation)[0])


def test_causal_conv1d_fn_with_sequences_and_padding():
    x, weight, bias, _ = conv_inputs('cpu')
    x = x.requires_grad_()
    seq_idx = torch.tensor([[0] * 2 + [1] * 6 + [-1]] * x.shape[0], dtype=torch.int32)
    out = causal_conv1d_fn(x, weight, bias, seq_idx, activation='silu')
    pieces = [causal_conv1d_fn(x[..., part], weight, bias, activation='silu')
              for part in (slice(2), slice(2, 8))]  # fmt: skip
    torch.testing.assert_close(out, torch.cat((*pieces, torch.zeros_like(x[..., :1])), -1))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not grad[..., -1].any()


def test_selective_scan_fn_with_sequences():
    tensors = mamba_inputs('plain', 'plain')
    seq_idx = torch.tensor([[0] * 4 + [1] * (L - 4)] * B, dtype=torch.int32)
    pieces = [
        selective_scan_fn(**{k: v[..., part] if v.dim() == 3 else v for k, v in tensors.items()})
        for part in (slice(4), slice(4, None))
    ]
    torch.testing.assert_close(selective_scan_fn(**tensors, seq_idx=seq_idx), torch.cat(pieces, -1))


def test_causal_conv1d_fn_writes_final_states():
    x, weight, bias, state = conv_inputs('cpu')
    target = torch.full_like(state, float('nan'))
    _, final = causal_conv1d_fn(x, weight, bias, return_final_states=True, final_states_out=target)
    assert final is target
    assert torch.equal(target, x[..., -3:])


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        ({'seq_idx': torch.zeros(B, 9)}, TypeError, 'seq_idx must be torch.int32'),
        ({'final_states_out': torch.zeros(B, D, 3)}, ValueError, 'needs return_final_states'),
        ({'activation': 'gelu'}, ValueError, "activation must be None, 'silu' or 'swish', got"),
        (
            {'weight': torch.zeros(D, 0), 'initial_states': torch.zeros(B, D, 3)},
            ValueError,
            r'weight must have a width in \(2, 3, 4\), got shape \(6, 0\)',
        ),
        (
            {'return_final_states': True, 'final_states_out': [0.0]},
            TypeError,
            'final_states_out must be a tensor, got list',
        ),
        (
            {'return_final_states': True, 'final_states_out': torch.zeros(B, D, 4)},
            ValueError,
            'final_states_out must have shape',
        ),
    ],
)
def test_causal_conv1d_fn_bad_input(options, error, message):
    x, weight, bias, _ = conv_inputs('cpu')
    with pytest.raises(error, match=message):
        causal_conv1d_fn(**{'x': x, 'weight': weight, 'bias': bias} | options)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('size', [3, 4, 7])
@pytest.mark.parametrize('activation', [None, 'silu'])
def test_causal_conv1d_update_step_by_step(backend, device, dtype, size, activation):
    need(backend, 'causal_conv1d', device, dtype)
    x, weight, bias, _ = conv_inputs(device, dtype=dtype)
    state = randn(B, D, size, seed=5, dtype=dtype, device=device)
    exact = [v.cpu().double() for v in (x, weight, bias, state[..., -3:])]
    want, _ = naive_conv(*exact, activation)
    history = torch.cat((state, x), -1)
    tolerance = 4 * torch.finfo(dtype).eps * want.abs().max().item()
    for t in range(x.shape[-1]):
        out = causal_conv1d_update(x[..., t], state, weight, bias, activation)
        assert (out.shape, out.dtype) == ((B, D), dtype)
        torch.testing.assert_close(out.cpu().double(), want[..., t], rtol=0, atol=tolerance)
        assert torch.equal(state, history[..., t + 1 : t + 1 + size])


@pytest.mark.parametrize('length', [1, 2, 5, 9])
def test_causal_conv1d_update_of_several_steps(length):
    x, weight, bias, _ = conv_inputs('cpu', length=length)
    state = randn(B, D, 6, seed=5)
    want, _ = naive_conv(x, weight, bias, state[..., -3:], 'silu')
    history = torch.cat((state, x), -1)
    out = causal_conv1d_update(x, state, weight, bias, 'silu')
    torch.testing.assert_close(out, want)
    assert torch.equal(state, history[..., -6:])


@pytest.mark.parametrize('steps', [1, 2, 8])
@pytest.mark.parametrize('size', [3, 5])
def test_causal_conv1d_update_in_a_ring(size, steps):
    """Every row writes at a place of its own; reading back gives the convolution."""
    length = 8
    x, weight, bias, history = conv_inputs('cpu', length=length)
    want, _ = naive_conv(x, weight, bias, history, 'silu')
    seen = torch.tensor([3, 10], dtype=torch.int32)
    ring = torch.zeros(B, D, size, dtype=x.dtype)
    for row in range(B):
        for k in range(3):
            ring[row, :, (int(seen[row]) - 3 + k) % size] = history[row, :, k]
    for t in range(0, length, steps):
        piece = x[..., t : t + steps]
        out = causal_conv1d_update(piece, ring, weight, bias, 'silu', cache_seqlens=seen + t)
        torch.testing.assert_close(out, want[..., t : t + steps])
        for row in range(B):
            # Of more inputs than places the last ones stay.
            for k in range(max(0, steps - size), steps):
                place = (int(seen[row]) + t + k) % size
                assert torch.equal(ring[row, :, place], piece[row, :, k])


def test_causal_conv1d_update_of_chosen_rows():
    x, weight, bias, _ = conv_inputs('cpu')
    pool = randn(5, D, 3, seed=5)
    before = pool.clone()
    rows = torch.tensor([4, 1], dtype=torch.int32)
    want, _ = naive_conv(x[..., :1], weight, bias, pool[rows.long()], None)
    out = causal_conv1d_update(x[..., 0], pool, weight, bias, conv_state_indices=rows)
    torch.testing.assert_close(out, want[..., 0])
    assert torch.equal(pool[[0, 2, 3]], before[[0, 2, 3]])
    assert torch.equal(pool[[4, 1]][..., -1], x[..., 0])


@pytest.mark.parametrize('rows', [[-1, 4, -1, 1], [-1, -1, -1, -1], []])
@pytest.mark.parametrize('ring', [False, True])
def test_causal_conv1d_update_of_padding(rows, ring):
    """Negative rows: no output, no state; those in use are as without them."""
    _, weight, bias, _ = conv_inputs('cpu')
    x = randn(len(rows), D, 2, seed=6).requires_grad_()
    pool, seen = randn(5, D, 4, seed=5), torch.arange(len(rows)) if ring else None
    want_pool, rows = pool.clone(), torch.tensor(rows, dtype=torch.int32)
    used = rows >= 0
    want = torch.zeros_like(x)
    want[used] = causal_conv1d_update(
        x[used],
        want_pool,
        weight,
        bias,
        'silu',
        seen if seen is None else seen[used],
        rows[used],
    )
    out = causal_conv1d_update(x, pool, weight, bias, 'silu', seen, rows)
    torch.testing.assert_close(out, want)
    assert torch.equal(pool, want_pool)
    out.sum().backward()
    assert not x.grad[~used].any()


def test_causal_conv1d_update_gives_gradients():
    x, weight, bias, state = conv_inputs('cpu', length=1)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    out = causal_conv1d_update(x, state, weight, bias, 'silu')
    out.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert not state.requires_grad


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        ({'conv_state': torch.zeros(B, D, 2)}, ValueError, 'must hold at least w-1 = 3 inputs'),
        ({'conv_state': torch.zeros(B, D + 1, 3)}, ValueError, 'conv_state must have shape'),
        ({'conv_state': torch.zeros(B, D, 3) + 0j}, TypeError, 'conv_state must be torch.float32'),
        ({'cache_seqlens': torch.zeros(B)}, TypeError, 'cache_seqlens must be torch.int32 or'),
        ({'conv_state_indices': torch.zeros(3).int()}, ValueError, 'conv_state_indices must have'),
        ({'conv_state_indices': torch.arange(B) + 1}, ValueError, 'must be rows of conv_state'),
        (
            {'conv_state': torch.zeros(0, D, 3), 'conv_state_indices': torch.arange(B)},
            ValueError,
            'conv_state_indices must be rows of conv_state, which has 0',
        ),
        ({'activation': 'relu'}, ValueError, 'activation must be'),
        (
            {'weight': torch.zeros(D, 0), 'cache_seqlens': torch.zeros(B).int()},
            ValueError,
            r'weight must have a width in \(2, 3, 4\), got shape \(6, 0\)',
        ),
        (
            # A width that wants no state beside a state of no inputs.
            {
                'weight': torch.zeros(D, 1),
                'conv_state': torch.zeros(B, D, 0),
                'cache_seqlens': torch.zeros(B).int(),
            },
            ValueError,
            'weight must have a width in',
        ),
    ],
)
def test_causal_conv1d_update_bad_input(options, error, message):
    x, weight, bias, state = (v.float() for v in conv_inputs('cpu'))
    given = {'x': x[..., 0], 'conv_state': state, 'weight': weight, 'bias': bias} | options
    with pytest.raises(error, match=message):
        causal_conv1d_update(**given)


def windows_inputs(device, dtype, n):
    tensors = scan_inputs(B, L, D, n, dtype=dtype, device=device)
    tensors['delta'] = tensors['delta'].abs()
    names = ('u', 'delta', 'A', 'B', 'C', 'D')
    # There all tensors have one dtype, A included.
    return [tensors[k].to(dtype) for k in names]


@pytest.mark.parametrize('n', [1, 16, 17])
@pytest.mark.parametrize('with_state', [False, True])
def test_selective_scan_cuda(backend, device, n, with_state):
    need(backend, 'selective_scan', device, torch.float64)
    tensors = [x.requires_grad_() for x in windows_inputs(device, torch.float64, n)]
    if with_state:
        tensors.append(randn(B, D, n, seed=9, device=device).requires_grad_())
    module = SelectiveScanCuda()
    outputs = module.forward_with_state(*tensors)
    exact = [x.detach().cpu().requires_grad_() for x in tensors]
    expected = reference.selective_scan(*exact[:6], initial_state=exact[6] if with_state else None)
    got = (*outputs, *gradients(outputs, tensors))
    for one, two in zip(got, (*expected, *gradients(expected, exact)), strict=True):
        torch.testing.assert_close(one.cpu(), two)
    assert torch.equal(module(*tensors), outputs[0])


def test_selective_scan_cuda_in_chunks(backend, device):
    """The purpose of that package: a long sequence in pieces, in half precision."""
    need(backend, 'selective_scan', device, torch.float16)
    tensors = windows_inputs(device, torch.float16, 16)
    module = SelectiveScanCuda()
    whole, last = module.forward_with_state(*tensors)
    assert whole.dtype == torch.float16
    state, pieces = None, []
    for start in range(0, L, 4):
        u, delta, B_, C = (tensors[i][:, start : start + 4] for i in (0, 1, 3, 4))
        out, state = module.forward_with_state(u, delta, tensors[2], B_, C, tensors[5], state)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-6)
