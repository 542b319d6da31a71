"""Checks of arguments, with errors that name the argument, its value and what is allowed."""

import math
from collections.abc import Sequence
from numbers import Real


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """Raise ValueError, naming the argument and what is allowed, unless ``value`` is allowed."""
    if value not in allowed:
        options = ', '.join(repr(a) for a in allowed)
        raise ValueError(f'{name}={value!r} is unknown; allowed: {options}')


def is_positive(value: object) -> bool:
    """Whether ``value`` is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_positive(**sizes: int) -> None:
    """Raise ValueError for the first size that is not a positive integer."""
    for name, value in sizes.items():
        if not is_positive(value):
            raise ValueError(f'{name}={value!r} must be a positive integer')


def check_flags(**flags: bool) -> None:
    """Raise ValueError for the first flag that is neither True nor False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name}={value!r} must be True or False')


def check_number(name: str, value: object, least: float, below: float = math.inf) -> None:
    """Raise ValueError unless ``value`` is a number in [least, below)."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not least <= value < below:
        allowed = f'of at least {least}' if below == math.inf else f'in [{least}, {below})'
        raise ValueError(f'{name}={value!r} must be a number {allowed}')


def check_numbers(name: str, values: object) -> None:
    """Raise ValueError unless ``values`` is a sequence of numbers."""
    if not isinstance(values, Sequence) or not all(
        isinstance(v, Real) and not isinstance(v, bool) for v in values
    ):
        raise ValueError(f'{name}={values!r} must be a sequence of numbers')


def check_indices(name: str, value: object) -> tuple[int, ...]:
    """Return an integer or a sequence of integers as a tuple; raise ValueError for others."""
    indices = tuple(value) if isinstance(value, Sequence) else (value,)
    if isinstance(value, str) or any(
        isinstance(i, bool) or not isinstance(i, int) for i in indices
    ):
        raise ValueError(f'{name}={value!r} must be an integer or a sequence of integers')
    return indices
