"""All routes in one call against the definition, which gathers and scatters."""

import itertools

import pytest
import torch
from ops_support import assert_error_bounded, cross_scan_inputs, gradients, need, randn

from mmvim.ops import DISCRETIZATIONS, ROUTES, cross_scan, extension, reference, selective_scan

SUBSETS = [s for k in (1, 2, 3) for s in itertools.combinations(ROUTES, k)]
REPEATED = ('rows', 'rows', 'rows_reversed', 'rows_reversed')


def run(tensors, **options):
    tensors = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    out = cross_scan(**tensors, **options)
    return (out, *gradients([out], list(tensors.values())))


def run_reference(tensors, dtype, cast, **options):
    tensors = {k: v.detach().cpu().to(dtype).requires_grad_() for k, v in tensors.items()}
    out = reference.cross_scan(**tensors, **options)
    results = (out, *gradients([out], list(tensors.values()), cast=cast))
    if dtype == torch.float64:
        return results
    return tuple(x.to(c.dtype) for x, c in zip(results, cast, strict=True))


def compare(tensors, slack=8.0, **options):
    got = run(tensors, **options)
    exact = run_reference(tensors, torch.float64, got, **options)
    names = ('out', *tensors)
    if got[0].dtype == torch.float64:
        for name, value, truth in zip(names, got, exact, strict=True):
            torch.testing.assert_close(
                value.cpu(), truth, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f'{n}: {m}'
            )
        return
    plain = run_reference(tensors, torch.float32, got, **options)
    assert_error_bounded(names, got, plain, exact, slack=slack)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('rank', [None, 2], ids=['delta', 'low_rank'])
@pytest.mark.parametrize('n', [1, 16])
@pytest.mark.parametrize('size', [(1, 1), (1, 9), (9, 1), (7, 5), (4, 8), (14, 14)], ids=str)
def test_sizes_states_dtypes(backend, device, size, n, rank, dtype):
    need(backend, 'selective_scan', device, torch.promote_types(dtype, torch.float32))
    tensors = cross_scan_inputs(2, *size, 7, n, 4, rank, dtype=dtype, device=device)
    compare(tensors, delta_softplus=True)


@pytest.mark.parametrize(
    ('size', 'd', 'n'), [((33, 17), 20, 1), ((40, 41), 6, 1), ((23, 27), 6, 2)], ids=str
)
def test_several_rounds(backend, device, size, d, n):
    need(backend, 'selective_scan', device, torch.float32)
    tensors = cross_scan_inputs(1, *size, d, n, 4, 6, dtype=torch.float32, device=device)
    compare(tensors, slack=32, delta_softplus=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('rank', [None, 5], ids=['delta', 'low_rank'])
@pytest.mark.parametrize('d', [192, 200])
def test_several_blocks_of_channels(backend, device, d, rank, dtype):
    """Of equal size or not."""
    need(backend, 'selective_scan', device, torch.float32)
    tensors = cross_scan_inputs(2, 5, 9, d, 1, 4, rank, dtype=dtype, device=device)
    compare(tensors, slack=32, delta_softplus=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('method', DISCRETIZATIONS)
@pytest.mark.parametrize('n', [1, 2])
def test_methods_in_low_precision(backend, device, method, n, dtype):
    need(backend, 'selective_scan', device, dtype)
    tensors = cross_scan_inputs(1, 6, 7, 6, n, 2, 4, dtype=dtype, device=device)
    compare(tensors, delta_softplus=True, discretization=method, routes=ROUTES[1::2])


def assert_close_to_torch(tensors, **options):
    """Against the PyTorch path in float64, on the GPU, in the Euclidean norm."""
    dtype = tensors['x'].dtype
    assert extension.supports('cross_scan_fused', 'cuda', dtype)
    options['delta_softplus'] = True
    got, again = (run(tensors, **options, backend='compiled') for _ in range(2))
    exact = run({k: v.double() for k, v in tensors.items()}, **options, backend='torch')
    limit = {torch.float32: 4e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    for name, one, two, truth in zip(('out', *tensors), got, again, exact, strict=True):
        assert torch.equal(one, two), f'{name} differs from run to run'
        error = (one.double() - truth).norm() / truth.norm().clamp(min=1e-9)
        assert error < limit, f'{name}: {error:.1e}'


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ('shape', 'rank', 'routes'),
    [((64, 1, 1, 8), 2, ROUTES), ((4, 1, 45, 8), 14, ROUTES[2:3]), ((4, 45, 1, 20), 8, ROUTES[::3]),
     ((2, 7, 9, 36), 6, REPEATED), ((1, 33, 17, 96), 12, ROUTES[::-1]),
     ((2, 14, 14, 40), 24, ROUTES), ((1, 40, 41, 16), 4, ROUTES[1:]), ((1, 130, 60, 16), 6, ROUTES),
     ((2, 130, 60, 4), 12, ROUTES[:2]), ((1, 60, 130, 20), 16, ROUTES[1:3]),
     ((70, 28, 28, 24), 10, ROUTES), ((2, 56, 56, 20), 12, (*ROUTES[::-1], *ROUTES[:3:2])),
     ((40, 48, 56, 16), 24, ROUTES[1::2])],
    ids=str,
)  # fmt: skip
def test_one_state_of_low_rank(shape, rank, routes, dtype):
    tensors = cross_scan_inputs(*shape, 1, len(routes), rank, dtype=dtype, device='cuda')
    assert_close_to_torch(tensors, routes=routes)
    if shape[1] in (7, 130):
        tensors['delta_weight'] = tensors['delta_weight'].float()
        for name in ('D', 'delta_bias'):
            del tensors[name]
        assert_close_to_torch(tensors, routes=routes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ('shape', 'n', 'rank'),
    [((2, 120, 90, 40), 1, 6), ((1, 256, 256, 16), 1, None), ((1, 90, 64, 24), 16, 5),
     ((3, 56, 56, 96), 1, 6), ((70, 14, 14, 65), 2, 4), ((2, 7, 7, 768), 1, 48)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_maps_of_models(shape, n, rank, dtype):
    assert_close_to_torch(cross_scan_inputs(*shape, n, 4, rank, dtype=dtype, device='cuda'))


@pytest.mark.parametrize('routes', [*SUBSETS, ROUTES[::-1], REPEATED], ids='-'.join)
def test_routes(backend, device, routes):
    need(backend, 'selective_scan', device, torch.float64)
    tensors = cross_scan_inputs(2, 3, 5, 4, 2, len(routes), 2, device=device)
    compare(tensors, delta_softplus=True, routes=routes)


@pytest.mark.parametrize('method', DISCRETIZATIONS)
def test_methods(backend, device, method):
    need(backend, 'selective_scan', device, torch.float64)
    tensors = cross_scan_inputs(2, 5, 4, 3, 2, 4, 2, device=device)
    compare(tensors, delta_softplus=True, discretization=method)


def test_without_optional_inputs(backend, device):
    need(backend, 'selective_scan', device, torch.float64)
    tensors = cross_scan_inputs(2, 3, 4, 3, 2, optional=False, device=device)
    tensors['delta'] = tensors['delta'].abs()
    compare(tensors)


def test_most_states(backend, device):
    need(backend, 'selective_scan', device, torch.float64)
    compare(cross_scan_inputs(1, 3, 2, 2, 256, 2, device=device), routes=ROUTES[:2],
            delta_softplus=True)  # fmt: skip


@pytest.mark.parametrize('shape', [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty(backend, device, shape):
    need(backend, 'selective_scan', device, torch.float64)
    out, *grads = run(cross_scan_inputs(*shape, 3, 2, rank=1, device=device), delta_softplus=True)
    assert out.shape == (*shape, 3)
    assert all(grad.eq(0).all() for grad in grads)


def test_each_route_reads_the_map_in_its_order():
    """With a state that hardly decays, each position sums what the route has passed."""
    h, w = 3, 4
    x = torch.arange(1.0, 1 + h * w, dtype=torch.float64).view(1, h, w, 1)
    ones = x.new_ones(1, h, w, 1, 1)
    for route, order in {
        'rows': list(range(12)),
        'columns': [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11],
        'rows_reversed': list(range(11, -1, -1)),
        'columns_reversed': [11, 7, 3, 10, 6, 2, 9, 5, 1, 8, 4, 0],
    }.items():
        out = cross_scan(x, ones, -1e-12 * x.new_ones(1, 1, 1), ones, ones, routes=(route,))
        expected = torch.empty(h * w, dtype=torch.float64)
        expected[order] = x.flatten()[order].cumsum(0)
        torch.testing.assert_close(out.flatten(), expected)


def test_the_sum_is_rounded_once(backend, device):
    need(backend, 'selective_scan', device, torch.float32)
    tensors = cross_scan_inputs(2, 5, 6, 8, 2, dtype=torch.bfloat16, device=device)
    full = {k: v.float() for k, v in tensors.items()}
    out = cross_scan(**tensors, delta_softplus=True)
    assert torch.equal(out, cross_scan(**full, delta_softplus=True).bfloat16())


def test_strided_inputs(backend, device):
    need(backend, 'selective_scan', device, torch.float32)
    tensors = cross_scan_inputs(2, 5, 6, 8, 2, rank=2, dtype=torch.float32, device=device)
    expected = run(tensors, delta_softplus=True)
    joined = torch.cat([tensors[k] for k in ('delta', 'B', 'C')], -1)
    parts = dict(zip(('delta', 'B', 'C'), joined.split((2, 2, 2), -1), strict=True))
    x = tensors['x'].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    strided = {**tensors, **parts, 'x': x}
    leaves = [v.requires_grad_() for v in strided.values()]
    out = cross_scan(**strided, delta_softplus=True)
    assert out.is_contiguous()
    for one, two in zip((out, *gradients([out], leaves)), expected, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize('routes', [ROUTES, *SUBSETS], ids='-'.join)
def test_gradcheck(routes):
    tensors = cross_scan_inputs(1, 2, 3, 2, 2, len(routes), 1)

    def function(*values):
        given = dict(zip(tensors, values, strict=True))
        return cross_scan(**given, routes=routes, delta_softplus=True, backend='torch')

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors.values()])


def test_gradients_are_deterministic(backend, device):
    need(backend, 'selective_scan', device, torch.float32)
    tensors = cross_scan_inputs(2, 9, 8, 8, 2, rank=2, dtype=torch.float32, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (run(tensors, delta_softplus=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, one, two))


def test_results_do_not_depend_on_the_number_of_threads():
    need('compiled', 'selective_scan', 'cpu', torch.float32)
    tensors = cross_scan_inputs(1, 6, 7, 200, 1, rank=3, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(tensors, delta_softplus=True, backend='compiled'))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_nan_stays_where_it_is(backend, device, dtype):
    """In its channel and image forward; backward also in the sums over channels."""
    need(backend, 'selective_scan', device, torch.float32)
    tensors = cross_scan_inputs(2, 4, 5, 7, 1, dtype=dtype, device=device)
    tensors['x'][0, 1, 2, 3] = torch.nan
    out, *grads = run(tensors, delta_softplus=True)
    grads = dict(zip(tensors, grads, strict=True))
    others = [c for c in range(7) if c != 3]
    # Each position lies behind it on one of the routes.
    assert out[0, ..., 3].isnan().all()
    assert out[0][..., others].isfinite().all()
    assert out[1].isfinite().all()
    assert grads['C'][0].isnan().any()
    assert grads['C'][1].isfinite().all()
    for name in ('x', 'delta', 'B'):
        assert grads[name][1].isfinite().all(), name
    assert grads['delta'][0][..., others].isfinite().all()
    assert grads['A'][:, others].isfinite().all()
    assert grads['A'][:, 3].isnan().all()


def fused_inputs(device):
    """Of the op below, by name, and its other arguments."""
    tensors = cross_scan_inputs(1, 3, 4, 8, 1, 2, 2, dtype=torch.float32, device=device)
    options = {'routes': [0, 3], 'delta_softplus': True, 'discretization': 'zoh',
               'round_steps': 32, 'keep_checkpoints': True}  # fmt: skip
    return tensors | options


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'round_steps': 0}, 'round_steps must be .*got 0'),
        ({'round_steps': -32}, 'round_steps must be .*got -32'),
        ({'routes': []}, 'routes must not be empty'),
        ({'routes': [0, 4]}, 'routes are 0 to 3, got 4'),
        ({'routes': [0]}, 'delta_weight must have shape'),
        ({'discretization': 'none'}, 'discretization must be one of'),
        ({'x': lambda x: x[0]}, 'x must be .b, h, w, d.'),
        ({'delta': lambda x: x[..., :1]}, 'delta must have shape'),
        ({'delta_weight': lambda x: x[..., :0]}, 'delta_weight must be .k, d, r. with r > 0'),
        ({'A': lambda x: x[..., :0]}, 'A must be .k, d, n.'),
        ({'A': lambda x: x.double()}, 'A must be .*[Ff]loat'),
        ({'B': lambda x: x.bfloat16()}, 'B must be '),
        ({'D': lambda x: x.flatten()}, 'D must have shape'),
    ],
    ids=lambda value: '-'.join(value) if isinstance(value, dict) else '',
)
def test_the_fused_op_checks_its_arguments(device, changes, message):
    """It may be called without the checks of :func:`mmvim.ops.cross_scan`."""
    need('compiled', 'cross_scan_fused', device, torch.float32)
    given = fused_inputs(device)
    torch.ops.mmvim.cross_scan_fused(**given)
    for name, value in changes.items():
        given[name] = value(given[name]) if callable(value) else value
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.mmvim.cross_scan_fused(**given)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ('shape', 'changes', 'message'),
    [
        ((1, 5, 3, 4, 5, 2), {}, 'up to 4 states, got 5'),
        ((1, 5, 3, 4, 1, 129), {}, 'ranks up to 128, got 129'),
        ((1, 5, 3, 4, 1, 2), {'discretization': 'foh_hold'}, 'no CUDA kernel for'),
        ((1, 5, 3, 4, 1, 2), {'round_steps': 48}, 'round_steps must be a multiple of 32'),
        ((1, 64, 64, 4, 4, 128), {'round_steps': 256}, 'bytes of shared memory'),
    ],
    ids=str,
)  # fmt: skip
def test_the_fused_op_checks_what_its_cuda_kernels_cover(shape, changes, message):
    most = torch.cuda.get_device_properties('cuda').shared_memory_per_block_optin
    if 'shared memory' in message and most > 150_000:
        pytest.skip('the largest round fits into the shared memory of this GPU')
    b, h, w, d, n, rank = shape
    tensors = cross_scan_inputs(b, h, w, d, n, 1, min(rank, d), dtype=torch.float32, device='cuda')
    tensors['delta'] = torch.randn(b, h, w, 1, rank, device='cuda')
    tensors['delta_weight'] = torch.randn(1, d, rank, device='cuda')
    given = fused_inputs('cuda') | tensors | {'routes': [0]} | changes
    with pytest.raises(ValueError, match=message):
        torch.ops.mmvim.cross_scan_fused(**given)


@pytest.mark.parametrize('keep', [True, False])
def test_opcheck_of_the_fused_op(device, keep):
    need('compiled', 'cross_scan_fused', device, torch.float32)
    given = fused_inputs(device) | {'keep_checkpoints': keep}
    torch.library.opcheck(torch.ops.mmvim.cross_scan_fused.default, (), given)


def test_only_what_is_needed_gets_a_gradient():
    tensors = cross_scan_inputs(1, 2, 3, 2, 2, rank=1)
    tensors['B'].requires_grad_()
    cross_scan(**tensors, delta_softplus=True).sum().backward()
    assert tensors['B'].grad is not None
    assert tensors['x'].grad is None


def test_no_grad_recomputes_what_training_saves():
    """Without checkpoints backward gives the same."""
    tensors = cross_scan_inputs(2, 7, 6, 3, 4, rank=2)
    expected = run(tensors, delta_softplus=True, backend='torch')
    order = ('x', 'delta', 'delta_weight', 'A', 'B', 'C', 'D', 'delta_bias')
    inputs, options = [tensors[k] for k in order], ([0, 1, 2, 3], True, 'zoh', 0)
    ops = torch.ops.mmvim_torch
    out, checkpoints = ops.cross_scan(*inputs, *options)
    assert checkpoints.numel() == 0
    grads = ops.cross_scan_backward(randn(*out.shape, seed=1000), *inputs, checkpoints, *options)
    grads = dict(zip(order, grads, strict=True))
    torch.testing.assert_close(out, expected[0])
    for name, grad in zip(tensors, expected[1:], strict=True):
        torch.testing.assert_close(grads[name], grad)


def test_one_route_is_a_selective_scan_of_the_backend(backend, device):
    need(backend, 'selective_scan', device, torch.float32)
    tensors = cross_scan_inputs(2, 5, 6, 8, 16, 1, dtype=torch.float32, device=device)
    out = cross_scan(**tensors, delta_softplus=True, routes=('rows_reversed',))
    u = tensors.pop('x').flatten(1, 2)
    parts = {k: v[:, :, :, 0].flatten(1, 2) if v.dim() == 5 else v[0] for k, v in tensors.items()}
    expected = selective_scan(u, **parts, delta_softplus=True, reverse=True)
    assert torch.equal(out.flatten(1, 2), expected)
