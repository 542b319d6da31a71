"""mmvim's ops in terms that exporters support, for inference.

During an export, :func:`portable_ops` replaces the registered ops by these. The
scan is a loop over steps (PyTorch's ``scan`` operator, or a scripted loop for TorchScript), so that
a graph does not grow with the number of tokens and accepts any number of them. The reverse
direction runs the loop from its end.
"""

import functools
from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from mmvim.ops import intercept_ops
from mmvim.ops._library import compute_dtype
from mmvim.ops.causal_conv1d import of_last, padded_numbers, taps_before, within
from mmvim.ops.discretization import coefficients

from . import onnx_scan

KINDS = ('graph', 'onnx', 'onnx_custom', 'script')

Loop = Callable[..., tuple[Tensor, Tensor]]


def _hold(h: Tensor, delta: Tensor, drive: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """One step of 'zoh': e^{ΔA} h + drive B. delta, drive (..., d), B (..., n), A (..., n, d)."""
    return torch.exp(delta.unsqueeze(-2) * A) * h + drive.unsqueeze(-2) * B.unsqueeze(-1)


def _graph_zoh(
    delta: Tensor,
    drive: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    start: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Loop over the second axis of delta, drive (b, l, ..., d) and B, C (b, l, ..., n).

    Returns:
        y (b, l, ..., d), and the last state (b, ..., n, d).
    """
    from torch._higher_order_ops.scan import scan

    def step(h: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        delta_t, drive_t, B_t, C_t = inputs
        h = _hold(h, delta_t, drive_t, A, B_t)
        return h, torch.matmul(C_t.unsqueeze(-2), h).squeeze(-2)

    if start is None:
        start = delta.new_zeros((B.shape[0], *B.shape[2:], delta.shape[-1]))
    end, y = scan(step, start, (delta, drive, B, C), dim=1, reverse=reverse)
    return y, end


def _graph_general(
    a: Tensor, drive: Tensor, C: Tensor, start: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The same with precomputed coefficients: a, drive (b, l, ..., n, d)."""
    from torch._higher_order_ops.scan import scan

    def step(h: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        a_t, drive_t, C_t = inputs
        h = a_t * h + drive_t
        return h, torch.matmul(C_t.unsqueeze(-2), h).squeeze(-2)

    if start is None:
        start = torch.zeros_like(drive[:, 0])
    end, y = scan(step, start, (a, drive, C), dim=1, reverse=reverse)
    return y, end


def _script_zoh(
    delta: Tensor,
    drive: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    start: Optional[Tensor],  # noqa: UP045 (TorchScript)
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    steps = delta.size(1)
    out = torch.empty_like(delta)
    h = torch.zeros_like(delta[:, 0]).unsqueeze(-2) * A if start is None else start
    for i in range(steps):
        t = steps - 1 - i if reverse else i
        decay = torch.exp(delta[:, t].unsqueeze(-2) * A)
        h = decay * h + drive[:, t].unsqueeze(-2) * B[:, t].unsqueeze(-1)
        out[:, t] = torch.matmul(C[:, t].unsqueeze(-2), h).squeeze(-2)
    return out, h


def _script_general(
    a: Tensor,
    drive: Tensor,
    C: Tensor,
    start: Optional[Tensor],  # noqa: UP045 (TorchScript)
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    steps = drive.size(1)
    out = torch.empty_like(drive[..., 0, :])
    h = torch.zeros_like(drive[:, 0]) if start is None else start
    for i in range(steps):
        t = steps - 1 - i if reverse else i
        h = a[:, t] * h + drive[:, t]
        out[:, t] = torch.matmul(C[:, t].unsqueeze(-2), h).squeeze(-2)
    return out, h


@functools.cache
def _loops(kind: str) -> tuple[Loop, Loop]:
    if kind == 'graph':
        return _graph_zoh, _graph_general
    if kind == 'onnx':
        return onnx_scan.scan_zoh, onnx_scan.scan_general
    return torch.jit.script(_script_zoh), torch.jit.script(_script_general)


def _direction(
    kind: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    method: str,
    reverse: bool,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One direction without gate, in the compute dtype, and its last state."""
    dtype, groups, states = compute_dtype(u.dtype), *B.shape[2:]
    u, delta, B, C = (x.to(dtype) for x in (u, delta, B, C))
    if kind == 'onnx_custom':
        optional = (None if x is None else x.to(dtype) for x in (D, delta_bias, initial_state))
        inputs = u, delta, A.to(dtype), B, C, *optional, seq_idx
        return onnx_scan.custom_scan(inputs, delta_softplus, method, reverse)
    zoh, general = _loops(kind)
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = (onnx_scan.softplus if kind == 'onnx' else F.softplus)(delta)

    def inward(x: Tensor) -> Tensor:
        """(..., d, n) to (..., g, n, d / g), or to (..., n, d) without groups."""
        x = x if groups == 1 else x.unflatten(-2, (groups, -1))
        return x.transpose(-1, -2).contiguous()

    def outward(x: Tensor) -> Tensor:
        x = x.transpose(-1, -2)
        return x if groups == 1 else x.flatten(-3, -2)

    A, start = inward(A), None
    if initial_state is not None:
        start = inward(initial_state[..., :states])
    if groups == 1:
        B, C = B.squeeze(2), C.squeeze(2)
        u_g, delta_g = u, delta
    else:
        u_g, delta_g = (x.unflatten(-1, (groups, -1)) for x in (u, delta))
    if method == 'zoh' and seq_idx is None:
        inputs = (x.contiguous() for x in (delta_g, delta_g * u_g, A, B, C))
        y, end = zoh(*inputs, start, reverse)
        end = outward(end)
    else:
        step = delta_g.unsqueeze(-2)
        a, w0, w1 = coefficients(method, step, step * A)
        v = u_g.unsqueeze(-2) * B.unsqueeze(-1)
        drive = w0 * v
        if seq_idx is not None:
            same = _continues(seq_idx, v, reverse)
            a, w1 = a * same, None if w1 is None else w1 * same
        if w1 is not None:
            # The previous drive in the order of the scan.
            before = torch.zeros_like(v[:, :1])
            if initial_state is not None and initial_state.shape[-1] > states:
                before = inward(initial_state[..., states:]).unsqueeze(1)
            drive = drive + w1 * torch.cat(
                (v[:, 1:], before) if reverse else (before, v[:, :-1]), dim=1
            )
        y, end = general(a, drive, C.contiguous(), start, reverse)
        end = outward(end)
        if w1 is not None:
            end = torch.cat((end, outward(v[:, 0] if reverse else v[:, -1])), dim=-1)
    if groups > 1:
        y = y.flatten(-2)
    if D is not None:
        y = y + u * D
    return y, end


def _continues(seq_idx: Tensor, like: Tensor, reverse: bool) -> Tensor:
    """1 for the steps of ``like`` (b, l, ...) that continue a sequence, 0 for its first."""
    same = (seq_idx[:, 1:] == seq_idx[:, :-1]).to(like.dtype)
    same = F.pad(same, (0, 1) if reverse else (1, 0), value=1.0)
    return same.reshape(*same.shape, *(1,) * (like.dim() - 2))


def _gated(y: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(dtype)


def _selective_scan(kind, _, u, delta, A, B, C, D, z, delta_bias, initial_state, *options):
    delta_softplus, discretization, reverse, return_last_state, _, seq_idx = (*options, None)[:6]
    inputs = u, delta, A, B, C, D, delta_bias
    options = delta_softplus, discretization, reverse, initial_state, seq_idx
    y, end = _direction(kind, *inputs, *options)
    nothing = A.new_empty(0)
    return _gated(y, z, u.dtype), end if return_last_state else nothing, nothing


def _bidirectional_scan(kind, _, *inputs):
    z, scale, delta_softplus, discretization, _, seq_idx = (*inputs, None)[14:20]
    options = delta_softplus, discretization
    y, y_b = (
        _direction(kind, *inputs[start : start + 7], *options, reverse, None, seq_idx)[0]
        for start, reverse in ((0, False), (7, True))
    )
    y = y + y_b
    if scale != 1:
        y = y * scale
    return (_gated(y, z, inputs[0].dtype),)


def _cross_scan(kind, _, x, delta, delta_weight, A, B, C, D, delta_bias, *options):
    routes, delta_softplus, discretization, _ = options
    rows, columns = x.shape[1:3]
    sums = {}
    for k, route in enumerate(routes):
        by_column = route % 2 == 1

        def sequence(t, by_column=by_column):
            return (t.transpose(1, 2) if by_column else t).flatten(1, 2)

        step = sequence(delta[:, :, :, k])
        if delta_weight is not None:
            step = F.linear(step.to(A.dtype), delta_weight[k].to(A.dtype))
        inputs = sequence(x), step, A[k], sequence(B[:, :, :, k : k + 1])
        inputs = *inputs, sequence(C[:, :, :, k : k + 1])
        skip, bias = (None if t is None else t[k] for t in (D, delta_bias))
        y, _ = _direction(kind, *inputs, skip, bias, delta_softplus, discretization, route >= 2)
        sums[by_column] = sums[by_column] + y if by_column in sums else y
    maps = [
        y.unflatten(1, (columns, rows)).transpose(1, 2)
        if by_column
        else y.unflatten(1, (rows, columns))
        for by_column, y in sums.items()
    ]
    return sum(maps[1:], maps[0]).to(x.dtype), A.new_empty(0)


def _causal_conv1d(_, x, weight, bias, initial_state, mode, silu, return_last_state, seq_idx=None):
    dtype = compute_dtype(x.dtype)
    reach = weight.shape[1] - 1
    left, length = taps_before(reach + 1, mode), x.shape[1]
    weight = weight.to(dtype)
    weight = (weight.flip(1) if mode == 'reverse' else weight).unsqueeze(1)
    bias = None if bias is None else bias.to(dtype)
    padded = x.to(dtype).transpose(1, 2)
    if initial_state is None:
        padded = F.pad(padded, (left, reach - left))
    elif mode == 'causal':
        padded = torch.cat((initial_state.to(dtype), padded), dim=-1)
    else:
        padded = torch.cat((padded, initial_state.to(dtype).flip(-1)), dim=-1)
    numbers = padded_numbers(seq_idx, reach + 1, mode)
    if numbers is None:
        out = F.conv1d(padded, weight, bias, groups=weight.shape[0])
    else:
        # Tap by tap: zeros in the place of other sequences' inputs.
        steps = padded.transpose(1, 2)
        parts = [
            within(steps[:, k : k + length], numbers, k, left) * weight[:, 0, k]
            for k in range(reach + 1)
        ]
        out = sum(parts[1:], parts[0] if bias is None else parts[0] + bias).transpose(1, 2)
    out = (F.silu(out) if silu else out).transpose(1, 2).to(x.dtype)
    if not return_last_state:
        return out, x.new_empty(0)
    last, own = of_last(padded.transpose(1, 2), numbers, length, mode)
    last = (last if own is None else last.where(own, 0)).transpose(1, 2)
    last = last.flip(-1) if mode == 'reverse' else last
    return out, last.to((x if initial_state is None else initial_state).dtype)


def _bidirectional_conv1d(_, x, weight_f, bias_f, weight_b, bias_b, silu):
    return (
        _causal_conv1d(None, x, weight_f, bias_f, None, 'causal', silu, False)[0],
        _causal_conv1d(None, x, weight_b, bias_b, None, 'reverse', silu, False)[0],
    )


def _add_rms_norm(_, x, residual, weight, eps, residual_in_fp32):
    dtype = compute_dtype(x.dtype)
    total = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    kept = dtype if residual_in_fp32 else (x if residual is None else residual).dtype
    return (total * rstd * weight).to(x.dtype), total.to(kept), rstd.squeeze(-1)


def portable_ops(kind: str = 'graph') -> intercept_ops:
    """Let the functions of :mod:`mmvim.ops` call portable operators, in a ``with`` block.

    Args:
        kind: 'graph' for ``torch.export`` and AOTInductor, 'onnx' for the ``torch.export`` that
            becomes ONNX (:mod:`mmvim.export.onnx_scan`), 'onnx_custom' for the same with mmvim's
            operator, 'script' for TorchScript.

    Raises:
        ValueError: For another kind.
    """
    if kind not in KINDS:
        raise ValueError(f'kind must be one of {KINDS}, got {kind!r}')
    return intercept_ops(
        selective_scan=functools.partial(_selective_scan, kind),
        bidirectional_scan=functools.partial(_bidirectional_scan, kind),
        cross_scan=functools.partial(_cross_scan, kind),
        causal_conv1d=_causal_conv1d,
        bidirectional_conv1d=_bidirectional_conv1d,
        add_rms_norm=_add_rms_norm,
    )
