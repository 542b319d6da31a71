"""Definition of ops: one schema, two namespaces, one PyTorch implementation.

Compiled kernels register to ``mmvim::<op>`` (dispatch keys ``CPU`` and ``CUDA``); the
PyTorch implementation sits below them as ``CompositeExplicitAutograd``, so the dispatcher itself is
the fallback. ``mmvim_torch::<op>`` has the same schema and the same implementation and never gets a
compiled kernel: choosing a backend is choosing a namespace. The autograd formula of a namespace
calls the backward op of that namespace, so a choice made in forward holds in backward, on any
thread.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACES = ('mmvim', 'mmvim_torch')
# Queried once: torch.compile of torch 2.11 cannot trace the query.
_WITH_AUTOCAST = frozenset(
    name
    for name in ('cpu', 'cuda', 'mps', 'xpu', 'hpu', 'mtia', 'xla', 'ipu', 'privateuseone')
    if torch.amp.is_autocast_available(name)
)
_LIBRARIES = {name: torch.library.Library(name, 'DEF') for name in NAMESPACES}


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for the devices of this type."""
    return device_type in _WITH_AUTOCAST and torch.is_autocast_enabled(device_type)


def _look_at_each(*inputs: object) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


# Newer than the oldest torch supported.
_any_requires_grad = getattr(torch._C, '_any_requires_grad', _look_at_each)


def without_autocast(function: Callable) -> Callable:
    """Run ``function`` with autocast off: it chooses its own precision."""

    @functools.wraps(function)
    def call(first: Tensor, *args):
        device_type = first.device.type
        if autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return function(first, *args)
        return function(first, *args)

    return call


def _no_double_backward(name: str) -> Callable:
    def backward(ctx, *grads):
        raise NotImplementedError(f'{name} cannot be differentiated a second time')

    return backward


def _complete(function: Callable, op: torch._ops.OpOverload) -> Callable:
    """``function`` with None for arguments at the end that the dispatcher leaves out: defaults."""
    arguments = op._schema.arguments
    if not arguments[-1].has_default_value():
        return function

    @functools.wraps(function)
    def call(*args):
        return function(*args, *(None,) * (len(arguments) - len(args)))

    return call


def _differentiable(
    op: torch._ops.OpOverload, setup_context: Callable | None, formula: Callable
) -> Callable:
    """The autograd kernel of ``op``.

    ``torch.library.register_autograd`` makes one, too, but it walks through the schema in every
    call: 0.35 of the 0.88 ms of host time that a bidirectional scan, with its 19 arguments, took
    forward and backward.
    """

    arguments = len(op._schema.arguments)

    def forward(ctx, *inputs):
        output = below(*inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        return output

    def below(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    members = {'forward': staticmethod(forward), 'backward': staticmethod(formula)}
    function = type(f'{op._opname}_autograd', (torch.autograd.Function,), members)

    def kernel(*inputs):
        # A tangent (forward-mode differentiation) would be lost below: autograd refuses it.
        if (
            torch.is_grad_enabled() and _any_requires_grad(*inputs)
        ) or forward_ad._current_level >= 0:
            return function.apply(*inputs, *(None,) * (arguments - len(inputs)))
        return below(*inputs)

    return kernel


def define(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    composite: bool = False,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Define an op in both namespaces.

    Args:
        schema: ``name(arguments) -> returns``; the first argument is a tensor. Arguments at the end
            may have the default None, so that calls and files from before them stay valid.
        implementation: The PyTorch implementation (no autograd inside).
        fake: Shapes, dtypes and strides of the results, including symbolic shapes.
        composite: Whether ``implementation`` calls other ops: it gets their namespace first, before
            the arguments.
        setup_context: ``(ctx, inputs, output)``: saves what backward needs.
        backward: ``(namespace, ctx, *grads)``: the gradient of each input, computed with the ops of
            ``namespace``. An op without one cannot be differentiated.
    """
    name = schema.partition('(')[0]
    for namespace, library in _LIBRARIES.items():
        ops = getattr(torch.ops, namespace)
        library.define(schema)
        op = getattr(ops, name).default
        function = functools.partial(implementation, ops) if composite else implementation
        function = _complete(without_autocast(function), op)
        library.impl(name, function, 'CompositeExplicitAutograd')
        qualified = f'{namespace}::{name}'
        torch.library.register_fake(qualified, _complete(fake, op), lib=library)
        if backward is None:
            formula = _no_double_backward(name)
        else:
            formula = functools.partial(backward, ops)
        library.impl(name, _differentiable(op, setup_context, formula), 'Autograd')


def define_compiled(schema: str, fake: Callable | None) -> None:
    """Define an op that is compiled code or nothing: kernels, and autograd, are in csrc.

    Without ``fake`` it is made of other ops, for tracers, too.
    """
    _LIBRARIES['mmvim'].define(schema)
    if fake is None:
        return
    name = f'mmvim::{schema.partition("(")[0]}'
    torch.library.register_fake(name, fake, lib=_LIBRARIES['mmvim'])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of parameters and of all arithmetic for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_compute_dtype(x: Tensor) -> Tensor:
    """``x`` in the dtype of its parameters and arithmetic: float64 stays, else float32."""
    return x.to(compute_dtype(x.dtype))
