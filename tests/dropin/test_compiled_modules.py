"""Signatures, results and gradients of the modules that replace compiled ones."""

import causal_conv1d_cuda
import loops
import pytest
import selective_scan
import selective_scan_cuda
import selective_scan_cuda_core
import selective_scan_cuda_ndstate
import selective_scan_cuda_nrow
import selective_scan_cuda_oflex
import selective_scan_cuda_oflex_rh
import torch

TOLERANCE = {
    torch.float64: dict(rtol=1e-9, atol=1e-10),
    torch.float32: dict(rtol=2e-4, atol=2e-4),
    torch.bfloat16: dict(rtol=4e-2, atol=8e-2),
}


def close(got, want, dtype):
    torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def scan_inputs(dtype, form='groups', optional=True, b=2, d=6, length=11, n=3):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    matrix = {'groups': (b, 2, n, length), 'plain': (b, n, length), 'constant': (d, n)}[form]
    matrix_dtype = wide if form == 'constant' else dtype
    inputs = dict(
        u=draw(b, d, length, seed=1, dtype=dtype),
        delta=draw(b, d, length, seed=2, dtype=dtype),
        A=-draw(d, n, seed=3).exp().to(wide),
        B=draw(*matrix, seed=4, dtype=matrix_dtype),
        C=draw(*matrix, seed=5, dtype=matrix_dtype),
        D=draw(d, seed=6, dtype=wide) if optional else None,
        z=draw(b, d, length, seed=7, dtype=dtype) if optional else None,
        delta_bias=draw(d, seed=8, dtype=wide) if optional else None,
    )
    exact = {k: None if v is None else v.double().requires_grad_() for k, v in inputs.items()}
    return inputs, exact


def exact_gradients(out, exact, dout):
    given = {k: v for k, v in exact.items() if v is not None}
    grads = torch.autograd.grad(out, list(given.values()), dout.double())
    return dict(zip(given, grads, strict=True))


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('form', ['groups', 'plain', 'constant'])
@pytest.mark.parametrize('optional', [True, False])
def test_scan(dtype, form, optional):
    inputs, exact = scan_inputs(dtype, form, optional)
    u, delta, A, B, C, D, z, bias = inputs.values()
    gated, y, last = loops.scan(*exact.values(), softplus=True)
    out, x, *rest = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True)
    close(out, y, dtype)
    close(x[:, :, -1, 1::2], last, dtype)
    assert out.is_contiguous()
    assert out.dtype == dtype
    assert x.shape == (2, 6, 1, 6)
    assert len(rest) == (z is not None)
    if z is not None:
        close(rest[0], gated, dtype)

    dout = draw(*u.shape, seed=9, dtype=dtype)
    results = selective_scan_cuda.bwd(
        u, delta, A, B, C, D, z, bias, dout, x, out, None, True, z is not None
    )
    truth = exact_gradients(gated, exact, dout)
    names = ['u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias']
    for name, grad in zip(names, results[:7], strict=True):
        if inputs[name] is None:
            assert grad is None
            continue
        assert grad.shape == inputs[name].shape
        assert grad.dtype == inputs[name].dtype
        if dtype != torch.bfloat16 or name in ('u', 'delta'):
            close(grad, truth[name], dtype)
        else:
            assert (grad.double() - truth[name]).norm() < 0.05 * truth[name].norm()
    if z is None:
        assert len(results) == 7
    else:
        close(results[7], truth['z'], dtype)
        close(results[8], gated, dtype)


def test_scan_writes_the_gradient_of_the_gate():
    inputs, _ = scan_inputs(torch.float32)
    u, delta, A, B, C, D, z, bias = inputs.values()
    dxz = torch.zeros(2, 12, 11)
    dz = dxz[:, 6:]
    arguments = (u, delta, A, B, C, D, z, bias, torch.ones_like(u), None, None)
    results = selective_scan_cuda.bwd(*arguments, dz, True, False)
    assert results[7] is dz
    torch.testing.assert_close(
        dxz[:, 6:], selective_scan_cuda.bwd(*arguments, None, True, False)[7]
    )
    assert not dxz[:, :6].any()
    assert len(results) == 8


def test_intermediate_states_have_a_row_for_each_2048_steps():
    inputs, _ = scan_inputs(torch.float32, b=1, d=2, length=2049, n=1, optional=False)
    out, x = selective_scan_cuda_core.fwd(*list(inputs.values())[:5], None, None, True, 1)
    assert x.shape == (1, 2, 2, 2)
    assert out.shape == (1, 2, 2049)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('module', ['core', 'oflex', 'oflex float'])
def test_scans_of_vmamba(dtype, module):
    inputs, exact = scan_inputs(dtype)
    u, delta, A, B, C, D, _, bias = inputs.values()
    _, y, _ = loops.scan(*exact.values(), softplus=True)
    core = module == 'core'
    functions = selective_scan_cuda_core if core else selective_scan_cuda_oflex
    flag = () if core else (module == 'oflex float',)
    out, x, *rest = functions.fwd(u, delta, A, B, C, D, bias, True, 1, *flag)
    assert not rest
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == (wide if module == 'oflex float' else dtype)
    # A float32 output of bfloat16 inputs is not rounded.
    close(out, y, out.dtype)
    dout = draw(*u.shape, seed=9, dtype=out.dtype)
    results = functions.bwd(u, delta, A, B, C, D, bias, dout, x, True, 1)
    exact.pop('z')
    truth = exact_gradients(y, exact, dout)
    assert len(results) == 7
    for name, grad in zip(['u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias'], results, strict=True):
        assert grad.dtype == inputs[name].dtype
        # Nothing is rounded on the way from a float32 output to a float32 gradient.
        bound = 1e-4 if grad.dtype == out.dtype == wide else 0.02
        assert (grad.double() - truth[name]).norm() <= bound * truth[name].norm()


def test_scans_of_one_state_and_of_several_rows():
    inputs, _ = scan_inputs(torch.float32, n=1)
    u, delta, A, B, C, D, _, bias = inputs.values()
    rest = (D, bias, True)
    want, x = selective_scan_cuda_core.fwd(u, delta, A, B, C, *rest, 1)
    grads = selective_scan_cuda_core.bwd(u, delta, A, B, C, D, bias, want, x, True, 1)
    rows = selective_scan_cuda_nrow.fwd(u, delta, A, B, C, *rest, 3)
    torch.testing.assert_close(rows, [want, x])
    flat = u, delta, A.squeeze(1), B.squeeze(2), C.squeeze(2)
    torch.testing.assert_close(selective_scan_cuda_ndstate.fwd(*flat, *rest, 1), [want, x])
    results = selective_scan_cuda_ndstate.bwd(*flat, D, bias, want, x, True, 1)
    for got, true, given in zip(results, grads, (*flat, D, bias), strict=True):
        torch.testing.assert_close(got, true.view(given.shape))
    # The first release of VMamba's module, and the package around it.
    torch.testing.assert_close(selective_scan_cuda_core.fwd(u, delta, A, B, C, *rest), [want, x])
    first = selective_scan_cuda_core.bwd(u, delta, A, B, C, D, bias, want, x, None, True)
    torch.testing.assert_close(first, grads)
    torch.testing.assert_close(selective_scan.selective_scan_fn(u, delta, A, B, C, *rest), want)
    with pytest.raises(ValueError, match=r'A must have the axes \(d\)'):
        selective_scan_cuda_ndstate.fwd(u, delta, A, B, C, *rest, 1)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_scan_whose_output_are_the_states(dtype):
    inputs, _ = scan_inputs(dtype, n=1)
    u, delta, A, B, _, D, _, bias = inputs.values()
    exact = [t.double().requires_grad_() for t in (u, delta, A, B, D, bias)]
    want, *_ = loops.scan(*exact[:4], torch.ones_like(exact[3]), exact[4], None, exact[5], True)
    out, x = selective_scan_cuda_oflex_rh.fwd(u, delta, A, B, D, bias, True, 1, True)
    assert out.dtype == torch.float32
    close(out, want, torch.float32)
    grads = selective_scan_cuda_oflex_rh.bwd(u, delta, A, B, D, bias, out, x, True, 1)
    truth = torch.autograd.grad(want, exact, out.double())
    for got, true, given in zip(grads, truth, (u, delta, A, B, D, bias), strict=True):
        assert got.dtype == given.dtype
        close(got, true, dtype)
    with pytest.raises(ValueError, match=r'A must have shape \(d, 1\)'):
        selective_scan_cuda_oflex_rh.fwd(u, delta, A.expand(-1, 2), B, D, bias, True, 1, True)


class Scan(torch.autograd.Function):
    """As research code wraps the module."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, bias):
        out, x, *_ = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, bias, True, 1, True)
        ctx.save_for_backward(u, delta, A, B, C, D, bias, x)
        return out

    @staticmethod
    def backward(ctx, dout):
        u, delta, A, B, C, D, bias, x = ctx.saved_tensors
        return tuple(selective_scan_cuda_oflex.bwd(u, delta, A, B, C, D, bias, dout, x, True, 1))


@pytest.mark.parametrize('compiled', [False, True])
def test_inside_an_autograd_function(compiled):
    inputs, exact = scan_inputs(torch.float32)
    inputs.pop('z')
    _, y, _ = loops.scan(*exact.values(), softplus=True)
    exact.pop('z')
    tensors = [t.requires_grad_() for t in inputs.values()]
    function = torch.compile(Scan.apply, backend='aot_eager') if compiled else Scan.apply
    out = function(*tensors)
    grads = torch.autograd.grad(out.square().sum(), tensors)
    truth = torch.autograd.grad(y.square().sum(), list(exact.values()))
    close(out, y, torch.float32)
    for grad, want in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=1e-3, atol=1e-3)


def test_autocast_does_not_change_the_dtypes():
    """VMamba computes its scan in float32 under autocast."""
    inputs, exact = scan_inputs(torch.float32)
    _, y, _ = loops.scan(*exact.values(), softplus=True)
    u, delta, A, B, C, D, _, bias = inputs.values()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out, *_ = selective_scan_cuda.fwd(u, delta, A, B, C, D, None, bias, True)
    assert out.dtype == torch.float32
    close(out, y, torch.float32)


@pytest.mark.parametrize('silu', [True, False])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_convolution_in_the_signatures_of_all_releases(dtype, silu):
    x, weight, bias = (
        draw(2, 5, 9, dtype=dtype),
        draw(5, 4, seed=1, dtype=dtype),
        draw(5, dtype=dtype),
    )
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    want = loops.conv(*exact, silu=silu)
    dout = draw(2, 5, 9, seed=3, dtype=dtype)
    truth = torch.autograd.grad(want, exact, dout.double())
    fwd, bwd = causal_conv1d_cuda.causal_conv1d_fwd, causal_conv1d_cuda.causal_conv1d_bwd
    out = torch.full_like(x, torch.nan)
    assert fwd(x, weight, bias, None, None, out, None, silu) is None
    for got in (
        out,
        fwd(x, weight, bias, silu),
        fwd(x, weight, bias, None, silu),
        fwd(x, weight, bias, None, None, None, silu),
    ):
        close(got, want, dtype)
        assert got.is_contiguous()

    dx = torch.full_like(x, torch.nan)
    dweight, dbias = torch.ones_like(weight), torch.ones_like(bias)  # which are added to
    none = (None, None, None)
    assert bwd(x, weight, bias, dout, *none, dx, dweight, dbias, None, silu) is None
    results = [[dx, dweight - 1, dbias - 1]]
    results.append(bwd(x, weight, bias, dout, None, silu))
    results.append(bwd(x, weight, bias, dout, None, None, silu))
    *three, initial = bwd(x, weight, bias, dout, *none, None, False, silu)
    assert initial is None
    results.append(three)
    for grads in results:
        for grad, true in zip(grads, truth, strict=True):
            close(grad, true, dtype)

    # Half of a larger tensor is written in place.
    both = torch.zeros(2, 10, 9, dtype=dtype)
    assert bwd(x, weight, bias, dout, None, both[:, :5], silu)[0].data_ptr() == both.data_ptr()
    close(both[:, :5], truth[0], dtype)
    assert bwd(x, weight, None, dout, None, silu)[2] is None


def test_convolution_with_states():
    x, weight, bias = draw(2, 5, 9), draw(5, 4, seed=1), draw(5)
    state, dfinal = draw(2, 5, 3, seed=4), draw(2, 5, 3, seed=5)
    tensors = [t.clone().requires_grad_() for t in (x, weight, bias, state)]
    want = loops.conv(*tensors[:3], silu=True, initial=tensors[3])
    final = torch.full_like(state, torch.nan)
    fwd, bwd = causal_conv1d_cuda.causal_conv1d_fwd, causal_conv1d_cuda.causal_conv1d_bwd
    close(fwd(x, weight, bias, None, state, final, True), want, torch.float64)
    torch.testing.assert_close(final, x[..., -3:])
    dout = draw(2, 5, 9, seed=6)
    truth = torch.autograd.grad((want, tensors[0][..., -3:]), tensors, (dout, dfinal))
    grads = bwd(x, weight, bias, dout, None, state, dfinal, None, True, True)
    for grad, true in zip(grads, truth, strict=True):
        close(grad, true, torch.float64)


def test_convolution_of_packed_sequences():
    x, weight, bias = draw(2, 5, 9), draw(5, 4, seed=1), draw(5)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 1, 2, -1, -1], [3, 3, 3, 3, 3, 3, 3, 3, 4]]).int()
    exact = [t.clone().requires_grad_() for t in (x, weight, bias)]
    want = loops.conv(*exact, silu=True, seq_idx=seq_idx)
    fwd, bwd = causal_conv1d_cuda.causal_conv1d_fwd, causal_conv1d_cuda.causal_conv1d_bwd
    close(fwd(x, weight, bias, seq_idx, True), want, torch.float64)
    dout = draw(2, 5, 9, seed=6)
    truth = torch.autograd.grad(want, exact, dout)
    for grad, true in zip(bwd(x, weight, bias, dout, seq_idx, None, True), truth, strict=True):
        close(grad, true, torch.float64)


def test_update_in_the_signatures_of_all_releases():
    x, weight, bias = draw(2, 5, 4), draw(5, 4, seed=1), draw(5)
    want = loops.conv(x, weight, bias, silu=True)
    update = causal_conv1d_cuda.causal_conv1d_update

    def written(x, state, weight, bias, silu):
        out = torch.full_like(x, torch.nan)
        assert update(x, state, weight, bias, out, silu, None, None) is None
        return out

    for function in (
        update,
        written,
        lambda *a: update(*a, None),
        lambda *a: update(*a, None, torch.arange(2).int()),
    ):
        state = torch.zeros(2, 5, 4, dtype=torch.float64)
        columns = [function(x[..., t], state, weight, bias, True) for t in range(4)]
        close(torch.stack(columns, -1), want, torch.float64)
        torch.testing.assert_close(state, x)


def test_unknown_numbers_of_arguments_list_the_signatures():
    x = draw(1, 2, 3)
    for function in (
        causal_conv1d_cuda.causal_conv1d_fwd,
        causal_conv1d_cuda.causal_conv1d_bwd,
        causal_conv1d_cuda.causal_conv1d_update,
    ):
        for count in (0, 2, 3, 13):
            with pytest.raises(TypeError, match=rf'takes no {count} arguments.*from 1\.5: \(x, '):
                function(*[x] * count)


@pytest.mark.parametrize(
    ('name', 'change', 'error', 'message'),
    [
        ('A', lambda t: t.to(torch.complex64), TypeError, r'A must be real.*-torch\.exp\(A_log\)'),
        ('B', lambda t: t.half(), TypeError, 'B must be torch.float32'),
        ('u', lambda t: t.transpose(1, 2), ValueError, 'delta must have shape'),
        ('u', lambda t: t.int(), TypeError, 'u must have one of the dtypes'),
        ('D', lambda t: t.half(), TypeError, 'D must be torch.float32'),
        ('z', lambda t: t[:1], ValueError, 'z must have shape'),
        ('C', lambda t: t[:, :, :2], ValueError, 'C must have shape'),
        ('delta', lambda t: None, TypeError, 'delta must be a tensor'),
    ],
)
def test_bad_input_of_a_scan_is_named(name, change, error, message):
    inputs, _ = scan_inputs(torch.float32)
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=message):
        selective_scan_cuda.fwd(*inputs.values(), True)
    u = scan_inputs(torch.float32)[0]['u']
    with pytest.raises(error, match=message):
        selective_scan_cuda.bwd(*inputs.values(), u, None, None, None, True, False)


def test_bad_numbers_of_rows_are_named():
    inputs, _ = scan_inputs(torch.float32)
    u, delta, A, B, C, D, _, bias = inputs.values()
    for rows in (0, 5, True, 2):  # three channels in a group
        with pytest.raises(ValueError, match='nrows'):
            selective_scan_cuda_core.fwd(u, delta, A, B, C, D, bias, True, rows)
    with pytest.raises(TypeError, match='out_float'):
        selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, bias, True, 1, u)
    with pytest.raises(TypeError, match=r'delta must be .*bfloat16'):
        selective_scan_cuda_oflex.fwd(u.bfloat16(), delta, A, B, C, D, bias, True, 1, True)
