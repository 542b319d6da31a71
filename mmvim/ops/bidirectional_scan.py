"""Two selective scans in opposite directions, summed and gated once."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _validation as check
from ._autocast import autocast_dtype, to_activation, to_parameter
from ._library import compute_dtype, define
from .backend import resolve
from .selective_scan import checkpoint_interval, gate_backward, grouped
from .selective_scan_torch import checkpoint_shape, scan_backward, scan_forward


class ScanInputs(NamedTuple):
    """Inputs of one direction, as for :func:`mmvim.ops.selective_scan`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    delta_bias: Tensor | None = None


def bidirectional_scan(
    forward: ScanInputs,
    backward: ScanInputs,
    z: Tensor | None = None,
    *,
    scale: float = 1.0,
    delta_softplus: bool = False,
    discretization: str = 'zoh',
    seq_idx: Tensor | None = None,
    backend: str | None = None,
    check_values: bool = True,
) -> Tensor:
    """Scan forwards and backwards over time and add: the core of a bidirectional Mamba block.

    Equals ``scale * (selective_scan(*forward) + selective_scan(*backward, reverse=True)) *
    silu(z)``, computed in one call and rounded once. Nothing is flipped: both directions' inputs
    are in the order of time.

    Args:
        forward: Inputs of the scan from the first step to the last; u (b, l, d), and so on.
        backward: Inputs of the scan from the last step to the first; same shapes and dtypes.
        z: Gate (b, l, d), dtype of u.
        scale: Factor of the sum, e.g. 0.5 for the mean.
        delta_softplus: Apply softplus to delta (+ delta_bias), in both directions.
        discretization: One of :data:`mmvim.ops.DISCRETIZATIONS`.
        seq_idx: Number of the sequence that each step belongs to, (b, l), int32: wherever it
            changes, both directions start anew, as in :func:`mmvim.ops.selective_scan`.
        backend, check_values: See :func:`mmvim.ops.selective_scan`.

    Returns:
        The output (b, l, d), dtype of u.

    Raises:
        TypeError: For a wrong type or dtype.
        ValueError: For a wrong shape, device, method or value (A must be negative).
        RuntimeError: If compiled kernels are demanded and there are none.
    """
    check.check_flag('check_values', check_values)
    forward, backward = _inputs('forward', forward), _inputs('backward', backward)
    if check_values:
        for name, x in (('forward', forward), ('backward', backward)):
            check.check_negative(f'A of {name}', x.A, x.u)
    dtype = autocast_dtype(forward.u)
    if dtype is not None:
        forward, backward = (_autocast(x, dtype) for x in (forward, backward))
        (z,) = to_activation(dtype, z)
    forward, backward = _grouped(forward), _grouped(backward)
    for name, x in (('forward', forward), ('backward', backward)):
        u, delta, A, B, C, D, delta_bias = x
        check.check_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            None,
            delta_bias,
            delta_softplus,
            discretization,
            suffix=f' of {name}',
        )
    check.check_number('scale', scale)
    name, first = 'u of backward', forward.u
    check.check_shape(name, backward.u, 'b l d', first.shape)
    check.check_dtype(name, backward.u, first.dtype, why='as u of forward')
    check.check_device(name, backward.u, 'u of forward', first.device)
    check.check_shape('A of backward', backward.A, 'd n', forward.A.shape)
    if z is not None:
        check.check_activation('z', z, 'b l d')
        check.check_shape('z', z, 'b l d', first.shape)
        check.check_dtype('z', z, first.dtype, why='as u of forward')
        check.check_device('z', z, 'u of forward', first.device)
    if seq_idx is not None:
        check.check_seq_idx(seq_idx, 'u of forward', first)
    ops = resolve(backend, 'bidirectional_scan', first)
    return ops.bidirectional_scan(
        *forward,
        *backward,
        z,
        float(scale),
        delta_softplus,
        discretization,
        checkpoint_interval(*forward, *backward, z),
        seq_idx,
    )[0]


def _inputs(name: str, values: object) -> ScanInputs:
    """The inputs of the direction ``name``, which may be a plain tuple."""
    if isinstance(values, ScanInputs):
        return values
    if not isinstance(values, tuple | list) or not 5 <= len(values) <= len(ScanInputs._fields):
        raise TypeError(
            f'{name} must be a ScanInputs, or a tuple of {", ".join(ScanInputs._fields)}, '
            f'got {type(values).__name__}'
        )
    return ScanInputs(*values)


def _grouped(x: ScanInputs) -> ScanInputs:
    # torch.compile of torch 2.6 cannot trace _replace of a named tuple.
    return ScanInputs(x.u, x.delta, x.A, grouped(x.B), grouped(x.C), x.D, x.delta_bias)


def _autocast(x: ScanInputs, dtype: torch.dtype) -> ScanInputs:
    u, delta, B, C = to_activation(dtype, x.u, x.delta, x.B, x.C)
    A, D, delta_bias = to_parameter(dtype, x.A, x.D, x.delta_bias)
    return ScanInputs(u, delta, A, B, C, D, delta_bias)


def _split(inputs):
    """The directions' inputs, and what follows them."""
    return ScanInputs(*inputs[:7]), ScanInputs(*inputs[7:14]), inputs[14:]


def _forward(*inputs):
    forward, backward, rest = _split(inputs)
    z, scale, delta_softplus, discretization, interval, seq_idx = rest
    results = [
        scan_forward(*x, None, delta_softplus, discretization, reverse, False, interval, seq_idx)
        for x, reverse in ((forward, False), (backward, True))
    ]
    (y, _, checkpoints_f), (y_b, _, checkpoints_b) = results
    y.add_(y_b)
    dtype = forward.u.dtype
    keep = z is not None and interval > 0
    pregate = y.to(dtype, copy=True) if keep else y.new_empty(0, dtype=dtype)
    if scale != 1:
        y.mul_(scale)
    if z is not None:
        y.mul_(F.silu(z.to(y.dtype)))
    return y.to(dtype), pregate, checkpoints_f, checkpoints_b


def _forward_fake(*inputs):
    forward, backward, (z, _, _, _, interval, _) = _split(inputs)
    u, A = forward.u, forward.A
    return (
        u.new_empty(u.shape),
        u.new_empty(u.shape if z is not None and interval > 0 else (0,)),
        A.new_empty(checkpoint_shape(u, A.shape[1], interval)),
        A.new_empty(checkpoint_shape(u, backward.A.shape[1], interval)),
    )


def _backward(grad_out, *inputs):
    forward, backward, rest = _split(inputs)
    z, pregate, checkpoints_f, checkpoints_b = rest[:4]
    scale, delta_softplus, discretization, interval, seq_idx = rest[4:]
    dtype = compute_dtype(grad_out.dtype)
    grad_y = grad_out.to(dtype)
    if scale != 1:
        grad_y = grad_y * scale
    grad_scaled = grad_y
    if z is not None:
        grad_y = grad_y * F.silu(z.to(dtype))
    need_y = z is not None and interval == 0
    results = [
        scan_backward(
            grad_y,
            None,
            *x,
            None,
            checkpoints,
            delta_softplus,
            discretization,
            reverse,
            interval,
            need_y,
            seq_idx,
        )
        for x, checkpoints, reverse in (
            (forward, checkpoints_f, False),
            (backward, checkpoints_b, True),
        )
    ]
    if z is None:
        dz = forward.A.new_empty(0)
    else:
        y = results[0].y.add_(results[1].y) if need_y else pregate.to(dtype)
        dz = gate_backward(grad_scaled, y, z)[1].to(z.dtype)
    return (*results[0][:7], *results[1][:7], dz)


def _backward_fake(grad_out, *inputs):
    forward, backward, rest = _split(inputs)
    return tuple(
        forward.A.new_empty(0) if x is None else x.new_empty(x.shape)
        for x in (*forward, *backward, rest[0])
    )


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    *options, seq_idx = inputs[15:]
    ctx.save_for_backward(*inputs[:15], *output[1:], seq_idx)
    ctx.options = options


def _autograd(ops, ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * 20
    *tensors, seq_idx = ctx.saved_tensors
    grads = ops.bidirectional_scan_backward(grad_out, *tensors, *ctx.options, seq_idx)
    return tuple(
        grad if needed else None
        for grad, needed in zip((*grads, *(None,) * 5), ctx.needs_input_grad, strict=True)
    )


_INPUTS = ', '.join(
    f'Tensor u_{x}, Tensor delta_{x}, Tensor A_{x}, Tensor B_{x}, Tensor C_{x}, Tensor? D_{x}, '
    f'Tensor? delta_bias_{x}'
    for x in 'fb'
)
_GRADIENTS = ', '.join(
    f'Tensor du_{x}, Tensor ddelta_{x}, Tensor dA_{x}, Tensor dB_{x}, Tensor dC_{x}, '
    f'Tensor dD_{x}, Tensor ddelta_bias_{x}'
    for x in 'fb'
)
_OPTIONS = (
    'float scale, bool delta_softplus, str discretization, int checkpoint_interval, '
    'Tensor? seq_idx=None'
)
define(
    f'bidirectional_scan_backward(Tensor grad_out, {_INPUTS}, Tensor? z, Tensor pregate, '
    f'Tensor checkpoints_f, Tensor checkpoints_b, {_OPTIONS}) -> ({_GRADIENTS}, Tensor dz)',
    _backward,
    _backward_fake,
)
define(
    f'bidirectional_scan({_INPUTS}, Tensor? z, {_OPTIONS}) '
    '-> (Tensor out, Tensor pregate, Tensor checkpoints_f, Tensor checkpoints_b)',
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
