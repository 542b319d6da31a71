"""Arguments that a class or function takes, and values that do not fit their declarations."""

import collections.abc
import contextlib
import inspect
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Values that configs give for arguments of these declarations.
_INTERCHANGEABLE = (
    ((bool, int, float), (int, float)),
    ((str, Path, os.PathLike), (str, Path)),
    ((dict, collections.abc.Mapping, collections.abc.MutableMapping), (dict,)),
    (
        (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable,
         collections.abc.Collection, collections.abc.Set),
        (list, tuple, set),
    ),
)  # fmt: skip


def parameters(component: Any) -> Iterator[inspect.Parameter]:
    """Yield the arguments of a class (through ``**kwargs`` of its bases) or function, but self."""
    functions = [component] if callable(component) else []
    if inspect.isclass(component):
        functions = [base.__dict__.get('__init__') for base in component.__mro__]
    seen = {'self'}
    for function in functions:
        if not callable(function) or function is object.__init__:
            continue
        own = _signature(function)
        for parameter in own:
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.name not in seen:
                seen.add(parameter.name)
                yield parameter
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break


def _signature(function: Any) -> list[inspect.Parameter]:
    for evaluated in (True, False):  # False for a name that only type checkers import
        with contextlib.suppress(Exception):
            return list(inspect.signature(function, eval_str=evaluated).parameters.values())
    return []  # compiled code without a signature


def misfits(component: Any, given: dict, *, none: bool = True) -> list[str]:
    """Say which values are of a type that an argument is not declared for.

    Declarations are hints: many a library accepts more than it says. So this explains an error that
    has happened, or checks classes whose declarations are known to be right.

    Args:
        component: A class or function.
        given: Its arguments, as a config gives them. Lists of dicts are left to what they describe.
        none: Whether None counts where it is not declared. Defaults to True.

    Returns:
        For each of them, what it is and what the declaration wants.
    """
    found = []
    for parameter in parameters(component):
        value, declared = given.get(parameter.name), parameter.annotation
        nested = isinstance(value, list | tuple) and value and isinstance(value[0], dict)
        if parameter.name not in given or nested or (value is None and not none):
            continue
        allowed, wanted = _allowed(declared), _written(declared)
        if parameter.default is not parameter.empty:
            as_default = _allowed(type(parameter.default))
            if declared is parameter.empty and parameter.default is not None:
                allowed = as_default
                wanted = f'{type(parameter.default).__name__}, as {parameter.default!r} is'
            elif allowed:
                allowed += as_default or ()
        if allowed and not isinstance(value, allowed):
            found.append(f'{parameter.name}={value!r} must be {wanted}')
    return found


def _allowed(declared: Any) -> tuple[type, ...] | None:
    """The classes of values that fit a declaration; None where anything may."""
    origin = typing.get_origin(declared) or declared
    if origin in (None, type(None)):
        return (type(None),)
    if origin in (typing.Union, types.UnionType):
        parts = [_allowed(part) for part in typing.get_args(declared)]
        return None if None in parts else tuple(kind for part in parts for kind in part)
    if origin is typing.Literal:
        return tuple(type(value) for value in typing.get_args(declared))
    for kinds, allowed in _INTERCHANGEABLE:
        if origin in kinds:
            return allowed
    anything = origin in (Any, object, type, inspect.Parameter.empty, collections.abc.Callable)
    if anything or not inspect.isclass(origin) or getattr(origin, '_is_protocol', False):
        return None
    # What a config describes by a dict, or an object of that class.
    return (origin, dict)


def _written(declared: Any) -> str:
    """A declaration as source says it; unions the same whether declared by Union, Optional or |."""
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        return ' | '.join(_written(part) for part in typing.get_args(declared))
    if isinstance(declared, str):
        return declared
    return inspect.formatannotation(declared).replace('typing.', '').replace('NoneType', 'None')
