"""Children of mmengine's registries, with the scope ``mmvim``.

mmengine imports this module by itself when it encounters a ``type='mmvim.X'``, and then the module
that defines X, so that the type resolves in every scope, without ``custom_imports``. Models are
registered by the tables of :mod:`mmvim._names`, other components by decorators.
"""

import logging
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from . import _names

try:
    from mmengine import registry as root
    from mmengine.logging import print_log
except ModuleNotFoundError as error:
    raise ImportError(
        'mmvim.models and all that uses configs need mmengine, which is not installed: '
        "pip install 'mmvim[onedl]' (mmvim.ops and mmvim.layers work with torch alone)"
    ) from error

_MODELS = ['mmvim.models']
_DATA = ['mmvim.datasets']
_ENGINE = ['mmvim.engine']


def _child(parent: root.Registry, locations: list[str]) -> root.Registry:
    return root.Registry(parent.name, parent=parent, scope='mmvim', locations=locations)


MODELS = _child(root.MODELS, _MODELS)
MODEL_WRAPPERS = _child(root.MODEL_WRAPPERS, _MODELS)
WEIGHT_INITIALIZERS = _child(root.WEIGHT_INITIALIZERS, _MODELS)
TASK_UTILS = _child(root.TASK_UTILS, _MODELS)

DATASETS = _child(root.DATASETS, _DATA)
DATA_SAMPLERS = _child(root.DATA_SAMPLERS, _DATA)
TRANSFORMS = _child(root.TRANSFORMS, _DATA)

RUNNERS = _child(root.RUNNERS, _ENGINE)
RUNNER_CONSTRUCTORS = _child(root.RUNNER_CONSTRUCTORS, _ENGINE)
LOOPS = _child(root.LOOPS, _ENGINE)
HOOKS = _child(root.HOOKS, _ENGINE)
STRATEGIES = _child(root.STRATEGIES, _ENGINE)
OPTIMIZERS = _child(root.OPTIMIZERS, _ENGINE)
OPTIM_WRAPPERS = _child(root.OPTIM_WRAPPERS, _ENGINE)
OPTIM_WRAPPER_CONSTRUCTORS = _child(root.OPTIM_WRAPPER_CONSTRUCTORS, _ENGINE)
PARAM_SCHEDULERS = _child(root.PARAM_SCHEDULERS, _ENGINE)
METRICS = _child(root.METRICS, _ENGINE)
EVALUATOR = _child(root.EVALUATOR, _ENGINE)
VISUALIZERS = _child(root.VISUALIZERS, _ENGINE)
VISBACKENDS = _child(root.VISBACKENDS, _ENGINE)
LOG_PROCESSORS = _child(root.LOG_PROCESSORS, _ENGINE)
INFERENCERS = _child(root.INFERENCERS, _ENGINE)


class _Modules(dict):
    """The modules of a registry, of which those of :mod:`mmvim._names` are imported on use."""

    def __getitem__(self, name: str) -> Callable:
        module = super().__getitem__(name)
        if isinstance(module, SimpleNamespace):
            module = self[name] = _names.load(name)
        return module

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


def _register(registry: root.Registry, names: Iterable[str]) -> None:
    """Put names of :mod:`mmvim._names` into a registry; names already taken are left alone."""
    registry._module_dict = _Modules(registry.module_dict)
    for name in names:
        if name in registry.module_dict:
            print_log(
                f"mmvim: '{name}' in mmengine's MODELS is {registry.module_dict[name]}; use "
                f"type='mmvim.{name}' for the model of mmvim",
                logger='current',
                level=logging.WARNING,
            )
        else:
            entry = SimpleNamespace(__name__=name, __module__=_names.NAMES[name])
            registry.module_dict[name] = entry


_register(MODELS, [*_names.MODELS, *_names.CLASSIFIERS])
_register(root.MODELS, _names.PLAIN_NAMES)
