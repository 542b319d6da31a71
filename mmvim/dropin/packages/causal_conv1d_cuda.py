"""The compiled module of causal_conv1d, on :mod:`mmvim.ops`, in the signatures of all releases.

Releases differ in the number of positional arguments, which tells them apart. Those before 1.5
return results, 1.5 and later write them to arguments.
"""

from torch import Tensor

from mmvim.dropin import convolutions

__all__ = ['causal_conv1d_bwd', 'causal_conv1d_fwd', 'causal_conv1d_update']


def _refuse(name: str, given: int, signatures: dict[str, str]) -> None:
    known = '; '.join(f'{release}: ({names})' for release, names in signatures.items())
    raise TypeError(f'{name} takes no {given} arguments. By release of causal_conv1d: {known}')


def causal_conv1d_fwd(*arguments: Tensor | bool | None) -> Tensor | None:
    """Convolve; see :func:`mmvim.dropin.convolutions.forward`.

    Args:
        *arguments: ``x, weight, bias, silu`` (1.0), ``x, weight, bias, seq_idx, silu`` (1.1),
            ``x, weight, bias, seq_idx, initial_states, final_states_out, silu`` (1.2 to 1.4) or
            ``x, weight, bias, seq_idx, initial_states, out, final_states_out, silu`` (from 1.5).

    Returns:
        The output (b, d, l), or None where it is written to ``out``.
    """
    x, weight, bias, *rest = arguments if len(arguments) >= 3 else (None,) * 3
    match rest:
        case [silu]:
            return convolutions.forward(x, weight, bias, None, None, None, silu)
        case [seq_idx, silu]:
            return convolutions.forward(x, weight, bias, seq_idx, None, None, silu)
        case [seq_idx, initial, final, silu]:
            return convolutions.forward(x, weight, bias, seq_idx, initial, final, silu)
        case [seq_idx, initial, out, final, silu]:
            out.copy_(convolutions.forward(x, weight, bias, seq_idx, initial, final, silu))
            return None
    return _refuse(
        'causal_conv1d_fwd',
        len(arguments),
        {
            '1.0': 'x, weight, bias, silu',
            '1.1': 'x, weight, bias, seq_idx, silu',
            '1.2 to 1.4': 'x, weight, bias, seq_idx, initial_states, final_states_out, silu',
            'from 1.5': 'x, weight, bias, seq_idx, initial_states, out, final_states_out, silu',
        },
    )


def causal_conv1d_bwd(*arguments: Tensor | bool | None) -> list[Tensor | None] | None:
    """Differentiate; see :func:`mmvim.dropin.convolutions.backward`.

    Args:
        *arguments: ``x, weight, bias, dout, dx, silu`` (1.0), ``x, weight, bias, dout, seq_idx, dx,
            silu`` (1.1), ``x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx,
            return_dinitial_states, silu`` (1.2 to 1.4) or ``x, weight, bias, dout, seq_idx,
            initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, silu`` (from 1.5).
            Where dx is given it is written to and returned.

    Returns:
        Gradients of x, weight and bias (None without bias), from 1.2 on also of the initial states.
        From 1.5 on they are written to arguments, added to dweight and dbias.
    """
    x, weight, bias, dout, *rest = arguments if len(arguments) >= 4 else (None,) * 4
    match rest:
        case [dx, silu]:
            grads = convolutions.backward(x, weight, bias, dout, None, None, None, silu)
            return [_written(dx, grads[0]), *grads[1:3]]
        case [seq_idx, dx, silu]:
            grads = convolutions.backward(x, weight, bias, dout, seq_idx, None, None, silu)
            return [_written(dx, grads[0]), *grads[1:3]]
        case [seq_idx, initial, dfinal, dx, wanted, silu]:
            grads = convolutions.backward(x, weight, bias, dout, seq_idx, initial, dfinal, silu)
            return [_written(dx, grads[0]), *grads[1:3], grads[3] if wanted else None]
        case [seq_idx, initial, dfinal, dx, dweight, dbias, dinitial, silu]:
            grads = convolutions.backward(x, weight, bias, dout, seq_idx, initial, dfinal, silu)
            dx.copy_(grads[0])
            dweight.add_(grads[1])
            if dbias is not None:
                dbias.add_(grads[2])
            if dinitial is not None:
                dinitial.copy_(grads[3])
            return None
    return _refuse(
        'causal_conv1d_bwd',
        len(arguments),
        {
            '1.0': 'x, weight, bias, dout, dx, silu',
            '1.1': 'x, weight, bias, dout, seq_idx, dx, silu',
            '1.2 to 1.4': 'x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, '
            'return_dinitial_states, silu',
            'from 1.5': 'x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, '
            'dweight, dbias, dinitial_states, silu',
        },
    )


def _written(target: Tensor | None, value: Tensor) -> Tensor:
    return value if target is None else target.copy_(value)


def causal_conv1d_update(*arguments: Tensor | bool | None) -> Tensor | None:
    """Convolve the next steps and update the state; see :func:`mmvim.ops.causal_conv1d_update`.

    Args:
        *arguments: ``x, conv_state, weight, bias, silu`` (1.0 to 1.3), then also
            ``cache_seqlens``, then also ``conv_state_indices`` (1.4), or ``x, conv_state, weight,
            bias, out, silu, cache_seqlens, conv_state_indices`` (from 1.5).

    Returns:
        The output, or None where it is written to ``out``.
    """
    x, state, weight, bias, *rest = arguments if len(arguments) >= 4 else (None,) * 4
    match rest:
        case [silu, *others] if len(others) <= 2:
            return convolutions.update(x, state, weight, bias, 'silu' if silu else None, *others)
        case [out, silu, lengths, indices]:
            name = 'silu' if silu else None
            out.copy_(convolutions.update(x, state, weight, bias, name, lengths, indices))
            return None
    return _refuse(
        'causal_conv1d_update',
        len(arguments),
        {
            '1.0': 'x, conv_state, weight, bias, silu',
            '1.4': 'x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices',
            'from 1.5': 'x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices',
        },
    )
