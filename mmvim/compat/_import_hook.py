"""Changes of another package, as soon as a module of it is imported.

Standard library only. Nothing is imported before other code imports it, which keeps
``import mmvim`` light and independent of the packages that the shims are for.
"""

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

Callback = Callable[[ModuleType], None]

_callbacks: dict[str, list[Callback]] = {}


class _PostImportFinder(importlib.abc.MetaPathFinder):
    """First on ``sys.meta_path``: finds watched modules as usual and hooks their execution."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _callbacks:
            return None
        spec = self._find_with_the_others(fullname, path, target)
        if spec is None or isinstance(spec.loader, type) or not hasattr(spec.loader, 'exec_module'):
            return spec
        loader = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # A loader may serve several modules: restore its own method before anything else.
            if loader.__dict__.get('exec_module') is exec_module:
                del loader.exec_module
            execute(module)
            if module.__name__ == fullname:
                _run_callbacks(module)

        loader.exec_module = exec_module
        return spec

    def _find_with_the_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, 'find_spec', None)
            if finder is self or find_spec is None:
                continue
            spec = find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


def _run_callbacks(module: ModuleType) -> None:
    for callback in _callbacks.get(module.__name__, ()):
        callback(module)


def when_imported(name: str, callback: Callback) -> None:
    """Call ``callback(module)`` once module ``name`` has been executed, at once if it already has.

    The callback runs again when the module is executed again (after a reload or a removal from
    ``sys.modules``), so it must leave an already patched module unchanged.

    Args:
        name: Full module name, such as ``'mmengine.config.utils'``.
        callback: Function of the module object. Its exceptions reach the importing code.
    """
    if not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportFinder())
    registered = _callbacks.setdefault(name, [])
    if callback in registered:
        return
    registered.append(callback)
    module = sys.modules.get(name)
    spec = getattr(module, '__spec__', None)
    if module is not None and not getattr(spec, '_initializing', False):
        callback(module)


def replaces(owner: object, name: str) -> Callable[[Callable], Callable]:
    """Put the decorated function in the place of another package's, once.

    It gets the original as its first argument, before those of the call. Static and class methods
    stay so.

    Args:
        owner: A module or class.
        name: Name of the function in it.
    """

    def decorate(function: Callable) -> Callable:
        given = vars(owner).get(name) or getattr(owner, name)
        kind = type(given) if isinstance(given, staticmethod | classmethod) else None
        original = given.__func__ if kind else given
        if hasattr(original, 'replaced_by_mmvim'):
            return function

        @functools.wraps(original)
        def replacement(*args: object, **kwargs: object) -> object:
            return function(original, *args, **kwargs)

        replacement.replaced_by_mmvim = True
        setattr(owner, name, kind(replacement) if kind else replacement)
        return function

    return decorate
