"""Choice of the implementation: compiled kernels, PyTorch, or a caller's replacement.

Precedence: the ``backend=`` argument of a function > :func:`use_backend` > :func:`set_backend` >
the environment variable ``MMVIM_BACKEND`` (read at import) > ``'auto'``.
:func:`intercept_ops` applies before whichever of them was chosen.
"""

import functools
import os
import threading
import warnings
from collections.abc import Callable

import torch

from . import extension

BACKENDS = ('auto', 'compiled', 'torch')
# Newer than the oldest supported torch; an exported graph is for inference.
is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)


class _Scope(threading.local):
    # Not a context variable, which torch.compile can only trace since 2026.
    name: str | None = None
    interceptors: tuple[dict[str, Callable], ...] = ()


_scope = _Scope()
_warned = False


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f'{source} must be one of {BACKENDS}, got {name!r}')
    return name


_process = _checked(os.environ.get('MMVIM_BACKEND', 'auto'), 'MMVIM_BACKEND')


def set_backend(name: str) -> None:
    """Choose the backend of this process, for all threads.

    Args:
        name: ``'auto'`` (compiled kernels where they exist, else PyTorch), ``'compiled'`` (an error
            where they do not) or ``'torch'``.

    Raises:
        ValueError: For any other name.
    """
    global _process
    _process = _checked(name, 'backend')


def get_backend() -> str:
    """The current backend: that of the innermost :func:`use_backend`, else of the process."""
    return _scope.name or _process


class use_backend:
    """Choose the backend for a block of code, in this thread only.

    Gradients of results computed inside use the same backend, wherever ``backward()`` is called.

    Args:
        name: As for :func:`set_backend`.

    Raises:
        ValueError: For an unknown name.
    """

    def __init__(self, name: str) -> None:
        self._name = _checked(name, 'backend')
        self._outer = []

    def __enter__(self) -> None:
        self._outer.append(_scope.name)
        _scope.name = self._name

    def __exit__(self, *exception: object) -> None:
        _scope.name = self._outer.pop()


class intercept_ops:
    """Observe or replace calls of ops for a block of code, in this thread only.

    Blocks nest: the op of an inner block's function is the outer block's function. Mixers call op
    by op inside (see :class:`mmvim.layers.fusion.Fusable`). Gradients of what a replaced op
    computes are those of the function; the backward ops are not intercepted.

    Args:
        **functions: For the name of an op, such as ``'selective_scan'``, a function that is called
            in its place, with the op and then the op's arguments, all by position and in the order
            of its schema. It returns what the op returns.

    Raises:
        ValueError: If there is no op of a name, or it is a backward op.

    Example:
        >>> def timed(op, *args):
        ...     start = time.perf_counter()
        ...     out = op(*args)
        ...     print(time.perf_counter() - start)
        ...     return out
        >>> with intercept_ops(selective_scan=timed):
        ...     model(x)
    """

    def __init__(self, **functions: Callable) -> None:
        for name in functions:
            if name.endswith('_backward') or not hasattr(torch.ops.mmvim, name):
                raise ValueError(f'{name!r} is no op that can be intercepted')
        self._functions = functions
        self._outer = []

    def __enter__(self) -> None:
        self._outer.append(_scope.interceptors)
        _scope.interceptors = (*_scope.interceptors, self._functions)

    def __exit__(self, *exception: object) -> None:
        _scope.interceptors = self._outer.pop()


def is_intercepted() -> bool:
    """Whether this thread is inside :func:`intercept_ops`."""
    return bool(_scope.interceptors)


class _Intercepted:
    """A namespace of ops, some of them replaced."""

    def __init__(self, ops: object, functions: dict[str, Callable]) -> None:
        self._ops = ops
        self._functions = functions

    def __getattr__(self, name: str) -> Callable:
        op = getattr(self._ops, name)
        function = self._functions.get(name)
        return op if function is None else functools.partial(function, op)


def _compiled(requested: str, op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether ``op`` is to run compiled; the answer is constant while a graph lives."""
    global _warned
    if requested == 'torch':
        return False
    if extension.supports(op, device_type, dtype):
        return True
    if requested == 'compiled':
        raise RuntimeError(
            f"backend 'compiled': no compiled kernel of {op} for {dtype} on {device_type!r}: "
            f'{extension.why_not()}'
        )
    if device_type == 'cuda' and not _warned:
        _warned = True
        warnings.warn(
            f'mmvim runs {op} on a CUDA device through PyTorch, which is much slower than its '
            f"compiled kernels: {extension.why_not()}. backend='torch' silences this warning.",
            stacklevel=2,
        )
    return False


# Set as by torch.compiler.assume_constant_result, which would import the compiler for seconds.
_compiled._dynamo_marked_constant = True


def resolve(backend: str | None, op: str, tensor: torch.Tensor) -> object:
    """The namespace of ops to call: ``torch.ops.mmvim`` or ``torch.ops.mmvim_torch``, intercepted.

    Args:
        backend: The caller's ``backend=`` argument; None and ``'auto'`` state no preference, so the
            next level of the precedence decides.
        op: Name of the op.
        tensor: The tensor whose device and dtype decide.

    Raises:
        ValueError: If ``backend`` is unknown.
        RuntimeError: If compiled kernels are demanded and there is none for this device and dtype.
    """
    if backend is not None:
        _checked(backend, 'backend')
    requested = get_backend() if backend is None or backend == 'auto' else backend
    compiled = _compiled(requested, op, tensor.device.type, tensor.dtype)
    ops = torch.ops.mmvim if compiled else torch.ops.mmvim_torch
    for functions in _scope.interceptors:
        ops = _Intercepted(ops, functions)
    return ops
