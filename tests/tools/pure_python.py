"""Configs of names as mmengine's pure-Python configs, whose types are the classes themselves."""

from pathlib import Path
from pprint import pformat
from typing import Any

from mmengine.config import Config
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    TASK_UTILS,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
    DefaultScope,
)

_REGISTRIES = (
    MODELS, TASK_UTILS, DATASETS, TRANSFORMS, DATA_SAMPLERS, METRICS, EVALUATOR, HOOKS, LOOPS,
    OPTIMIZERS, OPTIM_WRAPPERS, VISUALIZERS, VISBACKENDS, LOG_PROCESSORS,
)  # fmt: skip


class _Name:
    """Written into a config as it is, without quotes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def write(source: Path, target: Path) -> None:
    """Write the config ``source`` again, with imported classes as types and no default scope."""
    cfg = Config.fromfile(source)
    scope = cfg.pop('default_scope')
    imports: set[str] = set()
    with DefaultScope.overwrite_default_scope(scope):
        content = _with_classes(cfg.to_dict(), imports)
    lines = [f'{key} = {pformat(value)}' for key, value in content.items()]
    target.write_text('\n'.join([*sorted(imports), *lines, '']))


def _with_classes(node: Any, imports: set[str]) -> Any:
    if isinstance(node, dict):
        return {
            key: _class(value, imports)
            if key in ('type', 'ema_type') and isinstance(value, str)
            else _with_classes(value, imports)
            for key, value in node.items()
        }
    if isinstance(node, (list, tuple)):
        return type(node)(_with_classes(item, imports) for item in node)
    return node


def _class(name: str, imports: set[str]) -> Any:
    for registry in _REGISTRIES:
        with registry.switch_scope_and_registry(None) as scoped:
            found = scoped.get(name)
        if found is not None:
            # The launcher's own stand-ins stay registered in this process.
            module = found.__module__.replace('mmvim.engine.hooks.checkpoint', 'mmengine.hooks')
            module = module.replace('mmvim.engine.optim.averaging', 'mmengine.model')
            imports.add(f'from {module} import {found.__name__}')
            return _Name(found.__name__)
    return name
