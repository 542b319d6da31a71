"""Arguments of a class or function, and values that do not fit their declarations."""

import collections.abc
import contextlib
import inspect
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Types of values in configs for arguments with these declarations.
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
    """Yield the arguments of a class (and of bases, by ``**kwargs``) or function, without self."""
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
    """Describe the values whose types do not fit the declarations of their arguments.

    Declarations are hints: libraries often accept more than they declare. So this explains an error
    that has happened, or checks classes with reliable declarations.

    Args:
        component: A class or function.
        given: Its arguments, as in a config. Lists of dicts are left to what they describe.
        none: Whether an undeclared None counts. Defaults to True.

    Returns:
        For each of them, its value and the declared type.
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
    """The classes of values that fit a declaration; None if anything does."""
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
    # A component that the config describes by a dict, or an object of that class.
    return (origin, dict)


def _written(declared: Any) -> str:
    """A declaration as in the source, with one notation for all unions."""
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        return ' | '.join(_written(part) for part in typing.get_args(declared))
    if isinstance(declared, str):
        return declared
    return inspect.formatannotation(declared).replace('typing.', '').replace('NoneType', 'None')
