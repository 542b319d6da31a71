"""Reading of configs."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmvim.errors import UserError

_LIBRARIES = ('mmpretrain', 'mmdet', 'mmseg')


def read_config(path: str | Path) -> Config:
    """Read a config file.

    Raises:
        UserError: It does not exist, or reading it fails, for whatever reason.
    """
    if not os.path.isfile(path):
        kind = 'is a directory' if os.path.isdir(path) else 'does not exist'
        raise UserError(f'the config file {str(path)!r} {kind}')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        line = f', line {error.lineno}' if isinstance(error, SyntaxError) else ''
        raise UserError(
            f'the config file {str(path)!r} cannot be read{line}: {type(error).__name__}: {error}'
        ) from error
    settle_scope(cfg)
    return cfg


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Change a config as ``--cfg-options`` says.

    Raises:
        UserError: A value does not fit into the config.
    """
    try:
        cfg.merge_from_dict(dict(options))
    except (KeyError, TypeError, AssertionError, IndexError) as error:
        raise UserError(f'--cfg-options cannot be merged into the config: {error}') from error


def is_local(path: str) -> bool:
    """Whether a path is one of the file system, and no URL or name of a remote storage."""
    return re.match(r'[\w+.-]+:(//|s3:|petrel:)', path) is None


def type_name(component: Any) -> str:
    """Name of a component's class, without its scope.

    Args:
        component: The component's config, or its ``type``: a string such as ``'mmdet.CocoDataset'``
            or, as in mmengine's pure-Python configs, the class or function itself.

    Returns:
        For example ``'CocoDataset'``; an empty string if there is no type.
    """
    kind = component.get('type') if isinstance(component, Mapping) else component
    if kind is None:
        return ''
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))
    return name.rpartition('.')[2]


def type_scope(component: Any) -> str:
    """Package of a component's class.

    Args:
        component: As in :func:`type_name`.

    Returns:
        For example ``'mmdet'``, which is the prefix of a string and the package of a class; an
        empty string for a name without a prefix.
    """
    kind = component.get('type') if isinstance(component, Mapping) else component
    if kind is None:
        return ''
    if isinstance(kind, str):
        return kind.rpartition('.')[0].partition('.')[0]
    return str(getattr(kind, '__module__', '')).partition('.')[0]


def is_mmengine(component: Any, *names: str) -> bool:
    """Whether a component is one of mmengine's, of one of these names.

    A name without a prefix counts as mmengine's.
    """
    return type_name(component) in names and type_scope(component) in ('', 'mmengine')


def settle_scope(cfg: Config) -> None:
    """Set a config's missing ``default_scope`` to the task library of its model.

    mmengine's pure-Python configs do without one.
    """
    model = cfg.get('model')
    if cfg.get('default_scope') is not None or not isinstance(model, Mapping):
        return
    kind = model.get('type')
    ancestors = kind.__mro__ if isinstance(kind, type) else [kind]
    for scope in map(type_scope, ancestors):
        if scope in _LIBRARIES:
            cfg.default_scope = scope
            return


def innermost_dataset(loader: Mapping | None) -> Mapping:
    """Config of the data set that a dataloader reads, below wrappers.

    Args:
        loader: A dataloader's config, such as ``cfg.test_dataloader``, or None.

    Returns:
        The wrapped data set; of several that are joined, the first. Empty if there is none.
    """
    dataset = (loader or {}).get('dataset') or {}
    while True:
        inner = dataset.get('dataset') or dataset.get('datasets')
        if isinstance(inner, (list, tuple)):
            inner = inner[0] if inner else None
        if not isinstance(inner, Mapping):
            return dataset
        dataset = inner


def leaf_datasets(node: Any, path: str) -> Iterator[tuple[str, dict]]:
    """Yield the datasets inside wrappers such as RepeatDataset and ConcatDataset."""
    if not isinstance(node, dict):
        return
    inner = [(f'{path}.dataset', node['dataset'])] if 'dataset' in node else []
    if isinstance(node.get('datasets'), list | tuple):
        inner += [(f'{path}.datasets.{i}', item) for i, item in enumerate(node['datasets'])]
    if not inner:
        yield path, node
    for inner_path, item in inner:
        yield from leaf_datasets(item, inner_path)
