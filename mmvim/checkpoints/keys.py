"""Helpers that map the checkpoints of official models to ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_WRAPPERS = ('model', 'module', 'state_dict')
#: Key prefixes added by data parallelism, torch.compile and a class around the model.
WRAPPING_PREFIXES = ('module.', '_orig_mod.', 'model.')


@dataclass
class Fitting:
    """Agreement of a load with the backbones of the model.

    Attributes:
        refuses: Whether a backbone refuses a checkpoint of another model. Otherwise what does not
            fit is left to ``torch.nn.Module.load_state_dict``, which lists all of it.
        dropped: Values of the checkpoint that a backbone knows and has no place for, such as an
            official model's head.
    """

    refuses: bool = True
    dropped: list[Any] = field(default_factory=list)


#: Of the load in progress.
fitting: ContextVar[Fitting] = ContextVar('fitting')


def unwrap_state_dict(state_dict: MutableMapping[str, Any]) -> None:
    """Replace ``{'model': weights, 'optimizer': …}`` by the weights, in place.

    Weights under 'module' or 'state_dict' are unwrapped too, and the ``module.``, ``_orig_mod.`` or
    ``model.`` that a wrapper adds to each key is removed.
    """
    for wrapper in _WRAPPERS:
        if isinstance(state_dict.get(wrapper), Mapping):
            inner = dict(state_dict[wrapper])
            state_dict.clear()
            state_dict.update(inner)
    while state_dict:
        prefix = next(
            (p for p in WRAPPING_PREFIXES if all(key.startswith(p) for key in state_dict)), None
        )
        if prefix is None:
            break
        rename_keys(state_dict, {key: key[len(prefix) :] for key in state_dict})


def rename_keys(state_dict: MutableMapping[str, Any], names: Mapping[str, str]) -> None:
    """Rename keys in place."""
    moved = {new: state_dict.pop(old) for old, new in names.items()}
    state_dict.update(moved)


def keys_under(state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """Return the keys that start with ``prefix``, without it."""
    return [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]


def layer_count(keys: Iterable[str], pattern: str) -> int:
    """Return one more than the highest index that ``pattern``'s first group finds in ``keys``."""
    found = (re.match(pattern, key) for key in keys)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def size_mismatches(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """List (name, size in the checkpoint, size in the module) where the two sizes differ."""
    wrong = []
    for name, own in [*module.named_parameters(), *module.named_buffers()]:
        given = state_dict.get(prefix + name)
        # A parameter that is sharded over processes is empty here and checked by its owner.
        if given is None or own.numel() == 0 or not hasattr(given, 'shape'):
            continue
        if given.shape != own.shape:
            wrong.append((name, tuple(given.shape), tuple(own.shape)))
    return wrong


def strip_prefixes(state_dict: MutableMapping[str, Any], prefixes: tuple[str, ...]) -> None:
    """Remove the first of ``prefixes`` that a key has, in place.

    Raises:
        ValueError: If two keys would become one.
    """
    names = {}
    for key in state_dict:
        prefix = next((p for p in prefixes if key.startswith(p)), '')
        if prefix:
            names[key] = key[len(prefix) :]
    kept = [key for key in state_dict if key not in names]
    new = [*names.values(), *kept]
    if len(set(new)) < len(new):
        twice = next(key for key in new if new.count(key) > 1)
        raise ValueError(f"the checkpoint has '{twice}' twice: bare, or under one of {prefixes}")
    rename_keys(state_dict, names)
