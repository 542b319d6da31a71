"""Functions of Mamba-2, against loops over time."""

import loops
import pytest
import torch
import torch.nn.functional as F
from mamba_ssm.ops.triton import layernorm_gated
from mamba_ssm.ops.triton.ssd_combined import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)

SIZE = dict(b=2, length=7, h=4, p=3, g=2, n=5)


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def tensors(b, length, h, p, g, n):
    shapes = dict(
        x=(b, length, h, p),
        dt=(b, length, h),
        A=(h,),
        B=(b, length, g, n),
        C=(b, length, g, n),
        D=(h, p),
        z=(b, length, h, p),
        dt_bias=(h,),
        initial_states=(b, h, p, n),
    )
    drawn = {k: draw(*shape, seed=i) for i, (k, shape) in enumerate(shapes.items())}
    drawn['A'] = -drawn['A'].exp()
    return {k: v.requires_grad_() for k, v in drawn.items()}


def loop(x, dt, A, B, C, D, z, dt_bias, initial_states, softplus, limit):
    """One step after the other."""
    h, g = x.shape[2], B.shape[2]
    B, C = (v.repeat_interleave(h // g, 2) for v in (B, C))
    step = dt if dt_bias is None else dt + dt_bias
    step = (F.softplus(step) if softplus else step).clamp(*limit)
    state, rows = initial_states, []
    for t in range(x.shape[1]):
        s = step[:, t, :, None, None]
        new = s * x[:, t, :, :, None] * B[:, t, :, None]
        state = torch.exp(s * A[:, None, None]) * state + new
        y = (state * C[:, t, :, None]).sum(-1) + (D if D.dim() == 2 else D[:, None]) * x[:, t]
        rows.append(y if z is None else y * F.silu(z[:, t]))
    return torch.stack(rows, 1), state


@pytest.mark.parametrize('limit', [(0.0, float('inf')), (0.3, 1.5)])
@pytest.mark.parametrize('softplus', [True, False])
def test_scan(limit, softplus):
    t = tensors(**SIZE)
    want, state = loop(**t, softplus=softplus, limit=limit)
    out, last = mamba_chunk_scan_combined(
        **t, chunk_size=4, dt_softplus=softplus, dt_limit=limit, return_final_states=True
    )
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(last, state)
    # By position, as in mamba_ssm 2.0.
    x, dt, A, B, C, *rest = t.values()
    old = mamba_chunk_scan_combined(x, dt, A, B, C, 4, *rest, None, softplus, limit, True)
    torch.testing.assert_close(old, (want, state))
    weight = draw(*want.shape, seed=9)
    for one, two in zip(
        torch.autograd.grad((out * weight).sum() + last.sum(), list(t.values())),
        torch.autograd.grad((want * weight).sum() + state.sum(), list(t.values())),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize('dt_dtype', [torch.bfloat16, torch.float32])
def test_scan_in_half_precision(dt_dtype):
    t = {k: v.detach() for k, v in tensors(**SIZE).items()}
    t['D'] = t['D'][:, 0]
    half = {k: v.to(torch.bfloat16 if k in 'xBCz' else torch.float32) for k, v in t.items()}
    half['dt'] = half['dt'].to(dt_dtype)
    out = mamba_chunk_scan_combined(**half, chunk_size=4, dt_softplus=True)
    assert out.dtype == torch.bfloat16
    wide = {k: v.double() for k, v in half.items()}
    want, _ = loop(**wide, softplus=True, limit=(0.0, float('inf')))
    torch.testing.assert_close(out.double(), want, rtol=3e-2, atol=3e-2)


def gated(x, weight, bias, z, eps, size, before, is_rms):
    x = x if before else x * F.silu(z)
    groups = x.unflatten(-1, (-1, size))
    groups = groups if is_rms else groups - groups.mean(-1, keepdim=True)
    out = groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()
    out = out.flatten(-2) * weight + (0 if bias is None else bias)
    return out * F.silu(z) if before else out


@pytest.mark.parametrize('before', [True, False])
@pytest.mark.parametrize('mlp', [0, 2])
def test_mixer(before, mlp):
    b, length, h, p, g, n = SIZE.values()
    d, mixed = h * p, h * p + 2 * g * n
    inputs = [
        draw(b, length, 2 * mlp + d + mixed + h, seed=1),
        draw(mixed, 4, seed=2),
        draw(mixed, seed=3),
        draw(h, seed=4),
        -draw(h, seed=5).exp(),
        draw(h, seed=6),
        draw(d, seed=7),
        draw(8, mlp + d, seed=8),
    ]
    zxbcdt, weight, bias, dt_bias, A, D, norm, projection = (t.requires_grad_() for t in inputs)
    head, z, conv, dt = zxbcdt.split((2 * mlp, d, mixed, h), 2)
    conv = loops.conv(conv.transpose(1, 2), weight, bias, silu=True).transpose(1, 2)
    x, B, C = conv.split((d, g * n, g * n), 2)
    y, state = loop(
        x.unflatten(2, (h, p)),
        dt,
        A,
        B.unflatten(2, (g, n)),
        C.unflatten(2, (g, n)),
        D,
        None,
        dt_bias,
        torch.zeros(b, h, p, n, dtype=torch.float64),
        True,
        (0.0, float('inf')),
    )
    y = gated(y.flatten(2), norm, None, z, 1e-4, d // g, before, True)
    gate, value = head.chunk(2, 2)
    want = torch.cat([F.silu(gate) * value, y], 2) @ projection.t()
    out, last = mamba_split_conv1d_scan_combined(
        zxbcdt,
        weight,
        bias,
        dt_bias,
        A,
        D,
        4,
        return_final_states=True,
        rmsnorm_weight=norm,
        rmsnorm_eps=1e-4,
        outproj_weight=projection,
        headdim=p,
        ngroups=g,
        norm_before_gate=before,
    )
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(last, state)
    for one, two in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(want.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize('before', [True, False])
@pytest.mark.parametrize('kind', ['LayerNorm', 'RMSNorm'])
def test_gated_norms(before, kind):
    module = getattr(layernorm_gated, kind)
    norm = module(6, eps=1e-4, group_size=3, norm_before_gate=before, dtype=torch.float64)
    assert set(norm.state_dict()) == ({'weight', 'bias'} if kind == 'LayerNorm' else {'weight'})
    x, z = draw(2, 6).requires_grad_(), draw(2, 6, seed=1).requires_grad_()
    want = gated(x, norm.weight, norm.bias, z, 1e-4, 3, before, kind == 'RMSNorm')
    torch.testing.assert_close(norm(x, z), want)
    function = layernorm_gated.rmsnorm_fn if kind == 'RMSNorm' else layernorm_gated.layernorm_fn
    got = function(x, norm.weight, norm.bias, z, 1e-4, 3, before)
    torch.testing.assert_close(got, want)
    for one, two in zip(
        torch.autograd.grad(got.square().sum(), (x, z)),
        torch.autograd.grad(want.square().sum(), (x, z)),
        strict=True,
    ):
        torch.testing.assert_close(one, two)
    assert norm(x).shape == (2, 6)


@pytest.mark.parametrize('dtype', [torch.int32, torch.int64])
def test_packed_sequences(dtype):
    t = tensors(**SIZE)
    seq_idx = torch.tensor([[0] * 3 + [1] * 4] * 2, dtype=dtype)
    options = {'dt_softplus': True, 'chunk_size': 4, 'return_final_states': True}
    out, last = mamba_chunk_scan_combined(**t, **options, seq_idx=seq_idx)
    outputs, state = [], t['initial_states']
    for part in (slice(3), slice(3, None)):
        inputs = {k: v[:, part] if k in ('x', 'dt', 'B', 'C', 'z') else v for k, v in t.items()}
        y, end = mamba_chunk_scan_combined(**inputs | {'initial_states': state}, **options)
        outputs.append(y)
        state = None
    torch.testing.assert_close(out, torch.cat(outputs, 1))
    torch.testing.assert_close(last, end)


def test_bad_arguments_are_named():
    t = {k: v.detach() for k, v in tensors(**SIZE).items()}

    def scan(**changed):
        return lambda: mamba_chunk_scan_combined(**t | changed, chunk_size=4)

    for call, message in (
        (scan(dt=t['dt'][..., 1:]), r'dt must have shape \(b, l, h\)'),
        (scan(B=t['B'].repeat(1, 1, 2, 1)[:, :, :3]), 'groups of B must divide h = 4, got 3'),
        (scan(D=t['D'][1:]), 'D must have shape'),
        (scan(cu_seqlens=t['A']), 'cu_seqlens is not supported'),
        (lambda: mamba_split_conv1d_scan_combined(*[t['dt']] * 5, t['A'], 4), 'headdim is'),
        (
            lambda: mamba_split_conv1d_scan_combined(
                t['dt'], draw(9, 4), None, *[t['A']] * 3, 4, headdim=3
            ),
            'zxbcdt must have 2m',
        ),
        (lambda: layernorm_gated.RMSNorm(6, group_size=4)(draw(2, 6)), 'group_size must divide'),
    ):
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
            call()
