"""Child registries of mmengine's, with the scope ``mmvim``.

mmengine imports this module itself when it meets a ``type='mmvim.X'``, and then the module that
defines X. So the type resolves in every scope, without ``custom_imports``.
"""

import importlib
import logging
from collections.abc import Callable

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

PLAIN_NAMES = ('Vim', 'VisionMamba', 'VideoMamba', 'MambaVision', 'SimpleFPN')
_placeholders: dict[str, Callable] = {}


def _placeholder(name: str) -> Callable:
    """Build the model ``name`` without importing :mod:`mmvim.models` before it is wanted."""

    def build(*args: object, **kwargs: object) -> object:
        return getattr(importlib.import_module('mmvim.models'), name)(*args, **kwargs)

    build.__name__ = build.__qualname__ = name
    return build


def register_plain_names() -> None:
    """Put the models under their plain names into mmengine's root registry.

    A name that is taken is skipped with a warning. Before :mod:`mmvim.models` is imported (which
    takes as long as ``import mmengine.model``) placeholders stand for the classes.
    """
    taken = root.MODELS.module_dict
    for name in PLAIN_NAMES:
        model = MODELS.module_dict.get(name)
        ours = _placeholders.get(name), model
        if taken.get(name) in ours and name in taken:
            if model is not None:
                root.MODELS.register_module(name=name, module=model, force=True)
        elif name not in taken:
            if model is None:
                model = _placeholders.setdefault(name, _placeholder(name))
            root.MODELS.register_module(name=name, module=model)
        elif model is None:
            print_log(
                f"mmvim: '{name}' in mmengine's MODELS is {taken[name]}; use type='mmvim.{name}' "
                'for the model of mmvim',
                logger='current',
                level=logging.WARNING,
            )
