"""The selective scan as mamba_ssm and VMamba call it: channels before time, dtypes as given.

Like the packages' own kernels, these functions do not look at autocast and accept any A; unlike
:func:`mmvim.ops.selective_scan_fn`, which does and refuses one that is not negative.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmvim.ops import _validation as check
from mmvim.ops import compat
from mmvim.ops._library import compute_dtype
from mmvim.ops.backend import resolve
from mmvim.ops.selective_scan import checkpoint_interval, default_checkpoint_interval

#: Steps that share one row of the kernels' intermediate states.
_CHUNK = 2048


def _arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> tuple[Tensor | None, ...]:
    """Checked arguments, time before channels."""
    arguments = compat.time_first(u, delta, A, B, C, D, z, delta_bias)
    check.check_scan(*arguments, delta_softplus, 'zoh')
    return arguments


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    seq_idx: Tensor | None = None,
    *,
    reverse: bool = False,
    contiguous: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """mamba_ssm's ``selective_scan_fn``, with the arguments of mmvim's; differentiable.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, seq_idx: As there.
        reverse: Scan from the last step to the first.
        contiguous: Copy the output to the layout of mamba_ssm's, whose time is contiguous; else
            channels are.
    """
    delta_softplus = check.as_flag('delta_softplus', delta_softplus)
    return_last_state = check.as_flag('return_last_state', return_last_state)
    arguments = _arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if seq_idx is not None:
        check.check_seq_idx(seq_idx, 'u', arguments[0])
    op = resolve(None, 'selective_scan', arguments[0]).selective_scan
    interval = checkpoint_interval(*arguments)
    out, last_state, _ = op(
        *arguments, None, delta_softplus, 'zoh', reverse, return_last_state, interval, seq_idx
    )
    out = out.transpose(1, 2).to(u.dtype)
    if contiguous:
        out = out.contiguous()
    return (out, last_state) if return_last_state else out


def _gate(out: Tensor, z: Tensor) -> Tensor:
    wide = compute_dtype(out.dtype)
    return (out.to(wide) * F.silu(z.to(wide))).to(out.dtype)


@torch.no_grad()
def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """The kernels' ``fwd``.

    Args:
        u, delta, z: (b, d, l).
        A: (d, n), real.
        B, C: (b, g, n, l), (b, n, l) or (d, n).
        D, delta_bias: (d,).
        delta_softplus: Apply softplus to delta + delta_bias.

    Returns:
        The output before the gate (b, d, l); a tensor (b, d, chunks, 2n) in place of the
        intermediate states, with the last state at ``[:, :, -1, 1::2]`` and zeros elsewhere; and
        with z the gated output.
    """
    delta_softplus = check.as_flag('delta_softplus', delta_softplus)
    arguments = list(_arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus))
    arguments[6] = None
    op = resolve(None, 'selective_scan', arguments[0]).selective_scan
    out, last_state, _ = op(*arguments, None, delta_softplus, 'zoh', False, True, 0, None)
    out = out.transpose(1, 2).to(u.dtype).contiguous()
    b, d, n = last_state.shape
    x = last_state.new_zeros((b, d, max(1, -(-u.shape[2] // _CHUNK)), 2 * n))
    x[:, :, -1, 1::2] = last_state
    return [out, x] if z is None else [out, x, _gate(out, z)]


@torch.no_grad()
def backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """The kernels' ``bwd``; the intermediate states are computed again.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus: As given to :func:`forward`.
        dout: Gradient of the (gated) output, (b, d, l).
        out: The output before the gate, for ``recompute_out_z``.
        dz: Written to and returned as the gradient of z, if given.
        recompute_out_z: Also return the gated output.

    Returns:
        Gradients of u, delta, A, B, C, D and delta_bias, each with shape and dtype of its tensor
        or None, and with z the gradient of z, then on request the gated output.
    """
    delta_softplus = check.as_flag('delta_softplus', delta_softplus)
    arguments = _arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    check.check_activation('dout', dout, 'b d l')
    check.check_shape('dout', dout, 'b d l', u.shape)
    first = arguments[0]
    ops = resolve(None, 'selective_scan', first)
    interval = default_checkpoint_interval(first)
    ungated = (*arguments[:6], None, arguments[7])
    y, _, checkpoints = ops.selective_scan(
        *ungated, None, delta_softplus, 'zoh', False, False, interval
    )
    grads = ops.selective_scan_backward(
        dout.transpose(1, 2).to(first.dtype),
        None,
        *arguments,
        None,
        checkpoints,
        delta_softplus,
        'zoh',
        False,
        interval,
    )
    du, ddelta, dA, dB, dC, dD, dz_, dbias, _ = grads
    results = [
        du.transpose(1, 2).to(u.dtype).contiguous(),
        ddelta.transpose(1, 2).to(delta.dtype).contiguous(),
        dA,
        _matrix_gradient(dB, B),
        _matrix_gradient(dC, C),
        None if D is None else dD,
        None if delta_bias is None else dbias,
    ]
    if z is not None:
        dz_ = dz_.transpose(1, 2).to(z.dtype)
        results.append(dz_.contiguous() if dz is None else dz.copy_(dz_))
        if recompute_out_z:
            y = y.transpose(1, 2).to(u.dtype).contiguous() if out is None else out
            results.append(_gate(y, z))
    return results


def _matrix_gradient(gradient: Tensor, matrix: Tensor) -> Tensor:
    """The gradient of B or C from that of the (b, l, g, n) that was made of it."""
    if matrix.dim() == 2:
        return gradient.sum((0, 1)).to(matrix.dtype)
    groups = 1 if matrix.dim() == 3 else matrix.shape[1]
    if gradient.shape[2] != groups:  # repeated for each channel
        gradient = gradient.unflatten(2, (groups, -1)).sum(3)
    return gradient.permute(0, 2, 3, 1).reshape(matrix.shape).to(matrix.dtype)
