"""The selective scan: Mamba's recurrence over a sequence (Gu and Dao, arXiv 2312.00752)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _validation as check
from ._autocast import autocast_dtype, to_activation, to_parameter
from ._library import compute_dtype, define
from .backend import is_exporting, resolve
from .discretization import TWO_TAP
from .selective_scan_torch import checkpoint_shape, scan_backward, scan_forward

# Steps between the states that forward keeps for backward: memory against recomputation.
CHECKPOINT_INTERVAL = {'cpu': 16, 'cuda': 32}
_CHECKPOINT_INTERVAL_ELSEWHERE = 16


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    discretization: str = 'zoh',
    reverse: bool = False,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
    check_values: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Run the discretized state-space model over time, for every channel.

    .. math::
        Δ_t = \mathrm{softplus}(\text{delta}_t + \text{delta\_bias}), \quad
        h_t = a\,h_{t-1} + w_0\,B_t u_t + w_1\,B_{t-1} u_{t-1}, \quad
        y_t = (C_t h_t + D u_t)\,\mathrm{silu}(z_t)

    with a, w0, w1 as in :mod:`mmvim.ops.discretization`. "Activation dtype" below is float32,
    bfloat16, float16 or float64; "parameter dtype" is float32, or float64 for float64 activations.
    Arithmetic is in the parameter dtype; the output is rounded once. Under autocast u, delta, B, C
    and z are cast to its dtype and the rest kept.

    Args:
        u: Input (b, l, d), activation dtype; b and l may be 0.
        delta: Step sizes (b, l, d), dtype of u.
        A: State matrix (d, n), negative, parameter dtype, n <= 256.
        B: Input matrix (b, l, n), or (b, l, g, n) with g dividing d: channel c uses group
            c // (d/g). dtype of u.
        C: Output matrix, same shape as B, dtype of u.
        D: Skip connection (d,), parameter dtype.
        z: Gate (b, l, d), dtype of u.
        delta_bias: Added to delta (d,), parameter dtype.
        delta_softplus: Apply softplus to delta (+ delta_bias).
        initial_state: State before the first step (b, d, n), parameter dtype. The two-tap methods
            ``foh_hold`` and ``tustin`` also take (b, d, 2n): the state and the previous B u.
        return_last_state: Also return the state after the last step, (b, d, n) or, for two-tap
            methods, (b, d, 2n). Passed to the next call as ``initial_state`` it continues exactly.
        discretization: One of :data:`mmvim.ops.DISCRETIZATIONS`.
        reverse: Scan from the last step to the first. The initial state then enters at the last
            step, and the last state is the one after the first step.
        seq_idx: Number of the sequence that each step belongs to, (b, l), int32, for sequences
            packed into one row. Wherever it changes from one step to the next, whatever the values,
            the state starts anew, from zero: outputs and gradients are those of a call for each
            sequence. The initial state is that of the sequence that the scan meets first, the last
            state that of the one it meets last.
        backend: ``'compiled'`` or ``'torch'``; None or ``'auto'`` leave it to
            :func:`mmvim.ops.use_backend`, :func:`mmvim.ops.set_backend` and ``MMVIM_BACKEND``.
        check_values: Look at the values of A, once for each version of the tensor. A GPU has to be
            waited for, so a caller whose A is negative by construction and new in every call, such
            as A = -exp(A_log), passes False.

    Returns:
        The output (b, l, d), dtype of u; with ``return_last_state`` also the state.

    Raises:
        TypeError: For a wrong type or dtype.
        ValueError: For a wrong shape, device, method or value (A must be negative).
        RuntimeError: If compiled kernels are demanded and there are none.
    """
    check.check_flag('check_values', check_values)
    if check_values:
        check.check_negative('A', A, u)
    dtype = autocast_dtype(u)
    if dtype is not None:
        u, delta, B, C, z = to_activation(dtype, u, delta, B, C, z)
        A, D, delta_bias, initial_state = to_parameter(dtype, A, D, delta_bias, initial_state)
    B, C = (grouped(x) for x in (B, C))
    check.check_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization)
    check.check_flag('reverse', reverse)
    check.check_flag('return_last_state', return_last_state)
    if initial_state is not None:
        _check_initial_state(initial_state, u, A, discretization)
    if seq_idx is not None:
        check.check_seq_idx(seq_idx, 'u', u)
    ops = resolve(backend, 'selective_scan', u)
    out, last_state, _ = ops.selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        initial_state,
        delta_softplus,
        discretization,
        reverse,
        return_last_state,
        checkpoint_interval(u, delta, A, B, C, D, z, delta_bias, initial_state),
        seq_idx,
    )
    return (out, last_state) if return_last_state else out


def grouped(x: object) -> object:
    """(b, l, n) to (b, l, 1, n); anything else unchanged."""
    if isinstance(x, Tensor) and not x.is_nested and x.dim() == 3:
        return x.unsqueeze(2)
    return x


def checkpoint_interval(*inputs: Tensor | None) -> int:
    """Steps between checkpoints; 0, nothing kept, if no gradient will be needed."""
    # torch.jit.trace traces once more without gradients, and compares the graphs.
    if is_exporting() or not (torch.is_grad_enabled() or torch.jit.is_tracing()):
        return 0
    if not any(x is not None and x.requires_grad for x in inputs):
        return 0
    return default_checkpoint_interval(inputs[0])


def default_checkpoint_interval(u: Tensor) -> int:
    """Steps between checkpoints for an input ``u`` that needs a gradient."""
    return CHECKPOINT_INTERVAL.get(u.device.type, _CHECKPOINT_INTERVAL_ELSEWHERE)


def _check_initial_state(initial_state: Tensor, u: Tensor, A: Tensor, discretization: str) -> None:
    name = 'initial_state'
    check.check_tensor(name, initial_state)
    b, _, d = u.shape
    n = A.shape[1]
    if not (discretization in TWO_TAP and tuple(initial_state.shape) == (b, d, 2 * n)):
        check.check_shape(name, initial_state, 'b d n', (b, d, n))
    check.check_dtype(name, initial_state, compute_dtype(u.dtype), why=f'u is {u.dtype}')
    check.check_device(name, initial_state, 'u', u.device)


def _forward(u, delta, A, B, C, D, z, delta_bias, initial_state, *options):
    inputs = u, delta, A, B, C, D, delta_bias, initial_state
    y, last_state, checkpoints = scan_forward(*inputs, *options)
    if z is not None:
        y.mul_(F.silu(z.to(y.dtype)))
    return y.to(u.dtype), last_state, checkpoints


def _forward_fake(*inputs):
    u, _, A = inputs[:3]
    _, discretization, _, return_last_state, interval, _ = inputs[9:]
    b, _, d = u.shape
    n = A.shape[1]
    taps = 2 if discretization in TWO_TAP else 1
    return (
        u.new_empty(u.shape),
        A.new_empty((b, d, taps * n) if return_last_state else (0,)),
        A.new_empty(checkpoint_shape(u, n, interval)),
    )


def gate_backward(grad_out: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y * silu(z), for y and z, in the compute dtype."""
    z = z.to(grad_out.dtype)
    sigmoid = torch.sigmoid(z)
    # silu′(z) = σ(z) (1 + z (1 − σ(z)))
    slope = torch.addcmul(torch.ones_like(z), z, 1 - sigmoid).mul_(sigmoid)
    return grad_out * sigmoid.mul_(z), slope.mul_(y).mul_(grad_out)


def _backward(grad_out, grad_last_state, *inputs):
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs[:9]
    *rest, seq_idx = inputs[9:]
    dtype = compute_dtype(u.dtype)
    grad_y = grad_out.to(dtype)
    if z is not None:
        grad_y = grad_y * F.silu(z.to(dtype))
    inputs = u, delta, A, B, C, D, delta_bias, initial_state
    grads = scan_backward(grad_y, grad_last_state, *inputs, *rest, z is not None, seq_idx)
    if z is None:
        dz = A.new_empty(0)
    else:
        dz = gate_backward(grad_out.to(dtype), grads.y, z)[1].to(z.dtype)
    return (*grads[:6], dz, grads.delta_bias, grads.initial_state)


def _backward_fake(grad_out, grad_last_state, *inputs):
    A = inputs[2]
    return tuple(A.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:9])


def _setup_context(ctx, inputs, output):
    *tensors, delta_softplus, discretization, reverse, return_last_state, interval, seq_idx = inputs
    _, last_state, checkpoints = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(checkpoints,) if return_last_state else (last_state, checkpoints))
    ctx.save_for_backward(*tensors, checkpoints, seq_idx)
    ctx.options = (delta_softplus, discretization, reverse, interval)


def _autograd(ops, ctx, grad_out, grad_last_state, _):
    *tensors, checkpoints, seq_idx = ctx.saved_tensors
    nothing = (None,) * 15
    if grad_out is None and grad_last_state is None:
        return nothing
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[0])
    grads = ops.selective_scan_backward(
        grad_out, grad_last_state, *tensors, checkpoints, *ctx.options, seq_idx
    )
    return tuple(
        grad if needed else None
        for grad, needed in zip((*grads, *nothing[:6]), ctx.needs_input_grad, strict=True)
    )


_INPUTS = (
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, '
    'Tensor? delta_bias, Tensor? initial_state'
)
define(
    f'selective_scan_backward(Tensor grad_out, Tensor? grad_last_state, {_INPUTS}, '
    'Tensor checkpoints, bool delta_softplus, str discretization, bool reverse, '
    'int checkpoint_interval, Tensor? seq_idx=None) -> (Tensor du, Tensor ddelta, Tensor dA, '
    'Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias, Tensor dinitial_state)',
    _backward,
    _backward_fake,
)
define(
    f'selective_scan({_INPUTS}, bool delta_softplus, str discretization, bool reverse, '
    'bool return_last_state, int checkpoint_interval, Tensor? seq_idx=None) '
    '-> (Tensor out, Tensor last_state, Tensor checkpoints)',
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
