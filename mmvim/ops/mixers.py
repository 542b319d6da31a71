"""Mixers as one differentiable function each that keeps little for its backward pass.

Step by step, autograd keeps every intermediate of a mixer, and adds and joins their gradients in
passes of their own. Here gradients that meet are accumulated by the matrix products that make them,
and what is cheap to make again is made again: with ``recompute`` a layer keeps its input, the
low-rank projections, the sum of the scans and the scans' checkpoints (compare section 3.3.2 of Gu
and Dao, https://arxiv.org/abs/2312.00752).

Without a gradient the same function saves host time: the calls of modules, and checks of what a
mixer makes itself.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._autocast import autocast_dtype
from ._library import compute_dtype
from .backend import resolve
from .bidirectional_scan import ScanInputs
from .selective_scan import default_checkpoint_interval


class Direction(NamedTuple):
    """Parameters of one direction: d channels, n states, rank r, convolution width w.

    ``taps`` (d, w), ``conv_bias`` (d,) or None, ``x_proj`` (r + 2n, d), ``dt_proj`` (d, r),
    ``dt_bias`` (d,), ``a_log`` (d, n) and ``skip`` (d,).
    """

    taps: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    a_log: Tensor
    skip: Tensor


def _after_convolution(x: Direction) -> tuple[Tensor, ...]:
    # torch.compile of torch 2.6 traces neither _replace nor a slice of a named tuple.
    return x.x_proj, x.dt_proj, x.dt_bias, x.a_log, x.skip


class Options(NamedTuple):
    """What the mixer is told besides tensors."""

    scale: float
    discretization: str
    recompute: bool
    backend: str | None


_FIELDS = len(Direction._fields)


def _wants_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def bimamba(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    forward: Direction,
    backward: Direction,
    options: Options,
) -> Tensor:
    """Mix x (batch, length, channels c) along the sequence in both directions.

    ``in_weight`` is (2d, c), ``in_bias`` (2d,), ``out_weight`` (c, d) and ``out_bias`` (c,).
    """
    tensors = x, in_weight, in_bias, out_weight, out_bias, *forward, *backward
    if _wants_gradient(tensors):
        return _BiMamba.apply(*tensors, options)
    return _bimamba(*tensors[:5], tensors[5:], options, interval=0)[0]


def _prepared(p: Direction, dtype: torch.dtype) -> Direction:
    """Matrices in the dtype of the activations, the rest in that of parameters, A for its log."""
    wide = compute_dtype(dtype)
    taps, conv_bias = (
        t if t is None or t.dtype == dtype else t.to(wide) for t in (p.taps, p.conv_bias)
    )
    return Direction(
        taps,
        conv_bias,
        x_proj=p.x_proj.to(dtype),
        dt_proj=p.dt_proj.to(dtype),
        dt_bias=p.dt_bias.to(wide),
        a_log=-torch.exp(p.a_log.to(wide)),
        skip=p.skip.to(wide),
    )


def _cast(given: tuple, dtype: torch.dtype) -> tuple:
    """The parameters that are kept as they are given, as the arithmetic wants them."""
    in_weight, in_bias, out_weight, *rest = given
    return (
        in_weight.to(dtype),
        None if in_bias is None else in_bias.to(dtype),
        out_weight.to(dtype),
        *(
            _prepared(Direction(*rest[i : i + _FIELDS]), dtype)
            for i in range(0, len(rest), _FIELDS)
        ),
    )


def _convolved(ops: object, xz: Tensor, first: Direction, second: Direction) -> tuple:
    x = xz.chunk(2, dim=-1)[0]
    return ops.bidirectional_conv1d(
        x, first.taps, first.conv_bias, second.taps, second.conv_bias, True
    )


def _delta(low_rank: Tensor, p: Direction) -> Tensor:
    return F.linear(low_rank[..., : p.dt_proj.shape[1]], p.dt_proj)


def _scan_inputs(u: Tensor, delta: Tensor, low_rank: Tensor, p: Direction) -> ScanInputs:
    n = p.a_log.shape[1]
    b, c = low_rank[..., p.dt_proj.shape[1] :].unsqueeze(2).split((n, n), dim=-1)
    return ScanInputs(u, delta, p.a_log, b, c, p.skip, p.dt_bias)


def _rows(x: Tensor) -> Tensor:
    """(batch, length, channels) as a matrix with a row for each token."""
    return x.flatten(0, 1)


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of the weight of a linear layer."""
    return _rows(grad).t() @ _rows(x)


def _bimamba(x, in_weight, in_bias, out_weight, out_bias, parameters, options, interval):
    """The output, what a backward pass needs always, what without recomputation, and the ops."""
    dtype = autocast_dtype(x) or x.dtype
    x = x.to(dtype)
    given = in_weight, in_bias, out_weight, *parameters
    in_weight, in_bias, out_weight, *directions = _cast(given, dtype)
    ops = resolve(options.backend, 'bidirectional_scan', x)

    xz = F.linear(x, in_weight, in_bias)
    u = _convolved(ops, xz, *directions)
    low_rank = [F.linear(t, p.x_proj) for t, p in zip(u, directions, strict=True)]
    delta = [_delta(t, p) for t, p in zip(low_rank, directions, strict=True)]
    forward, backward = map(_scan_inputs, u, delta, low_rank, directions)
    gated, *sums = ops.bidirectional_scan(
        *forward,
        *backward,
        xz.chunk(2, dim=-1)[1],
        options.scale,
        True,
        options.discretization,
        interval,
    )
    out = F.linear(gated, out_weight, None if out_bias is None else out_bias.to(dtype))
    return out, (*given, x, *low_rank, *sums), (xz, *u, *delta, gated), ops


class _BiMamba(torch.autograd.Function):
    """in_proj, both convolutions, low-rank projections and scans, gate, out_proj."""

    @staticmethod
    def forward(ctx, x, in_weight, in_bias, out_weight, out_bias, *rest):
        *parameters, options = rest
        weights = in_weight, in_bias, out_weight, out_bias
        ctx.dtypes = [None if t is None else t.dtype for t in (x, *weights, *parameters)]
        ctx.options, ctx.interval = options, default_checkpoint_interval(x)
        out, always, kept, ops = _bimamba(x, *weights, parameters, options, ctx.interval)
        ctx.save_for_backward(*always, *(() if options.recompute else kept))
        ctx.compiled = ops is torch.ops.mmvim
        return out

    @staticmethod
    def backward(ctx, dy):
        # Activation checkpointing computes them again, once: they cannot be asked for twice.
        saved = ctx.saved_tensors
        given, rest = saved[: 3 + 2 * _FIELDS], saved[3 + 2 * _FIELDS :]
        x, *low_rank, pregate, checkpoints_f, checkpoints_b = rest[:6]
        kept = rest[6:]
        in_weight, in_bias, out_weight, *directions = _cast(given, x.dtype)
        options, needed = ctx.options, ctx.needs_input_grad
        ops = torch.ops.mmvim if ctx.compiled else torch.ops.mmvim_torch
        dy = dy.to(x.dtype)
        if options.recompute:
            xz = F.linear(x, in_weight, in_bias)
            u = _convolved(ops, xz, *directions)
            delta = [_delta(t, p) for t, p in zip(low_rank, directions, strict=True)]
            gated = F.silu(xz.chunk(2, dim=-1)[1]).mul_(pregate)
        else:
            xz, *u, delta_f, delta_b, gated = kept
            delta = delta_f, delta_b
        dout_weight = dout_bias = din_weight = din_bias = None
        if needed[3]:
            dout_weight = _outer(dy, gated)
            if options.recompute and options.scale != 1:
                dout_weight *= options.scale
        if needed[4]:
            dout_bias = _rows(dy).sum(0)
        del gated, kept

        inputs, z = xz.chunk(2, dim=-1)
        forward, backward = map(_scan_inputs, u, delta, low_rank, directions)
        *dscans, dz = ops.bidirectional_scan_backward(
            dy @ out_weight,
            *forward,
            *backward,
            z,
            pregate,
            checkpoints_f,
            checkpoints_b,
            options.scale,
            True,
            options.discretization,
            ctx.interval,
        )
        del forward, backward, delta, pregate, checkpoints_f, checkpoints_b
        du, dparameters = [], []
        for i, p in enumerate(directions):
            du_i, ddelta, da, db, dc, dskip, dt_bias = dscans[7 * i : 7 * i + 7]
            dlow_rank = torch.cat((ddelta @ p.dt_proj, db.squeeze(2), dc.squeeze(2)), dim=-1)
            dparameters.append(
                Direction(
                    None,
                    None,
                    x_proj=_outer(dlow_rank, u[i]),
                    dt_proj=_outer(ddelta, low_rank[i][..., : p.dt_proj.shape[1]]),
                    dt_bias=dt_bias,
                    a_log=da * p.a_log,
                    skip=dskip,
                )
            )
            du.append(_rows(du_i).addmm_(_rows(dlow_rank), p.x_proj).view_as(du_i))
        del dscans, u
        first, second = directions
        dx, dtaps_f, dbias_f, dtaps_b, dbias_b = ops.bidirectional_conv1d_backward(
            *du, inputs, first.taps, first.conv_bias, second.taps, second.conv_bias, True
        )
        d = dx.shape[-1]
        if needed[1]:
            din_weight = torch.cat((_outer(dx, x), _outer(dz, x)))
        if needed[2]:
            din_bias = torch.cat((_rows(dx).sum(0), _rows(dz).sum(0)))
        dx = (_rows(dx) @ in_weight[:d]).addmm_(_rows(dz), in_weight[d:]).view_as(x)
        grads = (
            dx,
            din_weight,
            din_bias,
            dout_weight,
            dout_bias,
            dtaps_f,
            dbias_f,
            *_after_convolution(dparameters[0]),
            dtaps_b,
            dbias_b,
            *_after_convolution(dparameters[1]),
        )
        return (
            *(
                grad.to(dtype) if wanted else None
                for grad, dtype, wanted in zip(grads, ctx.dtypes, needed[:-1], strict=True)
            ),
            None,
        )


def half_scan(
    x: Tensor, in_weight: Tensor, out_weight: Tensor, direction: Direction, options: Options
) -> Tensor:
    """Mix x (batch, length, channels c) as MambaVision does: half of the channels are scanned.

    ``in_weight`` is (2d, c), ``out_weight`` (c, 2d) and ``direction.taps`` those of both halves,
    (2d, w); there is no bias but Δ's.
    """
    tensors = x, in_weight, out_weight, *direction
    if _wants_gradient(tensors):
        return _HalfScan.apply(*tensors, options)
    return _half_scan(x, in_weight, out_weight, direction, options, interval=0)[0]


def _half_scan(x, in_weight, out_weight, parameters, options, interval):
    """As :func:`_bimamba`."""
    dtype = autocast_dtype(x) or x.dtype
    x = x.to(dtype)
    given = in_weight, None, out_weight, *parameters
    in_weight, _, out_weight, p = _cast(given, dtype)
    ops = resolve(options.backend, 'selective_scan', x)

    projected = F.linear(x, in_weight)
    xz = _centred(ops, projected, p)
    u, z = xz.chunk(2, dim=-1)
    low_rank = F.linear(u, p.x_proj)
    delta = _delta(low_rank, p)
    y, _, checkpoints = ops.selective_scan(
        *_plain_scan(u, delta, low_rank, p),
        True,
        options.discretization,
        False,
        False,
        interval,
    )
    out = F.linear(torch.cat((y, z), dim=-1), out_weight)
    return out, (*given, x, low_rank, y, checkpoints), (projected, xz, delta), ops


class _HalfScan(torch.autograd.Function):
    """in_proj, one convolution, low-rank projections, the scan of a half, out_proj."""

    @staticmethod
    def forward(ctx, x, in_weight, out_weight, *rest):
        *parameters, options = rest
        ctx.dtypes = [t if t is None else t.dtype for t in (x, in_weight, out_weight, *parameters)]
        ctx.options, ctx.interval = options, default_checkpoint_interval(x)
        out, always, kept, ops = _half_scan(
            x, in_weight, out_weight, parameters, options, ctx.interval
        )
        ctx.save_for_backward(*always, *(() if options.recompute else kept))
        ctx.compiled = ops is torch.ops.mmvim
        return out

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        given, rest = saved[: 3 + _FIELDS], saved[3 + _FIELDS :]
        x, low_rank, y, checkpoints, *kept = rest
        in_weight, _, out_weight, p = _cast(given, x.dtype)
        options, needed = ctx.options, ctx.needs_input_grad
        ops = torch.ops.mmvim if ctx.compiled else torch.ops.mmvim_torch
        dy = dy.to(x.dtype)
        if options.recompute:
            projected = F.linear(x, in_weight)
            xz = _centred(ops, projected, p)
            delta = _delta(low_rank, p)
        else:
            projected, xz, delta = kept
        u, z = xz.chunk(2, dim=-1)
        dout_weight = din_weight = None
        if needed[2]:
            dout_weight = _outer(dy, torch.cat((y, z), dim=-1))
        dscanned, dz = (dy @ out_weight).chunk(2, dim=-1)
        du, ddelta, da, db, dc, dskip, _, dt_bias, _ = ops.selective_scan_backward(
            dscanned,
            None,
            *_plain_scan(u, delta, low_rank, p),
            checkpoints,
            True,
            options.discretization,
            False,
            ctx.interval,
        )
        dlow_rank = torch.cat((ddelta @ p.dt_proj, db.squeeze(2), dc.squeeze(2)), dim=-1)
        du = _rows(du).addmm_(_rows(dlow_rank), p.x_proj).view_as(du)
        dprojected, dtaps, *_ = ops.causal_conv1d_backward(
            torch.cat((du, dz), dim=-1), None, projected, p.taps, None, None, 'same', True
        )
        if needed[1]:
            din_weight = _outer(dprojected, x)
        dparameters = Direction(
            taps=dtaps,
            conv_bias=None,
            x_proj=_outer(dlow_rank, u),
            dt_proj=_outer(ddelta, low_rank[..., : p.dt_proj.shape[1]]),
            dt_bias=dt_bias,
            a_log=da * p.a_log,
            skip=dskip,
        )
        grads = dprojected @ in_weight, din_weight, dout_weight, *dparameters
        return (
            *(
                grad.to(dtype) if wanted else None
                for grad, dtype, wanted in zip(grads, ctx.dtypes, needed[:-1], strict=True)
            ),
            None,
        )


def _centred(ops: object, x: Tensor, p: Direction) -> Tensor:
    return ops.causal_conv1d(x, p.taps, None, None, 'same', True, False)[0]


def _plain_scan(u: Tensor, delta: Tensor, low_rank: Tensor, p: Direction) -> tuple:
    """Inputs of a scan without gate and state, in the op's order."""
    # Not a slice: the compiler of torch 2.6 cannot cut named tuples.
    u, delta, a, b, c, skip, delta_bias = _scan_inputs(u, delta, low_rank, p)
    return u, delta, a, b, c, skip, None, delta_bias, None
