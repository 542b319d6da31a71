"""The functions of causal_conv1d."""

from torch import Tensor

from mmvim.dropin import convolutions
from mmvim.dropin.placeholders import attributes_of

__all__ = [
    'CausalConv1dFn',
    'causal_conv1d_fn',
    'causal_conv1d_ref',
    'causal_conv1d_update',
    'causal_conv1d_update_ref',
]
__getattr__ = attributes_of(__name__)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | str | None = None,
    initial_states: Tensor | str | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve; see :func:`mmvim.dropin.convolutions.convolve`.

    In releases 1.0 and 1.1 the fourth and the fifth argument was ``activation``: a string in these
    places is taken for it.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    elif isinstance(initial_states, str):
        initial_states, activation = None, initial_states
    states = initial_states, return_final_states, final_states_out
    return convolutions.convolve(x, weight, bias, seq_idx, *states, activation)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | str | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`causal_conv1d_fn` in the order of arguments that the package's reference has."""
    if isinstance(initial_states, str):
        initial_states, activation = None, initial_states
    states = initial_states, return_final_states, final_states_out
    return convolutions.convolve(x, weight, bias, seq_idx, *states, activation)


causal_conv1d_update = causal_conv1d_update_ref = convolutions.update


class CausalConv1dFn:
    """:func:`causal_conv1d_fn` for code that calls the autograd function."""

    apply = staticmethod(causal_conv1d_fn)
