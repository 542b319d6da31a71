"""mmvim's ops in terms that exporters support, for inference.

During an export, :func:`portable_ops` replaces the registered ops by these. The
scan is a loop over steps (PyTorch's ``scan`` operator, or a scripted loop for TorchScript), so that
a graph does not grow with the number of tokens and accepts any number of them. The reverse
direction runs the loop from its end.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmvim.ops import intercept_ops
from mmvim.ops._library import compute_dtype
from mmvim.ops.discretization import coefficients

KINDS = ('graph', 'onnx', 'script')

Loop = Callable[..., Tensor]


class UnsupportedExport(NotImplementedError):
    """A feature that an exported model cannot have; the message names it."""


def _hold(h: Tensor, delta: Tensor, drive: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """One step of 'zoh': e^{ΔA} h + drive B. delta, drive (..., d), B (..., n)."""
    return torch.exp(delta.unsqueeze(-1) * A) * h + drive.unsqueeze(-1) * B.unsqueeze(-2)


def _graph_zoh(
    delta: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool
) -> Tensor:
    """Loop over the first axis of delta, drive (l, ..., d) and B, C (l, ..., n): y (l, ..., d)."""
    from torch._higher_order_ops.scan import scan

    def step(h: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        delta_t, drive_t, B_t, C_t = inputs
        h = _hold(h, delta_t, drive_t, A, B_t)
        return h, torch.matmul(h, C_t.unsqueeze(-1)).squeeze(-1)

    start = delta.new_zeros((*delta.shape[1:], A.shape[-1]))
    return scan(step, start, (delta, drive, B, C), dim=0, reverse=reverse)[1]


def _graph_general(a: Tensor, drive: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """The same with precomputed coefficients: a, drive (l, ..., d, n)."""
    from torch._higher_order_ops.scan import scan

    def step(h: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        a_t, drive_t, C_t = inputs
        h = a_t * h + drive_t
        return h, torch.matmul(h, C_t.unsqueeze(-1)).squeeze(-1)

    start = drive.new_zeros(drive.shape[1:])
    return scan(step, start, (a, drive, C), dim=0, reverse=reverse)[1]


def _script_zoh(
    delta: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool
) -> Tensor:
    steps = delta.size(0)
    out = torch.empty_like(delta)
    h = torch.zeros_like(delta[0]).unsqueeze(-1) * A
    for i in range(steps):
        t = steps - 1 - i if reverse else i
        decay = torch.exp(delta[t].unsqueeze(-1) * A)
        h = decay * h + drive[t].unsqueeze(-1) * B[t].unsqueeze(-2)
        out[t] = torch.matmul(h, C[t].unsqueeze(-1)).squeeze(-1)
    return out


def _script_general(a: Tensor, drive: Tensor, C: Tensor, reverse: bool) -> Tensor:
    steps = drive.size(0)
    out = torch.empty_like(drive[..., 0])
    h = torch.zeros_like(drive[0])
    for i in range(steps):
        t = steps - 1 - i if reverse else i
        h = a[t] * h + drive[t]
        out[t] = torch.matmul(h, C[t].unsqueeze(-1)).squeeze(-1)
    return out


@functools.cache
def _loops(kind: str) -> tuple[Loop, Loop]:
    if kind == 'graph':
        return _graph_zoh, _graph_general
    if kind == 'onnx':
        from . import onnx_scan

        return onnx_scan.loop_zoh, onnx_scan.loop_general
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
) -> Tensor:
    """One direction without gate, in the compute dtype; shapes as in :mod:`mmvim.ops`."""
    zoh, general = _loops(kind)
    dtype = compute_dtype(u.dtype)
    u, delta, B, C = (x.to(dtype).transpose(0, 1) for x in (u, delta, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    groups = B.shape[2]
    if groups == 1:
        B, C = B.squeeze(2), C.squeeze(2)
        u_g, delta_g = u, delta
    else:
        A = A.unflatten(0, (groups, -1))
        u_g, delta_g = (x.unflatten(-1, (groups, -1)) for x in (u, delta))
    if method == 'zoh':
        y = zoh(*(x.contiguous() for x in (delta_g, delta_g * u_g, A, B, C)), reverse)
    else:
        step = delta_g.unsqueeze(-1)
        a, w0, w1 = coefficients(method, step, step * A)
        v = u_g.unsqueeze(-1) * B.unsqueeze(-2)
        drive = w0 * v
        if w1 is not None:
            # The previous drive in the order of the scan; none before the first step.
            nothing = torch.zeros_like(v[:1])
            before = (v[1:], nothing) if reverse else (nothing, v[:-1])
            drive = drive + w1 * torch.cat(before)
        y = general(a, drive, C.contiguous(), reverse)
    if groups > 1:
        y = y.flatten(-2)
    if D is not None:
        y = y + u * D
    return y.transpose(0, 1)


def _gated(y: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(dtype)


def _selective_scan(
    kind,
    _,
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
    interval,
):
    if initial_state is not None or return_last_state:
        raise UnsupportedExport('a scan with states (streaming) cannot be exported')
    y = _direction(kind, u, delta, A, B, C, D, delta_bias, delta_softplus, discretization, reverse)
    nothing = A.new_empty(0)
    return _gated(y, z, u.dtype), nothing, nothing


def _bidirectional_scan(kind, _, *inputs):
    z, scale, delta_softplus, discretization = inputs[14:18]
    y, y_b = (
        _direction(kind, *inputs[start : start + 7], delta_softplus, discretization, reverse)
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
        y = _direction(kind, *inputs, skip, bias, delta_softplus, discretization, route >= 2)
        sums[by_column] = sums[by_column] + y if by_column in sums else y
    maps = [
        y.unflatten(1, (columns, rows)).transpose(1, 2)
        if by_column
        else y.unflatten(1, (rows, columns))
        for by_column, y in sums.items()
    ]
    return sum(maps[1:], maps[0]).to(x.dtype), A.new_empty(0)


def _causal_conv1d(_, x, weight, bias, initial_state, mode, silu, return_last_state):
    if initial_state is not None or return_last_state:
        raise UnsupportedExport('a convolution with states (streaming) cannot be exported')
    dtype = compute_dtype(x.dtype)
    reach = weight.shape[1] - 1
    left = {'causal': reach, 'reverse': 0, 'same': reach // 2}[mode]
    weight = weight.to(dtype)
    weight = (weight.flip(1) if mode == 'reverse' else weight).unsqueeze(1)
    padded = F.pad(x.to(dtype).transpose(1, 2), (left, reach - left))
    bias = None if bias is None else bias.to(dtype)
    out = F.conv1d(padded, weight, bias, groups=weight.shape[0])
    out = F.silu(out) if silu else out
    return out.transpose(1, 2).to(x.dtype), x.new_empty(0)


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
            becomes ONNX (:mod:`mmvim.export.onnx_scan`), 'script' for TorchScript.

    Raises:
        ValueError: For another kind.
        UnsupportedExport: From a call inside, of something an exported model cannot do.
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
