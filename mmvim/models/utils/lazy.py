"""Registration of models whose base classes belong to a task library."""

import importlib

from mmvim.registry import MODELS


def register_lazily(name: str, module: str) -> None:
    """Register ``mmvim.<name>`` without importing ``module``, which defines it.

    Args:
        name (str): The class.
        module (str): Absolute name of its module, which is imported when a model is built.
    """

    def build(*args: object, **kwargs: object) -> object:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    build.__name__ = build.__qualname__ = name
    MODELS.register_module(name=name, module=build)
