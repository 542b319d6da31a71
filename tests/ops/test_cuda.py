"""Properties specific to GPUs: reproducibility, memory, and tensors beyond 32-bit offsets."""

import pytest
import torch
from ops_support import assert_error_bounded, gradients, randn, scan_inputs, wide

from mmvim.ops import (
    ScanInputs,
    add_rms_norm,
    bidirectional_conv1d,
    bidirectional_scan,
    causal_conv1d,
    extension,
    selective_scan,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not extension.supports('selective_scan', 'cuda', torch.bfloat16),
        reason='no compiled kernels for CUDA',
    ),
]
LARGE = 2**31


def sequences(b, length):
    """Several sequences in each row; two begin where tiles and chunks do."""
    cuts = torch.zeros(b, length, dtype=torch.int32, device='cuda')
    for at in (1, 64, 99, 128):
        cuts[:, at + torch.arange(b, device='cuda') * (at > 64)] += 1
    return cuts.cumsum(1, dtype=torch.int32)


def scan(groups=None, length=197, channels=160, method='zoh', packed=False):
    tensors = scan_inputs(2, length, channels, 16, groups, dtype=torch.bfloat16, device='cuda')
    tensors = {k: v.requires_grad_() for k, v in tensors.items()}
    leaves = list(tensors.values())
    seq_idx = sequences(2, length) if packed else None
    options = {'discretization': method, 'seq_idx': seq_idx, 'backend': 'compiled'}
    return [selective_scan(**tensors, delta_softplus=True, **options)], leaves


def few_states(states):
    """A scan with blocks for all multiprocessors, which has a kernel of its own."""
    x = scan_inputs(64, 1100, 160, states, 4, dtype=torch.bfloat16, device='cuda')
    x = {k: v.requires_grad_() for k, v in x.items() if k != 'z'}
    return [selective_scan(**x, delta_softplus=True, backend='compiled')], list(x.values())


def both_scans(length=197, packed=False):
    parts, leaves = [], []
    for seed in (0, 1):
        x = scan_inputs(2, length, 160, 16, dtype=torch.bfloat16, device='cuda', seed=seed)
        x = {k: v.requires_grad_() for k, v in x.items()}
        z = x.pop('z')
        parts.append(ScanInputs(**x))
        leaves += x.values()
    options = {'seq_idx': sequences(2, length) if packed else None, 'backend': 'compiled'}
    out = bidirectional_scan(*parts, z, scale=0.5, delta_softplus=True, **options)
    return [out], [*leaves, z]


def conv(both=False, packed=False):
    x = torch.randn(3, 197, 160, device='cuda', dtype=torch.bfloat16, requires_grad=True)
    w, w_b = (torch.randn(160, 4, device='cuda', requires_grad=True) for _ in range(2))
    bias = torch.randn(160, device='cuda', requires_grad=True)
    if both:
        out = bidirectional_conv1d(x, w, bias, w_b, bias, activation='silu', backend='compiled')
        return list(out), [x, w, w_b, bias]
    seq_idx = sequences(3, 197) if packed else None
    out = causal_conv1d(x, w, bias, activation='silu', seq_idx=seq_idx, backend='compiled')
    return [out], [x, w, bias]


def norm():
    x, residual = (torch.randn(3, 197, 160, device='cuda', requires_grad=True) for _ in range(2))
    weight = torch.randn(160, device='cuda', requires_grad=True)
    return list(add_rms_norm(x, weight, residual, backend='compiled')), [x, residual, weight]


CASES = {
    'scan': scan,
    'scan-groups': lambda: scan(groups=2),
    'scan-two-tap': lambda: scan(method='foh_hold'),
    'scan-one-state': lambda: few_states(1),
    'scan-two-states': lambda: few_states(2),
    'scan-chunks': lambda: scan(length=1500, channels=64),
    'scan-packed': lambda: scan(packed=True),
    'scan-packed-chunks': lambda: scan(length=1500, channels=64, method='tustin', packed=True),
    'bidirectional': both_scans,
    'bidirectional-chunks': lambda: both_scans(1500),
    'bidirectional-packed': lambda: both_scans(packed=True),
    'conv': conv,
    'conv-both': lambda: conv(both=True),
    'conv-packed': lambda: conv(packed=True),
    'norm': norm,
}


def results(case):
    """Outputs and gradients; the same inputs in every call."""
    torch.manual_seed(0)
    outputs, leaves = CASES[case]()
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
    return [*outputs, *grads]


@pytest.fixture
def deterministic():
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize('case', CASES)
def test_deterministic_algorithms_give_equal_bits(case, deterministic):
    first = results(case)
    for _ in range(4):
        for a, b in zip(first, results(case), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize('case', CASES)
def test_all_of_every_output_is_written(case, deterministic):
    """Memory that is not initialized holds NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    for value in results(case):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize('case', CASES)
def test_poisoned_memory_does_not_show(case):
    """The same for the algorithms that need not be deterministic."""
    expected = results(case)
    for size in (2**10, 2**14, 2**18, 2**20, 2**24):
        blocks = [torch.full((size,), float('nan'), device='cuda') for _ in range(8)]
        del blocks
    for a, b in zip(expected, results(case), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('states', [1, 2])
@pytest.mark.parametrize(
    ('length', 'channels', 'groups', 'optional'),
    [
        (1, 32, None, True),
        (7, 33, 3, True),
        (32, 64, 2, False),
        (33, 96, None, True),
        (49, 100, 4, False),
        (255, 40, 1, True),
        (256, 31, None, True),
        (257, 64, 2, True),
        (600, 70, 7, True),
        (1100, 64, 2, True),
    ],
)
def test_gradients_of_few_states(length, channels, groups, optional, states, reverse, dtype):
    batch = torch.cuda.get_device_properties(0).multi_processor_count
    x = scan_inputs(
        batch, length, channels, states, groups, dtype=dtype, device='cuda', optional=optional
    )
    x.pop('z', None)
    if optional:
        x['initial_state'] = randn(batch, channels, states, seed=77).float().cuda()

    def run(tensors, backend):
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        outputs = selective_scan(
            **leaves, delta_softplus=optional, reverse=reverse, return_last_state=optional,
            backend=backend,
        )  # fmt: skip
        outputs = outputs if optional else (outputs,)
        return gradients(outputs, list(leaves.values()), cast=casts)

    # Without a softplus, steps of another sign would grow.
    if not optional:
        x['delta'] = x['delta'].abs()
    casts = (torch.empty(0, dtype=dtype), torch.empty(0))[: 2 if optional else 1]
    got, plain = run(x, 'compiled'), run(x, 'torch')
    exact = run(wide(x), 'torch')
    names = list(x)
    if optional:
        # It has passed through the decays of all steps.
        first = [[tensors.pop()] for tensors in map(list, (names, got, plain, exact))]
        assert_error_bounded(*first, slack=4 + 2 * length**0.5)
    count = len(names) - optional
    assert_error_bounded(names[:count], got[:count], plain[:count], exact[:count], slack=8.0)


def peak_of(function) -> int:
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize('shape', [(16, 197, 384), (1, 4097, 384)])
def test_memory_of_forward_and_backward(shape):
    """No copy of the inputs and no (b, l, d, n) array: outputs, kept states, partial sums."""
    n = 16
    x = scan_inputs(*shape, n, dtype=torch.bfloat16, device='cuda')
    leaves = [v.requires_grad_() for v in x.values()]
    grad = torch.ones_like(x['u'])

    def run():
        out = selective_scan(**x, delta_softplus=True, backend='compiled')
        return out, torch.autograd.grad(out, leaves, grad)

    b, length, d = shape
    rows = b * length * d * 2
    kept = b * (length // 32) * d * n * 4
    columns = b * length * n
    chunks = b * d * n * 4 * (length // 64)
    # out, du, ddelta, dz; then dB and dC in float32 and rounded, and dA of each batch and chunk.
    least = 4 * rows + kept + columns * 2 * (4 + 2)
    assert peak_of(run) <= 1.1 * least + 3 * chunks + b * d * n * 8 + 2**20


def tail(t, steps):
    """A copy of the last steps of the last batch entry."""
    return t[-1:, -steps:].clone()


@pytest.fixture
def large_memory():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip('needs 60 GiB of free GPU memory')
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize('reverse', [False, True])
def test_scan_beyond_32_bit_offsets(large_memory, reverse):
    """The end of a tensor of more than 2^31 elements is as if it were alone."""
    b, d = 3, 1024
    length = LARGE // (b * d) + 300
    g = torch.Generator('cuda').manual_seed(0)

    def r(*sizes):
        return torch.randn(*sizes, generator=g, device='cuda', dtype=torch.bfloat16)

    rows = [r(b, length, d), r(b, length, d)]
    columns = [r(b, length, 2), r(b, length, 2)]
    A = torch.full((d, 2), -1.5, device='cuda')
    grad = r(b, length, d)

    def run(u, delta, B, C, grad):
        leaves = [t.requires_grad_() for t in (u, delta, B, C)]
        out = selective_scan(
            u, delta, A, B, C, delta_softplus=True, reverse=reverse, backend='compiled'
        )
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    assert rows[0].numel() > LARGE
    small = [tail(t, 600) for t in (*rows, *columns, grad)]
    whole = [tail(t, 200) for t in run(*rows, *columns, grad)]
    # In scan order the compared steps lie 400 behind the start, or the whole's at it.
    for a, e in zip(whole, run(*small), strict=True):
        torch.testing.assert_close(a, tail(e, 200), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('mode', ['causal', 'reverse'])
def test_conv_beyond_32_bit_offsets(large_memory, mode):
    b, d = 3, 1024
    length = LARGE // (b * d) + 300
    x, grad = (torch.randn(b, length, d, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    w, bias = torch.randn(d, 4, device='cuda'), torch.randn(d, device='cuda')

    def run(x, grad):
        x.requires_grad_()
        out = causal_conv1d(x, w, bias, activation='silu', mode=mode, backend='compiled')
        return out.detach(), *torch.autograd.grad(out, x, grad)

    small = tail(x, 300), tail(grad, 300)
    whole = [tail(t, 200) for t in run(x, grad)]
    for a, e in zip(whole, run(*small), strict=True):
        torch.testing.assert_close(a, tail(e, 200), rtol=0, atol=0)


def test_norm_beyond_32_bit_offsets(large_memory):
    d = 1024
    x, residual = (
        torch.randn(1, LARGE // d + 10, d, device='cuda', dtype=torch.bfloat16) for _ in range(2)
    )
    weight = torch.randn(d, device='cuda')

    def run(x, residual):
        leaves = [x.requires_grad_(), residual.requires_grad_()]
        out, kept = add_rms_norm(x, weight, residual, residual_in_fp32=False, backend='compiled')
        return out.detach(), *torch.autograd.grad([out, kept], leaves, [out.detach(), x.detach()])

    small = tail(x, 50), tail(residual, 50)
    whole = [tail(t, 50) for t in run(x, residual)]
    for a, e in zip(whole, run(*small), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
