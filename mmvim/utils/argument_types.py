"""Which values of a config are of another type than the class that gets them declares."""

import collections.abc
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_SEQUENCES = (
    list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable,
    collections.abc.Collection, collections.abc.Set,
)  # fmt: skip
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def parameters(component: Any) -> Iterator[inspect.Parameter]:
    """Yield the arguments of a class (through ``**kwargs`` of its bases) or function, but self."""
    if not callable(component):
        return
    functions = (
        [base.__dict__.get('__init__') for base in component.__mro__]
        if inspect.isclass(component)
        else [component]
    )
    seen = {'self'}
    for function in functions:
        if not callable(function) or function is object.__init__:
            continue
        own = list(_signature(function).parameters.values())
        for parameter in own:
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.name not in seen:
                seen.add(parameter.name)
                yield parameter
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break


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
        if parameter.name not in given:
            continue
        value = given[parameter.name]
        nested = isinstance(value, list | tuple) and value and isinstance(value[0], dict)
        if nested or (value is None and not none) or _fits(value, parameter):
            continue
        found.append(f'{parameter.name}={value!r} must be {_described(parameter)}')
    return found


def _signature(function: Any) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except Exception:  # a name that only type checkers import
        return inspect.signature(function)


def _fits(value: Any, parameter: inspect.Parameter) -> bool:
    default = parameter.default
    if parameter.annotation is parameter.empty:
        allowed = None if default in (None, parameter.empty) else _allowed(type(default))
    else:
        allowed = _allowed(parameter.annotation)
        if allowed and default is not parameter.empty:
            allowed += _allowed(type(default)) or ()
    return allowed is None or isinstance(value, allowed)


def _allowed(declared: Any) -> tuple[type, ...] | None:
    """The classes of values that fit a declaration; None where anything may."""
    if declared is None or declared is type(None):
        return (type(None),)
    if declared in (bool, int, float):
        return (int, float)
    # list[int] counts as a class in Python 3.10.
    is_class = inspect.isclass(declared) and typing.get_origin(declared) is None
    if declared in (str, os.PathLike) or (is_class and issubclass(declared, os.PathLike)):
        return (str, Path)
    origin = typing.get_origin(declared) or declared
    if origin in (typing.Union, types.UnionType):
        parts = [_allowed(part) for part in typing.get_args(declared)]
        return None if None in parts else tuple(kind for part in parts for kind in part)
    if origin is typing.Literal:
        return tuple(type(value) for value in typing.get_args(declared))
    if origin in _SEQUENCES:
        return (list, tuple, set)
    if origin in _MAPPINGS:
        return (dict,)
    anything = not is_class or declared in (object, type, Any, Callable)
    if anything or getattr(declared, '_is_protocol', False):
        return None
    # What a config describes by a dict, or an object of that class.
    return (declared, dict)


def _described(parameter: inspect.Parameter) -> str:
    if parameter.annotation is parameter.empty:
        return f'{type(parameter.default).__name__}, as {parameter.default!r} is'
    if isinstance(parameter.annotation, str):
        return parameter.annotation
    return _written(parameter.annotation)


def _written(declared: Any) -> str:
    """A declaration as source says it; unions the same whether declared by Union, Optional or |."""
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        return ' | '.join(_written(part) for part in typing.get_args(declared))
    return inspect.formatannotation(declared).replace('typing.', '').replace('NoneType', 'None')
