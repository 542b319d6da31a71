"""Streams, threads and exhausted memory on a GPU."""

import threading

import pytest
import torch

from mmvim import ops

pytestmark = pytest.mark.gpu
ROUNDS = 20


def inputs(seed, length=512):
    """A bidirectional scan, its gate and a convolution, different for each seed."""
    draw = torch.Generator('cuda').manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=draw, device='cuda')

    def one_way():
        return ops.ScanInputs(
            randn(2, length, 64),
            randn(2, length, 64),
            -torch.exp(0.5 * randn(64, 16)),
            randn(2, length, 16),
            randn(2, length, 16),
            randn(64),
            randn(64) - 1,
        )

    return one_way(), one_way(), randn(2, length, 64), randn(64, 4), randn(64)


def work(forward, backward, z, weight, bias):
    """Outputs and gradients of all ops, one feeding the next."""
    u = forward.u.detach().requires_grad_()
    x = ops.causal_conv1d(u, weight, bias, activation='silu')
    both = ops.bidirectional_conv1d(x, weight, bias, weight, bias)
    y = ops.bidirectional_scan(
        forward._replace(u=both[0]), backward._replace(u=both[1]), z, delta_softplus=True
    )
    y = ops.selective_scan(y, *forward[1:6], delta_softplus=True)
    out, residual = ops.add_rms_norm(y, bias.abs() + 1, x)
    (out.sum() + residual.square().mean()).backward()
    return out.detach(), u.grad


@pytest.fixture(params=['torch', 'compiled'])
def backend(request):
    if request.param == 'compiled' and not ops.backend_info()['cuda_kernels']:
        pytest.skip('no compiled kernels for CUDA')
    return request.param


def assert_same(found, expected):
    # Sums over steps and batches may be taken in another order.
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_two_streams(backend):
    given = [inputs(seed) for seed in (0, 1)]
    streams = [torch.cuda.Stream() for _ in given]
    with ops.use_backend(backend):
        expected = [work(*case) for case in given]
        torch.cuda.synchronize()
        found = []
        for _ in range(ROUNDS):
            for stream, case in zip(streams, given, strict=True):
                with torch.cuda.stream(stream):
                    found.append(work(*case))
        torch.cuda.synchronize()
    assert len(found) == 2 * ROUNDS
    for i, result in enumerate(found):
        assert_same(result, expected[i % 2])


def test_two_threads(backend):
    given = [inputs(seed) for seed in (0, 1)]
    with ops.use_backend(backend):
        expected = [work(*case) for case in given]
    torch.cuda.synchronize()
    found, errors = {0: [], 1: []}, []
    start = threading.Barrier(2)

    def run(number):
        try:
            start.wait()
            with ops.use_backend(backend), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(ROUNDS):
                    found[number].append(work(*given[number]))
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    assert not errors
    for number, results in found.items():
        assert len(results) == ROUNDS
        for result in results:
            assert_same(result, expected[number])


def test_exhausted_memory_leaves_the_process_usable(backend):
    case = inputs(0)
    with ops.use_backend(backend):
        expected = work(*case)
        free, total = torch.cuda.mem_get_info()
        # Most of the memory is taken, so that an op, forward or backward, does not find its own.
        before = torch.cuda.memory_allocated()
        taken = torch.empty(int(free * 0.97), dtype=torch.uint8, device='cuda')

        def exhaust():
            length = max(4096, int(total // 2**22))
            for doubling in range(16):
                work(*inputs(1, length << doubling))

        with pytest.raises(torch.OutOfMemoryError):
            exhaust()
        del taken
        torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated() <= before + 2**28
        for _ in range(3):
            assert_same(work(*case), expected)
        torch.cuda.synchronize()


def test_wrong_input_leaves_the_process_usable(backend):
    """Refused before a kernel runs: a failed assertion on the device would end all further work."""
    forward, backward, z, weight, bias = inputs(0)
    with ops.use_backend(backend):
        expected = work(forward, backward, z, weight, bias)
        for wrong in (z.cpu(), z[:, :-1], z.half(), z.to_sparse()):
            with pytest.raises((TypeError, ValueError), match='z '):
                ops.bidirectional_scan(forward, backward, wrong)
        with pytest.raises(ValueError, match='A of forward must be negative'):
            ops.bidirectional_scan(forward._replace(A=-forward.A), backward, z)
        assert_same(work(forward, backward, z, weight, bias), expected)
