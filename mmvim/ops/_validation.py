"""Checks of the arguments of public functions, before anything runs."""

import math

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from ._library import compute_dtype
from .discretization import DISCRETIZATIONS

MAX_STATES = 256
# A tuple, since torch.compile of torch 2.6 cannot trace a union of types.
_NUMBERS = (int, float, torch.SymFloat)
ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object) -> None:
    """Refuse what is not a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(value).__name__}')
    if value.is_nested:
        raise TypeError(f'{name} must be a dense tensor, got a nested one')
    if value.layout != torch.strided:
        raise TypeError(f'{name} must be a dense (strided) tensor, got layout {value.layout}')


def check_real(name: str, value: object) -> None:
    """Refuse what is not a dense tensor of real numbers."""
    check_tensor(name, value)
    if value.is_complex():
        raise TypeError(
            f'{name} must be real, got {value.dtype}: complex states are not supported. '
            'Real ones are, such as A = -torch.exp(A_log)'
        )


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f'{name} must be True or False, got {value!r}')


def as_flag(name: str, value: object) -> bool:
    """A flag as other packages take it: None is False, and 1 is True."""
    if value is not None and (isinstance(value, Tensor) or value not in (True, False)):
        raise TypeError(f'{name} must be True or False, got {value!r}')
    return bool(value)


def check_number(name: str, value: object, least: float | None = None) -> None:
    """Refuse what is not a finite real number of ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if least is not None and not value >= least:
        raise ValueError(f'{name} must be {least} or more, got {value}')
    # By comparison: torch.compile cannot ask math.isfinite about a symbol.
    if not -math.inf < value < math.inf:
        raise ValueError(f'{name} must be finite, got {value}')


def check_activation(name: str, value: Tensor, axes: str) -> None:
    """Refuse what is not an activation with the axes of the string ``axes``, such as 'b l d'."""
    check_tensor(name, value)
    check_rank(name, value, axes)
    if value.dtype not in ACTIVATION_DTYPES:
        allowed = ', '.join(map(str, ACTIVATION_DTYPES))
        raise TypeError(f'{name} must have one of the dtypes {allowed}, got {value.dtype}')


def check_rank(name: str, value: Tensor, axes: str) -> None:
    """Refuse a wrong number of axes."""
    if value.dim() != len(axes.split()):
        raise ValueError(
            f'{name} must have the axes ({axes.replace(" ", ", ")}), got shape {tuple(value.shape)}'
        )


def check_shape(name: str, value: Tensor, axes: str, shape: tuple) -> None:
    """Refuse a shape other than ``shape``."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f'{name} must have shape ({axes.replace(" ", ", ")}) = {tuple(shape)}, '
            f'got {tuple(value.shape)}'
        )


def check_device(name: str, value: Tensor, first: str, device: torch.device) -> None:
    """Refuse a tensor on a device other than that of the first argument."""
    if value.device != device:
        raise ValueError(
            f'all tensors must be on one device: {first} is on {device}, {name} on {value.device}'
        )


def check_dtype(name: str, value: Tensor, *allowed: torch.dtype, why: str) -> None:
    """Refuse dtypes other than ``allowed``."""
    if value.dtype not in allowed:
        names = ' or '.join(map(str, dict.fromkeys(allowed)))
        raise TypeError(f'{name} must be {names} ({why}), got {value.dtype}')


def check_seq_idx(seq_idx: object, first: str, x: Tensor) -> None:
    """Refuse what does not number the sequences of x (b, l, d), the argument ``first``."""
    name = 'seq_idx'
    check_tensor(name, seq_idx)
    check_shape(name, seq_idx, 'b l', x.shape[:2])
    check_dtype(name, seq_idx, torch.int32, why='it numbers sequences')
    check_device(name, seq_idx, first, x.device)


def check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    discretization: str,
    suffix: str = '',
) -> None:
    """Check the arguments of one scan whose B and C have axes (b, l, g, n).

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization: See
            :func:`mmvim.ops.selective_scan`.
        suffix: Appended to the names in messages.
    """
    check_flag('delta_softplus', delta_softplus)
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f'discretization must be one of {DISCRETIZATIONS}, got {discretization!r}')
    name_u = f'u{suffix}'
    check_activation(name_u, u, 'b l d')
    b, length, d = u.shape
    name_A = f'A{suffix}'
    check_tensor(name_A, A)
    check_rank(name_A, A, 'd n')
    n = A.shape[1]
    if not 1 <= n <= MAX_STATES:
        raise ValueError(f'{name_A} must have 1 to {MAX_STATES} states, got shape {tuple(A.shape)}')
    check_shape(name_A, A, 'd n', (d, n))
    for name, value in (('delta', delta), ('z', z)):
        if value is not None or name == 'delta':
            check_tensor(name + suffix, value)
            check_shape(name + suffix, value, 'b l d', (b, length, d))
            check_dtype(name + suffix, value, u.dtype, why=f'as {name_u}')
            check_device(name + suffix, value, name_u, u.device)
    for name, value in (('B', B), ('C', C)):
        check_tensor(name + suffix, value)
        if value.dim() != 4:
            raise ValueError(
                f'{name}{suffix} must have the axes (b, l, n) or (b, l, g, n), '
                f'got shape {tuple(value.shape)}'
            )
        groups = value.shape[2]
        if groups < 1 or d % groups:
            raise ValueError(
                f'the number of groups of {name}{suffix} must divide d = {d}, got {groups}'
            )
        check_shape(name + suffix, value, 'b l g n', (b, length, B.shape[2], n))
        check_dtype(name + suffix, value, u.dtype, why=f'as {name_u}')
        check_device(name + suffix, value, name_u, u.device)
    parameter = compute_dtype(u.dtype)
    why = f'{name_u} is {u.dtype}'
    check_dtype(name_A, A, parameter, why=why)
    check_device(name_A, A, name_u, u.device)
    for name, value in (('D', D), ('delta_bias', delta_bias)):
        if value is not None:
            check_tensor(name + suffix, value)
            check_shape(name + suffix, value, 'd', (d,))
            check_dtype(name + suffix, value, parameter, why=why)
            check_device(name + suffix, value, name_u, u.device)


def check_negative(name: str, A: Tensor, u: Tensor) -> None:
    """Refuse an A that is not negative, without reading the same values twice.

    Reading costs a synchronisation on a GPU, so the result is remembered on the tensor, with its
    version. Values that do not exist (fake and meta tensors, tracing) or must not be waited for
    (capture of a CUDA graph) are trusted.
    """
    if torch.compiler.is_compiling() or not isinstance(A, Tensor):
        return
    # Anything but matrices of parameters that fit u is refused when all arguments are checked.
    if A.is_nested or A.layout != torch.strided or A.is_meta or A.dtype not in ACTIVATION_DTYPES:
        return
    channels = u.shape[-1:] if isinstance(u, Tensor) and not u.is_nested else None
    if A.dim() not in (2, 3) or A.shape[-1] > MAX_STATES or A.shape[-2:-1] != channels:
        return
    version = None if A.is_inference() else A._version
    if version is not None and getattr(A, '_mmvim_negative', None) == version:
        return
    if A.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if detect_fake_mode((A,)) is not None:
        return
    if bool((A.detach() >= 0).any()):
        raise ValueError(
            f'{name} must be negative (the state would not decay), got values up to {A.max():g}'
        )
    if version is not None:
        A._mmvim_negative = version
