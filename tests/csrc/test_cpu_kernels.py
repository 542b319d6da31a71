"""The CPU kernels below the Python wrappers: instruction sets, threads, numbers, checks."""

import os
import subprocess
import sys

import pytest
import torch

from mmvim.ops import DISCRETIZATIONS, extension

pytestmark = pytest.mark.skipif(
    not extension.supports('selective_scan', 'cpu', torch.float32), reason='no compiled library'
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
compiled, plain = torch.ops.mmvim, torch.ops.mmvim_torch


def scan_arguments(b, length, d, n, groups=1, dtype=torch.float32, method='zoh', seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    parts = 2 if method in ('foh_hold', 'tustin') else 1
    return {
        'u': randn(b, length, d),
        'delta': randn(b, length, d) - 1,
        'A': -torch.exp(randn(d, n, dtype=parameter)),
        'B': randn(b, length, groups, n),
        'C': randn(b, length, groups, n),
        'D': randn(d, dtype=parameter),
        'z': randn(b, length, d),
        'delta_bias': randn(d, dtype=parameter),
        'initial_state': randn(b, d, parts * n, dtype=parameter),
    }


def scan(ops, arguments, method='zoh', reverse=False, interval=16):
    """Every output and gradient."""
    tensors = tuple(arguments.values())
    forward = ops.selective_scan(*tensors, True, method, reverse, True, interval)
    out, last_state, checkpoints = forward
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        for x in (out, last_state)
    ]
    backward = ops.selective_scan_backward(
        *grads, *tensors, checkpoints, True, method, reverse, interval
    )
    return (*forward, *backward)


def conv(ops, x, width=4):
    generator = torch.Generator().manual_seed(2)
    d = x.shape[2]
    weights = [torch.randn(d, width, generator=generator).to(x.dtype) for _ in range(2)]
    biases = [torch.randn(d, generator=generator).to(x.dtype) for _ in range(2)]
    inputs = (x, weights[0], biases[0], weights[1], biases[1], True)
    out = ops.bidirectional_conv1d(*inputs)
    return (*out, *ops.bidirectional_conv1d_backward(*(o.detach() for o in out), *inputs))


def norm(ops, x):
    weight = torch.linspace(0.5, 1.5, x.shape[-1]).to(x.dtype)
    out, residual, rstd = ops.add_rms_norm(x, x, weight, 1e-5, True)
    grads = ops.add_rms_norm_backward(out, residual, residual, weight, rstd, True, x.dtype, x.dtype)
    return (out, residual, rstd, *grads)


@pytest.mark.parametrize('isa', ['portable', 'avx2', 'avx512'])
def test_every_instruction_set_agrees_with_pytorch(isa, tmp_path):
    order = ['portable', 'avx2', 'avx512']
    best = extension.backend_info()['cpu_instruction_set']
    if 'MMVIM_CPU_ISA' not in os.environ and order.index(isa) > order.index(best):
        pytest.skip(f'this CPU has no {isa}')
    code = f"""
import sys, torch
sys.path[:0] = {sys.path!r}
import test_cpu_kernels as t
from mmvim.ops import extension
assert extension.backend_info()['cpu_instruction_set'] == {isa!r}
results = []
for dtype in t.DTYPES:
    for i, method in enumerate(t.DISCRETIZATIONS):
        a = t.scan_arguments(2, 37, 39, 5, 3, dtype, method)
        results.append(t.scan(t.compiled, a, method, i % 2 == 1, (0, 7, 16)[i % 3]))
    results.append(t.conv(t.compiled, a['u']))
    results.append(t.norm(t.compiled, a['u']))
torch.save(results, {str(tmp_path / 'results.pt')!r})
"""
    environment = {**os.environ, 'MMVIM_CPU_ISA': isa}
    done = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = iter(torch.load(tmp_path / 'results.pt'))
    for dtype in DTYPES:
        for i, method in enumerate(DISCRETIZATIONS):
            a = scan_arguments(2, 37, 39, 5, 3, dtype, method)
            assert_close(
                next(results), scan(plain, a, method, i % 2 == 1, (0, 7, 16)[i % 3]), dtype
            )
        assert_close(next(results), conv(plain, a['u']), dtype)
        assert_close(next(results), norm(plain, a['u']), dtype)


def assert_close(got, expected, dtype):
    bounds = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    for one, two in zip(got, expected, strict=True):
        assert one.dtype == two.dtype
        assert one.shape == two.shape
        if two.numel() > 0:
            bound = bounds[dtype] * max(two.abs().max().item(), 1e-3)
            torch.testing.assert_close(one, two, rtol=0, atol=bound)


@pytest.mark.parametrize('shape', [(2, 70, 200, 8), (1, 300, 48, 4), (5, 17, 7, 3)])
def test_results_do_not_depend_on_the_number_of_threads(shape):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            a = scan_arguments(*shape)
            results.append((*scan(compiled, a), *conv(compiled, a['u']), *norm(compiled, a['u'])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_every_half_precision_number_is_read_and_written_right(dtype):
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1)
    ones = torch.ones(65536)
    special = x.isnan()
    read = compiled.add_rms_norm(x, None, ones, 1e-5, True)[1]
    assert torch.equal(read[~special], x.float()[~special])
    assert read[special].isnan().all()
    written = compiled.add_rms_norm(x, None, ones, 1e-5, False)[1]
    assert torch.equal(written[~special].view(torch.int16), x[~special].view(torch.int16))
    assert written[special].isnan().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_rounding_is_that_of_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(1 << 16, generator=generator)
    wide = wide * torch.exp2(40 * torch.rand(1 << 16, generator=generator) - 25)
    ties = (torch.arange(1 << 12).float() + 0.5) * 2.0**-24
    values = torch.cat((wide, ties, -ties, torch.tensor([65504.0, 65519.0, 65520.0, 1e38])))
    weight = torch.stack((torch.zeros_like(values), values), 1)
    x = torch.ones(1, 1, len(values), dtype=dtype)
    out, _ = compiled.causal_conv1d(x, weight, None, None, 'causal', False, False)
    assert torch.equal(out[0, 0], values.to(dtype))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('method', DISCRETIZATIONS)
def test_extreme_steps_give_no_nan(dtype, method):
    steps = [0.0, 1e-30, 1e-12, 1e-4, 1.0, 50.0, 126.0, 5e2, 1e4, 1e6]
    delta = torch.tensor(steps, dtype=dtype).view(1, -1, 1).expand(1, -1, 3).contiguous()
    ones = torch.ones_like(delta)
    A = torch.tensor([[-1e-6, -1.0], [-1.0, -16.0], [-1e3, -1e-3]], dtype=dtype)
    B = torch.ones(1, len(steps), 1, 2, dtype=dtype)
    absent = (None, None, None, None)
    results = []
    for ops in (compiled, plain):
        inputs = (ones, delta, A, B, B, *absent)
        out = ops.selective_scan(*inputs, False, method, False, False, 4)
        grads = ops.selective_scan_backward(ones, None, *inputs, out[2], False, method, False, 4)
        results.append((out[0], *grads[:5]))
    for one, two in zip(*results, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(
            one, two, rtol=2e-4 if dtype == torch.float32 else 1e-9, atol=1e-6
        )


@pytest.mark.parametrize('name', ['u', 'delta', 'B', 'C', 'z', 'initial_state'])
def test_nan_is_not_hidden(name):
    a = scan_arguments(1, 9, 5, 3)
    a[name].view(-1)[0] = float('nan')
    out = scan(compiled, a)[0]
    assert torch.equal(out.isnan(), scan(plain, a)[0].isnan())
    assert out.isnan().any()


def test_state_that_decays_to_nothing_ends_at_zero():
    a = scan_arguments(1, 4000, 16, 4)
    a['u'][:, 1:] = 0
    a['delta'].fill_(-1.0)
    out, last_state, *_ = scan(compiled, a)
    assert out.isfinite().all()
    assert (last_state == 0).any()
    tiny = torch.finfo(torch.float32).tiny
    assert not ((last_state != 0) & (last_state.abs() < tiny)).any()


def test_flushing_denormals_ends_with_the_kernel():
    scan(compiled, scan_arguments(1, 3, 4, 2))
    assert torch.tensor(1e-40) * torch.tensor(0.5) != 0


WRONG = {
    'u': (lambda x: x[0], 'u must be'),
    'delta': (lambda x: x[:, :-1], 'delta must have shape'),
    'A': (lambda x: torch.ones(x.shape[0], 257), 'n <= 256'),
    'B': (lambda x: x.expand(-1, -1, 3, -1), 'g a divisor'),
    'C': (lambda x: x[..., :-1], 'C must have shape'),
    'D': (lambda x: x.double(), 'D must be Float'),
    'z': (lambda x: x.bfloat16(), 'z must be Float'),
    'delta_bias': (lambda x: x[1:], 'delta_bias must have shape'),
    'initial_state': (lambda x: x[..., 1:], 'initial_state must have shape'),
}


@pytest.mark.parametrize('name', WRONG)
def test_raw_calls_cannot_leave_their_tensors(name):
    change, message = WRONG[name]
    kind = TypeError if ' must be Float' in message else ValueError
    a = scan_arguments(2, 5, 4, 3)
    good = scan(compiled, a)
    a[name] = change(a[name])
    with pytest.raises(kind, match=message):
        compiled.selective_scan(*a.values(), True, 'zoh', False, True, 16)
    with pytest.raises(kind, match=message):
        compiled.selective_scan_backward(
            good[0], None, *a.values(), good[2], True, 'zoh', False, 16
        )


def test_raw_calls_check_what_forward_saved():
    a = scan_arguments(1, 40, 4, 3)
    tensors = tuple(a.values())
    out, last, checkpoints = compiled.selective_scan(*tensors, True, 'zoh', False, True, 16)
    backward = compiled.selective_scan_backward
    with pytest.raises(ValueError, match='checkpoints must have shape'):
        backward(out, None, *tensors, checkpoints, True, 'zoh', False, 8)
    with pytest.raises(ValueError, match='must not be negative'):
        backward(out, None, *tensors, checkpoints, True, 'zoh', False, -1)
    with pytest.raises(ValueError, match='grad_out must have shape'):
        backward(out[:, 1:], None, *tensors, checkpoints, True, 'zoh', False, 16)
    with pytest.raises(ValueError, match='grad_last_state must have shape'):
        backward(out, last[..., 1:], *tensors, checkpoints, True, 'zoh', False, 16)
    with pytest.raises(ValueError, match=r'zoh, zoh_exact.*tustin.*euler'):
        backward(out, None, *tensors, checkpoints, True, 'euler', False, 16)


def test_raw_convolutions_and_norms_are_checked():
    x, weight = torch.ones(2, 5, 4), torch.ones(4, 3)
    conv1d = compiled.causal_conv1d
    with pytest.raises(ValueError, match='weight must have shape'):
        conv1d(x, weight[1:], None, None, 'causal', False, False)
    with pytest.raises(ValueError, match='w from 2 to 4'):
        conv1d(x, torch.ones(4, 5), None, None, 'causal', False, False)
    with pytest.raises(ValueError, match="'backwards'"):
        conv1d(x, weight, None, None, 'backwards', False, False)
    with pytest.raises(ValueError, match='has no state'):
        conv1d(x, weight, None, None, 'same', False, True)
    with pytest.raises(ValueError, match='initial_state must have shape'):
        conv1d(x, weight, None, torch.ones(2, 4, 3), 'causal', False, False)
    with pytest.raises(ValueError, match='same width'):
        compiled.bidirectional_conv1d(x, weight, None, torch.ones(4, 2), None, False)
    with pytest.raises(ValueError, match='residual must have shape'):
        compiled.add_rms_norm(x, x[:, 1:], torch.ones(4), 1e-5, True)
    with pytest.raises(ValueError, match='weight must have shape'):
        compiled.add_rms_norm(x, None, torch.ones(5), 1e-5, True)
