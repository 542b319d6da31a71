"""The causal convolution as causal_conv1d calls it: channels before time, dtypes as given.

Like the package's own kernels, these functions do not look at autocast.
"""

import torch
from torch import Tensor

from mmvim.ops import _validation as check
from mmvim.ops import compat
from mmvim.ops._library import compute_dtype, without_autocast
from mmvim.ops.backend import resolve
from mmvim.ops.causal_conv1d import check_weight, check_width

_forward = without_autocast(compat.causal_conv1d_fn)
_update = without_autocast(compat.causal_conv1d_update)


def _fitting(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters of another precision than mmvim's ops take, in that of the arithmetic."""
    wide = compute_dtype(x.dtype)
    return [
        p.to(wide) if isinstance(p, Tensor) and p.is_floating_point() and p.dtype != x.dtype else p
        for p in parameters
    ]


def _like(x: Tensor, out: Tensor) -> Tensor:
    """The layout in memory that the package's kernels give their output: that of x."""
    return out if x.stride(2) != 1 and x.stride(1) == 1 else out.contiguous()


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`mmvim.ops.causal_conv1d_fn` with sequences packed into one row; differentiable.

    Args:
        x, weight, bias, initial_states, return_final_states, final_states_out, activation: As
            there.
        seq_idx: (b, l), int32 or int64: steps see no step beyond a change of the number, and those
            of a negative one, padding, give 0.
    """
    check.check_activation('x', x, 'b d l')
    weight, bias = _fitting(x, weight, bias)
    if seq_idx is not None:
        seq_idx = sequences('x', x.transpose(1, 2), seq_idx)
    states = initial_states, return_final_states, final_states_out
    out = _forward(x, weight, bias, seq_idx, *states, activation)
    return (_like(x, out[0]), out[1]) if return_final_states else _like(x, out)


def sequences(name: str, x: Tensor, seq_idx: Tensor) -> Tensor:
    """The numbers of the sequences in the rows of ``x`` (b, l, d), the argument ``name``."""
    if isinstance(seq_idx, Tensor) and seq_idx.dtype == torch.int64:
        seq_idx = seq_idx.int()
    check.check_seq_idx(seq_idx, name, x)
    return seq_idx


@torch.no_grad()
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu: bool,
) -> Tensor:
    """The kernels' forward pass; arguments as for :func:`convolve`."""
    silu = check.as_flag('silu_activation', silu)
    keep = final_states_out is not None
    activation = 'silu' if silu else None
    out = convolve(x, weight, bias, seq_idx, initial_states, keep, final_states_out, activation)
    return out[0] if keep else out


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The kernels' backward pass.

    Returns:
        Gradients of x, weight, bias and initial_states, in the dtype of each, or None.
    """
    silu = check.as_flag('silu_activation', silu)
    check.check_activation('x', x, 'b d l')
    check.check_tensor('dout', dout)
    check.check_shape('dout', dout, 'b d l', x.shape)
    wide_weight, wide_bias = _fitting(x, weight, bias)
    first = x.transpose(1, 2)
    check_weight(first, wide_weight, wide_bias)
    compat.check_conv_state('initial_states', initial_states, x, weight)
    compat.check_conv_state('dfinal_states', dfinal_states, x, weight)
    if seq_idx is not None:
        seq_idx = sequences('x', first, seq_idx)
        dout = dout.masked_fill((seq_idx < 0).unsqueeze(1), 0)
    ops = resolve(None, 'causal_conv1d', first)
    with torch.no_grad():
        dx, dweight, dbias, dinitial = ops.causal_conv1d_backward(
            dout.transpose(1, 2).to(x.dtype),
            dfinal_states,
            first,
            wide_weight,
            wide_bias,
            initial_states,
            'causal',
            silu,
            seq_idx,
        )
    dx = dx.transpose(1, 2)
    return (
        _like(x, dx),
        dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None if initial_states is None else dinitial,
    )


@torch.no_grad()
def update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """:func:`mmvim.ops.causal_conv1d_update`, without gradients, as in the package."""
    check.check_tensor('x', x)
    check_width('weight', weight)
    weight, bias = _fitting(x, weight, bias)
    return _update(
        x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
    ).contiguous()
