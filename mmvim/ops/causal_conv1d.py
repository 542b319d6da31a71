"""Short depthwise convolutions over a sequence, channels last."""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _validation as check
from ._autocast import autocast_dtype, to_activation, to_parameter
from ._library import compute_dtype, define
from .backend import resolve

MODES = ('causal', 'reverse', 'same')
WIDTHS = (2, 3, 4)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    mode: str = 'causal',
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise convolution over time, with bias and SiLU fused.

    With w the width, ``'causal'`` gives out_t = Σ_k weight[w−1−k] x_{t−k}, ``'reverse'`` its mirror
    image Σ_k weight[w−1−k] x_{t+k} (flip, convolve, flip), and ``'same'`` is centred like PyTorch's
    ``padding='same'``. Arithmetic is in float32 (float64 for float64); the output is rounded once.

    Args:
        x: Input (b, l, d): float32, bfloat16, float16 or float64; b and l may be 0.
        weight: (d, w) with w = 2, 3 or 4; dtype of x, or float32 (float64 if x is float64).
        bias: (d,), dtype as for weight.
        activation: ``'silu'`` or None.
        mode: ``'causal'``, ``'reverse'`` or ``'same'``.
        initial_state: The w−1 inputs before the first step (in reverse: after the last), oldest
            first in the order of the scan, (b, d, w−1); dtype of x or float32. Not for ``'same'``.
        return_last_state: Also return the last w−1 inputs in the order of the scan, for the next
            call. Not for ``'same'``.
        seq_idx: Number of the sequence that each step belongs to, (b, l), int32, for sequences
            packed into one row. A step sees no input beyond a change of the number, whatever the
            values. The initial state lies before the sequence that comes first in the order of the
            scan, the last state is that of the last one, whose missing inputs are zero.
        backend: See :func:`mmvim.ops.selective_scan`.

    Returns:
        The output (b, l, d), dtype of x; with ``return_last_state`` also the state (b, d, w−1), in
        the dtype of initial_state if given, else of x.

    Raises:
        TypeError: For a wrong type or dtype.
        ValueError: For a wrong shape, device, mode or activation.
        RuntimeError: If compiled kernels are demanded and there are none.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        (x,) = to_activation(dtype, x)
        weight, bias = to_parameter(dtype, weight, bias)
        if isinstance(initial_state, Tensor) and initial_state.dtype != torch.float32:
            (initial_state,) = to_activation(dtype, initial_state)
    silu = _check_activation(activation)
    if mode not in MODES:
        raise ValueError(f'mode must be one of {MODES}, got {mode!r}')
    check.check_flag('return_last_state', return_last_state)
    check.check_activation('x', x, 'b l d')
    check_weight(x, weight, bias)
    if mode == 'same' and (initial_state is not None or return_last_state):
        raise ValueError("mode 'same' has no states: neither initial_state nor return_last_state")
    if initial_state is not None:
        name = 'initial_state'
        check.check_tensor(name, initial_state)
        check.check_shape(
            name, initial_state, 'b d w-1', (x.shape[0], x.shape[2], weight.shape[1] - 1)
        )
        check.check_dtype(
            name, initial_state, x.dtype, compute_dtype(x.dtype), why=f'x is {x.dtype}'
        )
        check.check_device(name, initial_state, 'x', x.device)
    if seq_idx is not None:
        check.check_seq_idx(seq_idx, 'x', x)
    ops = resolve(backend, 'causal_conv1d', x)
    out, last_state = ops.causal_conv1d(
        x, weight, bias, initial_state, mode, silu, return_last_state, seq_idx
    )
    return (out, last_state) if return_last_state else out


def bidirectional_conv1d(
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A causal and a reverse convolution of one input, read once.

    Equals ``causal_conv1d(x, weight_f, bias_f)`` and ``causal_conv1d(x, weight_b, bias_b,
    mode='reverse')``.

    Args:
        x: Input (b, l, d).
        weight_f, bias_f: (d, w) and (d,) or None, of the causal convolution.
        weight_b, bias_b: (d, w) and (d,) or None, of the reverse convolution; same w.
        activation: ``'silu'`` or None.
        backend: See :func:`mmvim.ops.selective_scan`.

    Returns:
        Both outputs, (b, l, d), dtype of x.

    Raises:
        TypeError: For a wrong type or dtype.
        ValueError: For a wrong shape, device or activation.
        RuntimeError: If compiled kernels are demanded and there are none.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        (x,) = to_activation(dtype, x)
        weight_f, bias_f, weight_b, bias_b = to_parameter(dtype, weight_f, bias_f, weight_b, bias_b)
    silu = _check_activation(activation)
    check.check_activation('x', x, 'b l d')
    check_weight(x, weight_f, bias_f, '_f')
    check_weight(x, weight_b, bias_b, '_b')
    check.check_shape('weight_b', weight_b, 'd w', weight_f.shape)
    ops = resolve(backend, 'bidirectional_conv1d', x)
    return ops.bidirectional_conv1d(x, weight_f, bias_f, weight_b, bias_b, silu)


def _check_activation(activation: str | None) -> bool:
    if activation not in (None, 'silu'):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    return activation == 'silu'


def check_width(name: str, weight: Tensor) -> None:
    """Check that the weights are (d, w), with a width that the ops support."""
    check.check_tensor(name, weight)
    check.check_rank(name, weight, 'd w')
    if weight.shape[1] not in WIDTHS:
        raise ValueError(f'{name} must have a width in {WIDTHS}, got shape {tuple(weight.shape)}')


def check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, suffix: str = '') -> None:
    """Check the weights and bias of a convolution of x (b, l, d)."""
    d = x.shape[2]
    name = f'weight{suffix}'
    check_width(name, weight)
    check.check_shape(name, weight, 'd w', (d, weight.shape[1]))
    for name, value in ((f'weight{suffix}', weight), (f'bias{suffix}', bias)):
        if value is None:
            continue
        check.check_tensor(name, value)
        if value is bias:
            check.check_shape(name, value, 'd', (d,))
        check.check_dtype(name, value, x.dtype, compute_dtype(x.dtype), why=f'x is {x.dtype}')
        check.check_device(name, value, 'x', x.device)


def taps_before(width: int, mode: str) -> int:
    """Number of inputs before its own that a step sees."""
    return {'causal': width - 1, 'reverse': 0, 'same': (width - 1) // 2}[mode]


def _padded(x: Tensor, width: int, initial_state: Tensor | None, mode: str) -> Tensor:
    """x in the compute dtype with the inputs before and after it, (b, l + w - 1, d)."""
    b, length, d = x.shape
    reach = width - 1
    left = taps_before(width, mode)
    out = torch.empty((b, length + reach, d), dtype=compute_dtype(x.dtype), device=x.device)
    before, after = out[:, :left], out[:, left + length :]
    before.zero_()
    after.zero_()
    if initial_state is not None:
        state = initial_state.transpose(1, 2)
        if mode == 'reverse':
            after.copy_(state.flip(1))
        else:
            before.copy_(state)
    out[:, left : left + length] = x
    return out


def _taps(weight: Tensor, mode: str, dtype: torch.dtype) -> list[Tensor]:
    """The weights in the order of the padded input, each (d,)."""
    taps = list(weight.to(dtype).t().contiguous().unbind(0))
    return taps[::-1] if mode == 'reverse' else taps


def padded_numbers(seq_idx: Tensor | None, width: int, mode: str) -> Tensor | None:
    """Growing numbers of the sequences, (b, l + w - 1, 1), as those of the padded input."""
    if seq_idx is None or seq_idx.shape[1] == 0:
        return None
    left = taps_before(width, mode)
    changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1)
    numbers = F.pad(changes, (left + 1, 0))
    after = numbers[:, -1:].expand(-1, width - 1 - left)
    return torch.cat((numbers, after), 1).unsqueeze(-1)


def within(values: Tensor, numbers: Tensor | None, tap: int, left: int) -> Tensor:
    """``values`` (b, l, d) of each step, zero where the tap meets another sequence's input."""
    if numbers is None:
        return values
    length = values.shape[1]
    own, met = (numbers[:, first : first + length] for first in (left, tap))
    return values.where(met == own, 0)


def _preactivation(
    padded: Tensor,
    numbers: Tensor | None,
    taps: list[Tensor],
    bias: Tensor | None,
    length: int,
    left: int,
) -> Tensor:
    out = within(padded[:, :length], numbers, 0, left) * taps[0]
    for k in range(1, len(taps)):
        out.addcmul_(within(padded[:, k : k + length], numbers, k, left), taps[k])
    return out if bias is None else out.add_(bias)


def of_last(
    padded: Tensor, numbers: Tensor | None, length: int, mode: str
) -> tuple[Tensor, Tensor | None]:
    """The last inputs, (b, w - 1, d), and which of them are of the last sequence, in scan order."""
    reach = padded.shape[1] - length
    place, last = (slice(reach), 0) if mode == 'reverse' else (slice(length, None), -1)
    own = None if numbers is None else numbers[:, place] == numbers[:, last, None]
    return padded[:, place], own


def _forward(x, weight, bias, initial_state, mode, silu, return_last_state, seq_idx=None):
    length, width = x.shape[1], weight.shape[1]
    left = taps_before(width, mode)
    padded = _padded(x, width, initial_state, mode)
    numbers = padded_numbers(seq_idx, width, mode)
    out = _preactivation(padded, numbers, _taps(weight, mode, padded.dtype), bias, length, left)
    if silu:
        out = F.silu(out, inplace=True)
    state_dtype = x.dtype if initial_state is None else initial_state.dtype
    if not return_last_state:
        return out.to(x.dtype), x.new_empty(0, dtype=state_dtype)
    state, own = of_last(padded, numbers, length, mode)
    if own is not None:
        state = state.where(own, 0)
    if mode == 'reverse':
        state = state.flip(1)
    last_state = torch.empty(
        (x.shape[0], x.shape[2], width - 1), dtype=state_dtype, device=x.device
    ).copy_(state.transpose(1, 2))
    return out.to(x.dtype), last_state


def _forward_fake(x, weight, bias, initial_state, mode, silu, return_last_state, seq_idx=None):
    state_dtype = x.dtype if initial_state is None else initial_state.dtype
    shape = (x.shape[0], x.shape[2], weight.shape[1] - 1) if return_last_state else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=state_dtype)


def _backward(grad_out, grad_last_state, x, weight, bias, initial_state, mode, silu, seq_idx=None):
    length, width = x.shape[1], weight.shape[1]
    left = taps_before(width, mode)
    padded = _padded(x, width, initial_state, mode)
    numbers = padded_numbers(seq_idx, width, mode)
    dtype = padded.dtype
    taps = _taps(weight, mode, dtype)
    grad = grad_out.to(dtype)
    if silu:
        pre = _preactivation(padded, numbers, taps, bias, length, left)
        sigmoid = torch.sigmoid(pre)
        # silu′(p) = σ(p) (1 + p (1 − σ(p)))
        grad = torch.addcmul(sigmoid, pre.mul_(sigmoid), 1 - sigmoid).mul_(grad)
    dpadded = torch.zeros_like(padded)
    dtaps = []
    for k, tap in enumerate(taps):
        back = within(grad, numbers, k, left)
        dpadded[:, k : k + length].addcmul_(back, tap)
        dtaps.append((padded[:, k : k + length] * back).sum((0, 1)))
    if mode == 'reverse':
        dtaps.reverse()
    if grad_last_state is not None:
        dstate = grad_last_state.transpose(1, 2).to(dtype)
        if mode == 'reverse':
            dstate = dstate.flip(1)
        place, own = of_last(dpadded, numbers, length, mode)
        place += dstate if own is None else dstate.where(own, 0)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dx.copy_(dpadded[:, left : left + length])
    dweight = torch.stack(dtaps, 1).to(weight.dtype)
    empty = x.new_empty(0, dtype=dtype)
    dbias = empty if bias is None else grad.sum((0, 1)).to(bias.dtype)
    if initial_state is None:
        return dx, dweight, dbias, empty.clone()
    dstate = dpadded[:, length:].flip(1) if mode == 'reverse' else dpadded[:, : width - 1]
    dinitial = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x.device).copy_(
        dstate.transpose(1, 2)
    )
    return dx, dweight, dbias, dinitial


def _backward_fake(
    grad_out, grad_last_state, x, weight, bias, initial_state, mode, silu, seq_idx=None
):
    return tuple(_gradient_fake(value, x) for value in (x, weight, bias, initial_state))


def _gradient_fake(value: Tensor | None, x: Tensor) -> Tensor:
    if value is None:
        return x.new_empty(0, dtype=compute_dtype(x.dtype))
    return value.new_empty(value.shape)


def _setup_context(ctx, inputs, output):
    *tensors, mode, silu, return_last_state, seq_idx = inputs
    ctx.set_materialize_grads(False)
    if not return_last_state:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, seq_idx)
    ctx.options = (mode, silu)


def _autograd(ops, ctx, grad_out, grad_last_state):
    if grad_out is None and grad_last_state is None:
        return (None,) * 8
    *tensors, seq_idx = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[0])
    grads = ops.causal_conv1d_backward(grad_out, grad_last_state, *tensors, *ctx.options, seq_idx)
    return _wanted(ctx, (*grads, *(None,) * 4))


def _wanted(ctx, grads):
    return tuple(
        grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True)
    )


def _both_forward(x, weight_f, bias_f, weight_b, bias_b, silu):
    return (
        _forward(x, weight_f, bias_f, None, 'causal', silu, False)[0],
        _forward(x, weight_b, bias_b, None, 'reverse', silu, False)[0],
    )


def _both_forward_fake(x, weight_f, bias_f, weight_b, bias_b, silu):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _both_backward(grad_f, grad_b, x, weight_f, bias_f, weight_b, bias_b, silu):
    wide = x.to(compute_dtype(x.dtype))
    dx, dweight_f, dbias_f, _ = _backward(
        grad_f, None, wide, weight_f, bias_f, None, 'causal', silu
    )
    dx_b, dweight_b, dbias_b, _ = _backward(
        grad_b, None, wide, weight_b, bias_b, None, 'reverse', silu
    )
    return dx.add_(dx_b).to(x.dtype), dweight_f, dbias_f, dweight_b, dbias_b


def _both_backward_fake(grad_f, grad_b, x, weight_f, bias_f, weight_b, bias_b, silu):
    return tuple(_gradient_fake(value, x) for value in (x, weight_f, bias_f, weight_b, bias_b))


def _both_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.silu = inputs[5]


def _both_autograd(ops, ctx, grad_f, grad_b):
    grads = ops.bidirectional_conv1d_backward(grad_f, grad_b, *ctx.saved_tensors, ctx.silu)
    return _wanted(ctx, (*grads, None))


_INPUTS = 'Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, str mode, bool silu'
define(
    f'causal_conv1d_backward(Tensor grad_out, Tensor? grad_last_state, {_INPUTS}, '
    'Tensor? seq_idx=None) '
    '-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)',
    _backward,
    _backward_fake,
)
define(
    f'causal_conv1d({_INPUTS}, bool return_last_state, Tensor? seq_idx=None) '
    '-> (Tensor out, Tensor last_state)',
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
_BOTH_INPUTS = (
    'Tensor x, Tensor weight_f, Tensor? bias_f, Tensor weight_b, Tensor? bias_b, bool silu'
)
define(
    f'bidirectional_conv1d_backward(Tensor grad_f, Tensor grad_b, {_BOTH_INPUTS}) '
    '-> (Tensor dx, Tensor dweight_f, Tensor dbias_f, Tensor dweight_b, Tensor dbias_b)',
    _both_backward,
    _both_backward_fake,
)
define(
    f'bidirectional_conv1d({_BOTH_INPUTS}) -> (Tensor out_f, Tensor out_b)',
    _both_forward,
    _both_forward_fake,
    setup_context=_both_setup_context,
    backward=_both_autograd,
)
