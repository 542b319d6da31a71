"""Selective scans of a map along several routes, summed: the core of VMamba's SS2D.

Liu et al.: VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _validation as check
from . import extension
from ._autocast import autocast_dtype, to_activation, to_parameter
from ._library import compute_dtype, define, define_compiled
from .backend import resolve
from .discretization import DISCRETIZATIONS, TWO_TAP
from .selective_scan import checkpoint_interval, default_checkpoint_interval
from .selective_scan_torch import checkpoint_shape

#: Orders in which a map can be read. The op knows them by number: bit 0 says column by column, bit
#: 1 from the end.
ROUTES = ('rows', 'columns', 'rows_reversed', 'columns_reversed')


def cross_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_weight: Tensor | None = None,
    routes: Sequence[str] = ROUTES,
    delta_softplus: bool = False,
    discretization: str = 'zoh',
    backend: str | None = None,
    check_values: bool = True,
) -> Tensor:
    """Scan a map along each route with the route's own parameters, and add the outputs.

    Equals the sum over k of ``selective_scan`` of the positions of x in the order of ``routes[k]``,
    put back in their places. All tensors are in the order of the map; nothing has to be permuted.
    Arithmetic and the sum are in float32 (float64 for float64); the output is rounded once. Dtypes
    are as in :func:`mmvim.ops.selective_scan`.

    Args:
        x: Map (b, h, w, d), channels last; b, h and w may be 0.
        delta: Step sizes (b, h, w, k, d), or with ``delta_weight`` their low rank (b, h, w, k, r).
            dtype of x.
        A: State matrices (k, d, n), negative, parameter dtype, n <= 256.
        B: Input matrices (b, h, w, k, n), dtype of x.
        C: Output matrices, same shape as B, dtype of x.
        D: Skip connections (k, d), parameter dtype.
        delta_bias: Added to the step sizes (k, d), parameter dtype.
        delta_weight: Makes step sizes of their low rank (k, d, r), dtype of x or parameter dtype.
        routes: One of :data:`mmvim.ops.ROUTES` for each k; a route may occur more than once.
        delta_softplus: Apply softplus to the step sizes (+ delta_bias).
        discretization: One of :data:`mmvim.ops.DISCRETIZATIONS`.
        backend, check_values: See :func:`mmvim.ops.selective_scan`.

    Returns:
        The sum (b, h, w, d), dtype of x.

    Raises:
        TypeError: For a wrong type or dtype.
        ValueError: For a wrong shape, device, route, method or value (A must be negative).
        RuntimeError: If compiled kernels are demanded and there are none.
    """
    check.check_flag('check_values', check_values)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, delta, B, C = to_activation(dtype, x, delta, B, C)
        A, D, delta_bias, delta_weight = to_parameter(dtype, A, D, delta_bias, delta_weight)
    numbers = _numbers(routes)
    _check(x, delta, A, B, C, D, delta_bias, delta_weight, len(numbers))
    if check_values:
        check.check_negative('A', A, x)
    check.check_flag('delta_softplus', delta_softplus)
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f'discretization must be one of {DISCRETIZATIONS}, got {discretization!r}')
    ops = resolve(backend, 'selective_scan', x)
    interval = checkpoint_interval(x, delta, delta_weight, A, B, C, D, delta_bias)
    if interval:
        interval = (
            _round_steps(ops, x, delta_weight, A, numbers, delta_softplus, discretization)
            or interval
        )
    return ops.cross_scan(
        x,
        delta,
        delta_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        numbers,
        delta_softplus,
        discretization,
        interval,
    )[0]


def _numbers(routes: Sequence[str]) -> list[int]:
    if isinstance(routes, str) or not isinstance(routes, Sequence) or not routes:
        raise ValueError(f'routes must be a sequence of {ROUTES}, got {routes!r}')
    for route in routes:
        if route not in ROUTES:
            raise ValueError(f'routes must be among {ROUTES}, got {route!r}')
    return [ROUTES.index(route) for route in routes]


def _check(x, delta, A, B, C, D, delta_bias, delta_weight, k):
    check.check_activation('x', x, 'b h w d')
    *places, d = x.shape
    check.check_tensor('A', A)
    check.check_rank('A', A, 'k d n')
    n = A.shape[2]
    if not 1 <= n <= check.MAX_STATES:
        raise ValueError(f'A must have 1 to {check.MAX_STATES} states, got shape {tuple(A.shape)}')
    width = d
    wide = compute_dtype(x.dtype)
    why = f'x is {x.dtype}'
    if delta_weight is not None:
        check.check_tensor('delta_weight', delta_weight)
        check.check_rank('delta_weight', delta_weight, 'k d r')
        width = delta_weight.shape[2]
        check.check_dtype('delta_weight', delta_weight, x.dtype, wide, why=why)
    for name, value, last, size in (
        ('delta', delta, 'd' if delta_weight is None else 'r', width),
        ('B', B, 'n', n),
        ('C', C, 'n', n),
    ):
        check.check_tensor(name, value)
        check.check_shape(name, value, f'b h w k {last}', (*places, k, size))
        check.check_dtype(name, value, x.dtype, why='as x')
        check.check_device(name, value, 'x', x.device)
    for name, value, axes, shape in (
        ('A', A, 'k d n', (k, d, n)),
        ('D', D, 'k d', (k, d)),
        ('delta_bias', delta_bias, 'k d', (k, d)),
        ('delta_weight', delta_weight, 'k d r', (k, d, width)),
    ):
        if value is not None:
            check.check_tensor(name, value)
            check.check_shape(name, value, axes, shape)
            check.check_device(name, value, 'x', x.device)
            if name != 'delta_weight':
                check.check_dtype(name, value, wide, why=why)


def _has_kernels(device_type: str, dtype: torch.dtype) -> bool:
    if not extension.supports('cross_scan_fused', device_type, dtype):
        return False
    return device_type != 'cuda' or torch.cuda.get_device_capability()[0] >= 8


# As of backend._compiled: constant while a graph lives.
_has_kernels._dynamo_marked_constant = True


def _round_steps(ops, x, delta_weight, A, routes, delta_softplus, discretization) -> int:
    rank = None if delta_weight is None else delta_weight.shape[2]
    return (
        0
        if ops is not torch.ops.mmvim
        else round_steps(
            x, x.dtype, x.shape[3], rank, A.shape[2], len(routes), delta_softplus, discretization
        )
    )


def round_steps(
    x: Tensor,
    dtype: torch.dtype,
    d: int,
    rank: int | None,
    n: int,
    k: int,
    delta_softplus: bool,
    discretization: str,
) -> int:
    """Steps between checkpoints of the kernels that take all routes at once; 0 where they do not.

    Those read the map where it lies and sum in float32 on the way. On CUDA they do not cover the
    two-tap methods, more states, routes and ranks than these, float64, and GPUs before compute
    capability 8.0: there, and without compiled kernels, each route is a selective scan of a copy.
    """
    if not _has_kernels(x.device.type, dtype) or rank == 0:
        return 0
    if x.device.type == 'cpu':
        return default_checkpoint_interval(x)
    rank = rank or 0
    if discretization in TWO_TAP or n > 4 or k > 16 or rank > 128:
        return 0
    # What the kernels of one state cover; the others keep the columns of Δ, B and C of each warp of
    # 32 steps in shared memory.
    one = discretization == 'zoh' and n == 1 and delta_softplus and rank > 0
    if one and d % 4 == 0 and (rank % 2 == 0 or dtype == torch.float32):
        return 512
    return 32 * max(1, min(8, 448 // (rank + 2 * n)))


def _sequence(x: Tensor, route: int) -> Tensor:
    """(b, h, w, ...) to (b, l, ...), row by row or column by column."""
    return (x.transpose(1, 2) if route & 1 else x).flatten(1, 2)


def _map(x: Tensor, like: Tensor, route: int) -> Tensor:
    """(b, l, ...) to (b, h, w, ...), the size of ``like``: undoes :func:`_sequence`."""
    h, w = like.shape[1:3]
    return x.unflatten(1, (w, h)).transpose(1, 2) if route & 1 else x.unflatten(1, (h, w))


class _Scans:
    """The inputs of each route's scan, in the compute dtype, of which the sum is rounded."""

    def __init__(self, x, delta, delta_weight, A, B, C, D, delta_bias, routes):
        self.tensors = delta, delta_weight, A, B, C, D, delta_bias
        self.dtype = compute_dtype(x.dtype)
        # Two routes and their reverses read the same two sequences.
        x = x.to(self.dtype)
        self.u = {order: _sequence(x, order) for order in {route & 1 for route in routes}}

    def low_rank(self, index: int, route: int) -> Tensor:
        return _sequence(self.tensors[0][:, :, :, index], route).to(self.dtype)

    def weight(self, index: int) -> Tensor:
        return self.tensors[1][index].to(self.dtype)

    def of(self, index: int, route: int) -> tuple[Tensor | None, ...]:
        """Arguments of the selective scan's op from u to the initial state."""
        _, weight, A, B, C, D, delta_bias = self.tensors
        delta = self.low_rank(index, route)
        if weight is not None:
            delta = F.linear(delta, self.weight(index))
        B, C = (_sequence(x[:, :, :, index : index + 1], route).to(self.dtype) for x in (B, C))
        D, delta_bias = (None if x is None else x[index] for x in (D, delta_bias))
        return self.u[route & 1], delta, A[index], B, C, D, None, delta_bias, None


def _forward(
    ops,
    x,
    delta,
    delta_weight,
    A,
    B,
    C,
    D,
    delta_bias,
    routes,
    delta_softplus,
    discretization,
    interval,
):
    steps = _round_steps(ops, x, delta_weight, A, routes, delta_softplus, discretization)
    if steps and interval in (0, steps):
        tensors = x, delta, delta_weight, A, B, C, D, delta_bias
        return ops.cross_scan_fused(
            *tensors, routes, delta_softplus, discretization, steps, interval > 0
        )
    scans = _Scans(x, delta, delta_weight, A, B, C, D, delta_bias, routes)
    sums: dict[int, Tensor] = {}
    kept = []
    for index, route in enumerate(routes):
        y, _, checkpoints = ops.selective_scan(
            *scans.of(index, route), delta_softplus, discretization, route >= 2, False, interval
        )
        order = route & 1
        sums[order] = sums[order].add_(y) if order in sums else y
        kept.append(checkpoints)
    maps = [_map(y, x, order) for order, y in sums.items()]
    out = maps[0] if len(maps) == 1 else maps[0] + maps[1]
    checkpoints = torch.stack(kept) if interval else A.new_empty(0)
    return out.to(x.dtype).contiguous(), checkpoints


def _forward_fake(*inputs):
    x, _, _, A = inputs[:4]
    routes, interval = inputs[8], inputs[11]
    b, h, w, d = x.shape
    shape = checkpoint_shape(x.new_empty((b, h * w, d)), A.shape[2], interval)
    return x.new_empty(x.shape), A.new_empty((len(routes), *shape) if interval else (0,))


def _backward(
    ops,
    grad_out,
    x,
    delta,
    delta_weight,
    A,
    B,
    C,
    D,
    delta_bias,
    checkpoints,
    routes,
    delta_softplus,
    discretization,
    interval,
):
    if interval and interval == _round_steps(
        ops, x, delta_weight, A, routes, delta_softplus, discretization
    ):
        tensors = x, delta, delta_weight, A, B, C, D, delta_bias, checkpoints
        return ops.cross_scan_fused_backward(
            grad_out, *tensors, routes, delta_softplus, discretization, interval
        )
    scans = _Scans(x, delta, delta_weight, A, B, C, D, delta_bias, routes)
    grad_out = grad_out.to(scans.dtype)
    grads = {order: _sequence(grad_out, order) for order in scans.u}
    inputs = delta, delta_weight, A, B, C, D, delta_bias
    results = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
               for t in inputs]  # fmt: skip
    ddelta, dweight, dA, dB, dC, dD, dbias = results
    dx: dict[int, Tensor] = {}
    for index, route in enumerate(routes):
        order = route & 1
        du, dstep, dA_k, dB_k, dC_k, dD_k, _, dbias_k, _ = ops.selective_scan_backward(
            grads[order],
            None,
            *scans.of(index, route),
            checkpoints[index] if interval else checkpoints,
            delta_softplus,
            discretization,
            route >= 2,
            interval,
        )
        dx[order] = dx[order].add_(du) if order in dx else du
        if dweight is not None:
            low_rank = scans.low_rank(index, route)
            dweight[index] = dstep.flatten(0, 1).t() @ low_rank.flatten(0, 1)
            dstep = dstep @ scans.weight(index)
        ddelta[:, :, :, index] = _map(dstep, x, route)
        dB[:, :, :, index] = _map(dB_k.squeeze(2), x, route)
        dC[:, :, :, index] = _map(dC_k.squeeze(2), x, route)
        for total, part in ((dA, dA_k), (dD, dD_k), (dbias, dbias_k)):
            if total is not None:
                total[index] = part
    maps = [_map(part, x, order) for order, part in dx.items()]
    total = maps[0] if len(maps) == 1 else maps[0] + maps[1]
    total = total.to(x.dtype).contiguous()
    return total, *(A.new_empty(0) if grad is None else grad for grad in results)


def _backward_fake(grad_out, *inputs):
    A = inputs[3]
    return tuple(A.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:8])


def _setup_context(ctx, inputs, output):
    *tensors, routes, delta_softplus, discretization, interval = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = (routes, delta_softplus, discretization, interval)


def _autograd(ops, ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 12
    grads = ops.cross_scan_backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return tuple(
        grad if needed else None
        for grad, needed in zip((*grads, *(None,) * 4), ctx.needs_input_grad, strict=True)
    )


def _fused_fake(*inputs):
    *tensors, round_steps, keep = inputs
    return _forward_fake(*tensors, round_steps if keep else 0)


_INPUTS = (
    'Tensor x, Tensor delta, Tensor? delta_weight, Tensor A, Tensor B, Tensor C, Tensor? D, '
    'Tensor? delta_bias'
)
_METHOD = 'int[] routes, bool delta_softplus, str discretization'
_OPTIONS = f'{_METHOD}, int checkpoint_interval'
_GRADIENTS = (
    '(Tensor dx, Tensor ddelta, Tensor ddelta_weight, Tensor dA, Tensor dB, Tensor dC, Tensor dD, '
    'Tensor ddelta_bias)'
)
define_compiled(
    f'cross_scan_fused_backward(Tensor grad_out, {_INPUTS}, Tensor checkpoints, {_METHOD}, '
    f'int round_steps) -> {_GRADIENTS}',
    _backward_fake,
)
define_compiled(
    f'cross_scan_fused({_INPUTS}, {_METHOD}, int round_steps, bool keep_checkpoints) '
    '-> (Tensor out, Tensor checkpoints)',
    _fused_fake,
)
define(
    f'cross_scan_backward(Tensor grad_out, {_INPUTS}, Tensor checkpoints, {_OPTIONS}) -> '
    f'{_GRADIENTS}',
    _backward,
    _backward_fake,
    composite=True,
)
define(
    f'cross_scan({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor checkpoints)',
    _forward,
    _forward_fake,
    composite=True,
    setup_context=_setup_context,
    backward=_autograd,
)
