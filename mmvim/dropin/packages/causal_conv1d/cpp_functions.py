"""The passes of the convolution, as causal_conv1d 1.5 and later wrap the compiled ones."""

from torch import Tensor

from mmvim.dropin import convolutions

__all__ = [
    'causal_conv1d_bwd_function',
    'causal_conv1d_fwd_function',
    'causal_conv1d_update_function',
]


def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """Convolve; see :func:`mmvim.dropin.convolutions.forward`."""
    return convolutions.forward(
        x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation
    )


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Differentiate; see :func:`mmvim.dropin.convolutions.backward`. dx is written to if given."""
    grads = convolutions.backward(
        x, weight, bias, dout, seq_idx, initial_states, dfinal_states, silu_activation
    )
    first = grads[0] if dx is None else dx.copy_(grads[0])
    return first, grads[1], grads[2], grads[3] if return_dinitial_states else None


def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Take the next steps; see :func:`mmvim.ops.causal_conv1d_update`."""
    activation = 'silu' if silu_activation else None
    return convolutions.update(
        x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
    )
