"""``torch.compile`` for the part of a model that benefits: the backbone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import nn

from mmvim.checkpoints.loading import unwrapped
from mmvim.errors import UserError
from mmvim.registry import HOOKS

_OPTIONS = tuple(inspect.signature(torch.compile).parameters)[1:]


@HOOKS.register_module()
class CompileHook(Hook):
    """Compile every backbone of the model with ``torch.compile`` when training or testing begins.

    MMEngine's own ``compile=True`` compiles ``train_step``, whose optimizer wrapper and logging of
    losses cannot be traced. Backbones are the modules named ``backbone``, at any depth. They are
    compiled in place: parameters, checkpoints and hooks stay the same, and copies made by
    ``EMAHook`` and others are not compiled. ``tools/train.py`` and ``tools/test.py`` add
    this hook for ``compile=True`` or ``compile=dict(…)`` in a config.

    Args:
        **options: Those of :func:`torch.compile`: ``mode``, ``dynamic``, ``fullgraph``,
            ``backend``, ``options`` or ``disable``. ``mode='reduce-overhead'`` records CUDA graphs,
            one for each input shape, and suits inputs of few shapes.

    Raises:
        TypeError: If there is no such option.

    Example:
        >>> custom_hooks = [dict(type='mmvim.CompileHook', mode='reduce-overhead')]
    """

    def __init__(self, **options: Any) -> None:
        for name in options:
            if name not in _OPTIONS:
                raise TypeError(f'CompileHook: unknown {name!r}; allowed: {", ".join(_OPTIONS)}')
        self.options = options

    def before_train(self, runner: Any) -> None:
        """Compile, unless that is done.

        Raises:
            UserError: If the model has no backbone, or it cannot be compiled so.
        """
        for name, module in find_backbones(runner.model, 'compile').items():
            if module._compiled_call_impl is not None:
                continue
            try:
                module.compile(**self.options)
            except (RuntimeError, TypeError, ValueError) as error:
                raise UserError(f'compile={self.options!r}: {error}') from error
            runner.logger.info(
                f'{name} ({type(module).__name__}) is compiled: the first iteration, and the first '
                'with another shape, take minutes'
            )

    before_val = before_test = before_train


def find_backbones(model: nn.Module, purpose: str) -> dict[str, nn.Module]:
    """Return the modules called ``backbone``, at any depth, by their full names.

    Raises:
        UserError: If there is none; ``purpose`` is what the message begins with.
    """
    model = unwrapped(model)
    backbones = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition('.')[2] == 'backbone'
    }
    if not backbones:
        raise UserError(f'{purpose}: {type(model).__name__} has no backbone, which it is for')
    return backbones
