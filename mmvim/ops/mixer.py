"""A whole Mamba mixer as one op for each pass: projections, convolutions, scans, gate.

Step by step, autograd keeps every intermediate of a mixer, adds and joins their gradients in
separate passes, and each step costs the host more than the GPU. The op exists only as compiled code
(csrc/mixers) and computes the same as the layers do step by step, which they do where the op is not
used.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend as backends
from ._autocast import autocast_dtype
from ._library import compute_dtype, define_compiled
from .selective_scan import default_checkpoint_interval
from .selective_scan_torch import checkpoint_shape

Parameters = Sequence[Tensor | None]


def serves(backend: str | None, x: Tensor) -> bool:
    """Whether the op may be used for ``x``; the arguments are those of :func:`backend.resolve`."""
    return backends.resolve(backend, 'mixer', x) is torch.ops.mmvim


class AddNorm(NamedTuple):
    """The part of a pre-norm block before its mixer: an addition to the stream and an RMSNorm.

    Attributes:
        weight: (c,), of the norm.
        residual: (batch, length, c), the stream so far; None before the first block.
        keep: (batch,), factors of the samples of x (stochastic depth), in the dtype of x or of
            autocast; None: 1.
        eps: Of the norm.
        residual_in_fp32: As for :func:`mmvim.ops.add_rms_norm`.
    """

    weight: Tensor
    residual: Tensor | None = None
    keep: Tensor | None = None
    eps: float = 1e-5
    residual_in_fp32: bool = True


def mixer(
    x: Tensor,
    parameters: Parameters,
    kind: str,
    reverse: bool = False,
    scale: float = 1.0,
    bias_scale: float = 1.0,
    discretization: str = 'zoh',
    recompute: bool | None = None,
    norm: AddNorm | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mix along the sequence.

    Under autocast x is cast to its dtype; parameters may have any floating dtype. With d scanned
    channels, n states, rank r and convolution width w they are, with None for absent ones, the
    weight (2d, c) and bias of in_proj, the weight and bias of out_proj, and for each direction
    taps (d, 1, w), conv_bias (d,), x_proj (r + 2n, d), dt_proj (d, r), dt_bias (d,), A_log (d, n)
    and skip (d,): 18 in all.

    Args:
        x: (batch, length, c).
        parameters: As above.
        kind: 'one', one gated direction; 'v2', two directions that read the same in_proj and are
            added before the gate; 'v1', two that share everything but A_log; 'half', MambaVision's,
            where half of the channels pass only through a centred convolution, whose taps are
            those of the second direction.
        reverse: Whether the convolution, and with 'one' the scan, run from the end.
        scale: Factor of the sum of two directions.
        bias_scale: Factor of dt_bias.
        discretization: One of :data:`mmvim.ops.DISCRETIZATIONS`.
        recompute: Whether backward recomputes most intermediates instead of keeping them. None:
            on CUDA devices.
        norm: Addition and norm that come first; None for none.

    Returns:
        (batch, length, out channels), in the dtype of x or of autocast; with ``norm`` also the
        stream, ``x * keep + residual``.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    weight, residual, keep, eps, residual_in_fp32 = norm or _NO_NORM
    if keep is not None:
        keep = keep.to(x.dtype)
    gradient = torch.is_grad_enabled() and (
        x.requires_grad
        or any(p is not None and p.requires_grad for p in (weight, residual, *parameters))
    )
    out, stream, _ = _call(
        torch.ops.mmvim.mixer.default,
        (x, residual, keep, (*parameters, weight)),
        (kind, reverse, scale, bias_scale, discretization, recompute, eps, residual_in_fp32),
        gradient,
    )
    return out if norm is None else (out, stream)


def mixer_stack(
    x: Tensor, parameters: Parameters, residual: Tensor | None, keep: Tensor | None, options: tuple
) -> tuple[Tensor, Tensor]:
    """Run pre-norm blocks of equal mixers, each of which reads what the one before it has made.

    Arguments and results are those of :func:`mixer` with a norm, but:

    Args:
        parameters: Of all blocks, 19 of each: those of its mixer and the weight of its norm.
        keep: (blocks - 1, batch), factors of the samples of the inputs of all blocks but the first.
        options: ``kind`` to ``recompute``, and ``eps`` and ``residual_in_fp32`` of the norms.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    op = torch.ops.mmvim.mixer_stack.default
    return _call(op, (x, residual, keep, parameters), options, torch.is_grad_enabled())


def _call(op: Callable, tensors: tuple, options: tuple, gradient: bool) -> tuple:
    """Call an op, on GPUs with ``recompute`` unless the options say otherwise."""
    x = tensors[0]
    *of_mixer, recompute, eps, residual_in_fp32 = options
    recompute = x.is_cuda if recompute is None else recompute
    interval = default_checkpoint_interval(x) if gradient else 0
    return op(*tensors, *of_mixer, recompute, eps, residual_in_fp32, interval)


_NO_NORM = (None, None, None, 0.0, False)


def _prepared_sizes(x: Tensor, parameters: Parameters, kind: str, bias_scale: float) -> list[int]:
    """Sizes of the two arrays of prepared parameters, as laid out by csrc/mixers."""
    wide = compute_dtype(x.dtype)
    sizes = [0, 0]

    def add(of_matrix: bool, elements: int) -> None:
        sizes[0 if of_matrix else 1] += -(-elements // 8) * 8

    def single(p: Tensor | None, of_matrix: bool, scale: float = 1.0) -> None:
        given = None if p is None else wide if _converted_first(p, wide) else p.dtype
        if p is not None and (given != (x.dtype if of_matrix else wide) or scale != 1):
            add(of_matrix, p.numel())

    for p in parameters[:4]:
        single(p, True)
    taps, conv_bias, x_proj, dt_proj, dt_bias, a_log, skip = parameters[4:11]
    for p in (x_proj, dt_proj):
        if kind == 'v2':
            add(True, 2 * p.numel())
        else:
            single(p, True)
    add(False, (2 if kind in ('v1', 'v2') else 1) * a_log.numel())
    if kind == 'half':
        add(False, 2 * taps.numel())
    directions = [(taps, conv_bias, dt_bias, skip)]
    if kind == 'v2':
        taps, conv_bias, _, _, dt_bias, _, skip = parameters[11:18]
        directions.append((taps, conv_bias, dt_bias, skip))
    for taps, conv_bias, dt_bias, skip in directions:
        if kind != 'half':
            single(taps, False)
        single(conv_bias, False)
        single(dt_bias, False, bias_scale)
        single(skip, False)
    return sizes


def _converted_first(p: Tensor, wide: torch.dtype) -> bool:
    """Whether one of p and the arithmetic is float64 and the other is not."""
    return (p.dtype == torch.float64) != (wide == torch.float64)


def _fake(
    x,
    residual,
    keep,
    parameters,
    kind,
    reverse,
    scale,
    bias_scale,
    discretization,
    recompute,
    eps,
    residual_in_fp32,
    checkpoint_interval,
):
    b, length, _ = x.shape
    out_weight, x_proj, a_log = parameters[2], parameters[6], parameters[9]
    d, n = a_log.shape
    wide = compute_dtype(x.dtype)
    out = x.new_empty((b, length, out_weight.shape[0]))
    has_norm = parameters[18] is not None
    stream = x.new_empty(0)
    if has_norm:
        dtype = wide if residual_in_fp32 else x.dtype
        if residual is not None and not residual_in_fp32 and residual.dtype != x.dtype:
            dtype = wide
        stream = x.new_empty(x.shape, dtype=dtype)
    if checkpoint_interval == 0:
        return out, stream, []
    both = kind in ('v1', 'v2')
    directions = 2 if kind == 'v2' else 1
    checkpoints = checkpoint_shape(x.new_empty((b, length, d)), n, checkpoint_interval)
    matrices, vectors = _prepared_sizes(x, parameters, kind, bias_scale)
    kept = [x.new_empty((b, length, d))]
    kept += [x.new_empty(checkpoints, dtype=wide) for _ in range(2 if both else 1)]
    kept += [x.new_empty(matrices), x.new_empty(vectors, dtype=wide)]
    kept.append(x.new_empty((directions, b, length, x_proj.shape[0])))
    if not recompute:
        kept.append(x.new_empty((b, length, 2 * d)))
        kept.append(x.new_empty((directions, b, length, 2 * d if kind == 'half' else d)))
        kept.append(x.new_empty((directions, b, length, d)))
        if both:
            kept.append(x.new_empty((b, length, d)))
    if has_norm:
        kept += [x.new_empty(x.shape), x.new_empty((b, length), dtype=wide)]
    return out, stream, kept


def _backward_fake(grad_out, grad_stream, x, stream, keep, parameters, kept, *rest):
    residual_dtype, needed = rest[-2:]
    x = kept[-2] if x is None else x
    shapes = [(x.shape, x.dtype), *(t if t is None else (t.shape, t.dtype) for t in parameters)]
    equal = residual_dtype == x.dtype and keep is None and needed & 1
    shapes.append(None if residual_dtype is None or equal else (x.shape, residual_dtype))
    return [
        x.new_empty(0) if s is None or not needed >> i & 1 else x.new_empty(s[0], dtype=s[1])
        for i, s in enumerate(shapes)
    ]


_OPTIONS = (
    'str kind, bool reverse, float scale, float bias_scale, str discretization, bool recompute, '
    'float eps, bool residual_in_fp32, int checkpoint_interval'
)
# The parameters are those of `mixer` and the weight of the norm.
define_compiled(
    f'mixer(Tensor x, Tensor? residual, Tensor? keep, Tensor?[] parameters, {_OPTIONS}) '
    '-> (Tensor out, Tensor stream, Tensor[] kept)',
    _fake,
)
define_compiled(
    f'mixer_stack(Tensor x, Tensor? residual, Tensor? keep, Tensor?[] parameters, {_OPTIONS}) '
    '-> (Tensor out, Tensor stream)',
    None,
)
# `needed` has a bit for x, one for each parameter, and one for the residual, whose gradient is
# empty where it would equal that of x.
define_compiled(
    'mixer_backward(Tensor grad_out, Tensor? grad_stream, Tensor? x, Tensor? stream, Tensor? keep, '
    f'Tensor?[] parameters, Tensor[] kept, {_OPTIONS}, ScalarType? residual_dtype, int needed) '
    '-> Tensor[]',
    _backward_fake,
)
