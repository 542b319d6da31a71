"""Checks of a config without model and data, before anything is built."""

import importlib.util
import inspect
import os
import re
from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import init_dist
from mmengine.registry import (
    DATASETS,
    FUNCTIONS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    OPTIMIZERS,
    Registry,
    init_default_scope,
)
from mmengine.runner import Priority
from mmengine.utils.dl_utils import set_multi_processing
from torch.utils.data import DataLoader

from mmvim._arguments import misfits, parameters
from mmvim._configs import is_local, leaf_datasets, type_name, type_scope
from mmvim.compat import require
from mmvim.engine.class_names import check_names
from mmvim.engine.tasks import TASKS
from mmvim.errors import UserError, did_you_mean, from_where

from .config_keys import RUNNER_KEYS, walk_dicts
from .diagnosis import unknown_argument, unknown_type

_LEVELS = ('CRITICAL', 'ERROR', 'WARNING', 'INFO', 'DEBUG', 'NOTSET', 'FATAL', 'WARN')
_LOOPS = {'train': 'optim_wrapper', 'val': 'val_evaluator', 'test': 'test_evaluator'}


def check_options(cfg: Config, options: dict[str, Any]) -> None:
    """Refuse a ``--cfg-options`` key whose first part would never be read.

    Raises:
        UserError: Neither the config nor the runner knows the name.
    """
    for key in options:
        first = key.split('.')[0]
        if first not in cfg and first not in RUNNER_KEYS:
            hint = did_you_mean(first, [*cfg.keys(), *RUNNER_KEYS])
            raise UserError(
                f'--cfg-options {key}: the config has no {first!r} and the runner reads none{hint}'
            )


def check_config(cfg: Config, loops: tuple[str, ...], paths: bool = True) -> None:
    """Check that the config has everything the run needs, in types that the runner accepts.

    Args:
        cfg: The final config.
        loops: The loops that will run: ``('train', 'val')`` or ``('test',)``.
        paths: Whether the files and directories of the data must exist.

    Raises:
        UserError: A part is missing or of a wrong type, or a task library is missing.
    """
    for key, types in RUNNER_KEYS.items():
        value = cfg.get(key)
        if value is not None and not isinstance(value, types):
            allowed = ' or '.join(kind.__name__ for kind in types)
            raise UserError(f'{key} must be {allowed}, not {value!r} ({type(value).__name__})')
    level = cfg.get('log_level', 'INFO')
    if level is None or (isinstance(level, str) and level not in _LEVELS):
        raise UserError(f'log_level must be int or one of {", ".join(_LEVELS)}, not {level!r}')
    if cfg.get('model') is None:
        raise UserError(f'the config {cfg.filename!r} has no model')
    for loop in loops:
        parts = {f'{loop}_dataloader', f'{loop}_cfg', _LOOPS[loop]}
        missing = sorted(part for part in parts if cfg.get(part) is None)
        if missing and loop != 'val':
            raise UserError(
                f'the config {cfg.filename!r} has no {" and no ".join(missing)}, '
                f'which {loop}ing needs'
            )
        if missing and len(missing) < len(parts):
            raise UserError(
                f'the config {cfg.filename!r} has {", ".join(sorted(parts - set(missing)))}, but '
                f'no {" and no ".join(missing)}: validation needs all three, or none of them '
                '(--no-validate)'
            )
    _check_type_names(cfg)
    _check_environment(cfg)
    _check_checkpoint_names(cfg)
    _check_libraries(cfg)
    # Names without a scope are looked up in that of the config.
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    _check_hooks_and_loops(cfg)
    if 'train' in loops:
        _check_optimizer(cfg.get('optim_wrapper'))
    for loop in loops:
        _check_dataloader(cfg.get(f'{loop}_dataloader'), f'{loop}_dataloader', paths)
        if paths:
            _check_evaluator(cfg.get(f'{loop}_evaluator'), f'{loop}_evaluator')


def _check_type_names(cfg: Config) -> None:
    for key in RUNNER_KEYS:
        for path, node in walk_dicts(cfg.get(key), key):
            kind = node.get('type')
            if kind is not None and not isinstance(kind, str) and not callable(kind):
                raise UserError(f'{path}.type must be the name of a registered class, not {kind!r}')


def _check_types(component: Any, given: Any, path: str, none: bool = False) -> None:
    """Check values against reliable declarations, before they are used."""
    if not isinstance(given, dict):
        return
    # A class stands for its name, as in pure-Python configs.
    given = {key: value for key, value in given.items() if not isinstance(value, type)}
    wrong = misfits(component, given, none=none)
    if wrong:
        raise UserError(f'{path}: {", ".join(wrong)}')


def _check_environment(cfg: Config) -> None:
    randomness = cfg.get('randomness')
    if randomness is not None:
        _check_types(_randomness, randomness, 'randomness')
        seed = randomness.get('seed', 'missing')
        if seed is not None and (seed == 'missing' or not 0 <= seed < 2**32):
            raise UserError(f'randomness.seed must be None or in 0 .. 2**32 - 1, not {seed}')
    environment = cfg.get('env_cfg') or {}
    for key, function in (('mp_cfg', set_multi_processing), ('dist_cfg', init_dist)):
        part = environment.get(key)
        if part is not None and not isinstance(part, dict):
            raise UserError(f'env_cfg.{key} must be dict, not {part!r}')
        _check_types(function, part, f'env_cfg.{key}')


def _randomness(
    seed: int | None = None, diff_rank_seed: bool = False, deterministic: bool = False
) -> None:
    """Declaration of the arguments of :meth:`mmengine.runner.Runner.set_randomness`."""


def _check_hooks_and_loops(cfg: Config) -> None:
    """Check arguments of hooks and loops that are first used after hours of training."""
    by_epoch = (cfg.get('train_cfg') or {}).get('by_epoch', True)
    default = {
        'train_cfg': 'EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop',
        'val_cfg': 'ValLoop',
        'test_cfg': 'TestLoop',
        'log_processor': 'LogProcessor',
    }
    parts = [(key, cfg.get(key), LOOPS) for key in ('train_cfg', 'val_cfg', 'test_cfg')]
    parts.append(('log_processor', cfg.get('log_processor'), LOG_PROCESSORS))
    hooks = cfg.get('default_hooks') or {}
    parts += [(f'default_hooks.{key}', node, HOOKS) for key, node in hooks.items()]
    hooks = cfg.get('custom_hooks') or ()
    parts += [(f'custom_hooks.{i}', node, HOOKS) for i, node in enumerate(hooks)]
    for path, node, registry in parts:
        if isinstance(node, dict):
            if registry is HOOKS:
                if 'type' not in node:
                    raise UserError(f'{path} must be a dict with a type, not {dict(node)!r}')
                _check_priority(node.get('priority'), path)
            component = _found(node.get('type', default.get(path)), registry, path)
            # Declarations of other packages are often narrower than what they accept.
            if getattr(component, '__module__', '').startswith(('mmengine.', 'mmvim.')):
                _check_types(component, node, path, none=registry is LOOPS)


def _check_priority(priority: Any, path: str) -> None:
    """Check the priority of a hook, which is used when its config key is no longer known."""
    if isinstance(priority, str):
        right = priority.upper() in Priority.__members__
    elif isinstance(priority, int) and not isinstance(priority, bool):
        right = 0 <= priority <= 100
    else:
        right = priority is None or isinstance(priority, Priority)
    if not right:
        names = ', '.join(Priority.__members__)
        raise UserError(
            f'{path}.priority must be an integer in 0 .. 100 or one of {names}, not {priority!r}'
        )


def _found(kind: Any, registry: Registry, path: str) -> Any:
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(None) as scoped:
        found = scoped.get(kind)
        if found is None:
            raise UserError(unknown_type(path, kind, scoped))
    return found


def _check_optimizer(wrapper: dict | None) -> None:
    wrapper = wrapper or {}
    optimizer = wrapper.get('optimizer')
    if isinstance(optimizer, dict):
        if 'type' not in optimizer:
            raise UserError('optim_wrapper.optimizer has no type')
        component = _found(optimizer.get('type'), OPTIMIZERS, 'optim_wrapper.optimizer')
        _check_types(component, optimizer, 'optim_wrapper.optimizer', none=True)
    for path, node in walk_dicts(wrapper.get('paramwise_cfg'), 'optim_wrapper.paramwise_cfg'):
        for key, value in node.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if key.endswith('_mult') and not number:
                raise UserError(f'{path}.{key} must be a number, not {value!r}')
    factors = (wrapper.get('paramwise_cfg') or {}).get('custom_keys')
    if factors and not wrapper.get('constructor') and 'lr' not in (optimizer or {}):
        raise UserError('optim_wrapper.optimizer has no lr, which paramwise_cfg multiplies')


def _check_checkpoint_names(cfg: Config) -> None:
    """Check that names of checkpoints are not paths and stay in their directory."""
    for path, node in walk_dicts(cfg.get('default_hooks') or {}, 'default_hooks'):
        name = node.get('filename_tmpl')
        if isinstance(name, str) and name != re.split(r'[\\/]', name)[-1]:
            raise UserError(
                f'{path}.filename_tmpl must be a file name, not a path: {name!r}; out_dir says '
                'where checkpoints go'
            )


def _check_libraries(cfg: Config) -> None:
    needed = {}
    if cfg.get('default_scope') in TASKS:
        needed[cfg.default_scope] = f'default_scope = {cfg.default_scope!r}'
    for path, node in walk_dicts(cfg):
        scope = type_scope(node)
        if scope in TASKS:
            needed.setdefault(scope, f'{path}.type = {node["type"]!r}')
        elif scope and scope.isidentifier() and importlib.util.find_spec(scope) is None:
            kind = node['type']
            raise UserError(f'{path}.type is {kind!r}, but there is no package {scope!r} installed')
    for scope, reason in needed.items():
        try:
            require(scope, reason)
        except ImportError as error:
            raise UserError(str(error)) from error


def check_checkpoint(path: str | None, source: str) -> None:
    """Check that a local checkpoint exists (URLs are not tried).

    Args:
        path: Path or URL; None is accepted.
        source: Origin of the path, such as ``--resume``.

    Raises:
        UserError: The file does not exist, is an unfit directory, or is empty.
    """
    if path is None or not is_local(path):
        return
    full = os.path.expanduser(path)
    if not os.path.exists(full):
        raise UserError(f'{source}: the checkpoint {path!r} does not exist')
    if os.path.isfile(full) and os.path.getsize(full) == 0:
        raise UserError(f'{source}: the checkpoint {path!r} is empty')


def check_pretrained(cfg: Config) -> None:
    """Check the checkpoints named by ``init_cfg=dict(type='Pretrained', …)`` in the model.

    Raises:
        UserError: A local file does not exist or is empty.
    """
    for path, node in walk_dicts(cfg.model, 'model'):
        # mmengine's class is called PretrainedInit.
        if type_name(node).startswith('Pretrained') and isinstance(node.get('checkpoint'), str):
            check_checkpoint(node['checkpoint'], f'{path}.checkpoint')


def _check_dataloader(loader: dict | None, key: str, paths: bool) -> None:
    if loader is None:
        return
    if not isinstance(loader.get('dataset'), dict):
        raise UserError(f'{key}.dataset must be a dict, not {loader.get("dataset")!r}')
    for name, least in (('batch_size', 1), ('num_workers', 0)):
        value = loader.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f'{key}.{name} must be an integer of {least} or more, not {value!r}')
    for name in ('pin_memory', 'persistent_workers', 'drop_last'):
        if not isinstance(loader.get(name, False), bool):
            raise UserError(f'{key}.{name} must be True or False, not {loader[name]!r}')
    collate = loader.get('collate_fn')
    if isinstance(collate, dict) and 'type' not in collate:
        raise UserError(f'{key}.collate_fn must be a dict with a type, not {dict(collate)!r}')
    kind = collate.get('type') if isinstance(collate, dict) else None
    if isinstance(kind, str):
        function = _found(kind, FUNCTIONS, f'{key}.collate_fn')
        _check_names(f'{key}.collate_fn', kind, collate, function)
    _check_names(key, 'DataLoader', loader, DataLoader, 'num_batch_per_epoch')
    for path, dataset in leaf_datasets(loader['dataset'], f'{key}.dataset') if paths else ():
        meta = dataset.get('metainfo') or {}
        old = next((key for key in meta if key != key.lower() and key.lower() not in meta), None)
        if old in ('CLASSES', 'PALETTE'):
            raise UserError(f'{path}.metainfo.{old} is not read: its name is {old.lower()!r} now')
        classes = meta.get('classes')
        if not isinstance(classes, str) or not os.path.isfile(classes):
            check_names(classes, f'{path}.metainfo.classes')
        _check_dataset(dataset, path)


def _check_names(path: str, name: str, given: dict, component: Any, *more: str) -> None:
    """Refuse unknown arguments of a component."""
    allowed = [*(parameter.name for parameter in parameters(component)), *more]
    for argument in given:
        if argument not in ('type', '_scope_', *allowed):
            raise UserError(unknown_argument(path, name, argument, allowed))


def _check_dataset(dataset: dict, path: str) -> None:
    if dataset.get('backend_args') or dataset.get('file_client_args'):
        return
    kind = dataset.get('type')
    # An unknown type is reported, with suggestions, when the dataset is built.
    with DATASETS.switch_scope_and_registry(dataset.get('_scope_')) as registry:
        found = registry.get(kind) if isinstance(kind, str) else kind
    if not inspect.isclass(found) or not issubclass(found, BaseDataset):
        return
    if 'download' in inspect.signature(found).parameters and dataset.get('download', True):
        return
    root = dataset.get('data_root') or ''
    if not isinstance(root, str):
        raise UserError(f'{path}.data_root must be str, not {root!r} ({type(root).__name__})')
    if root and is_local(root) and not os.path.isdir(os.path.expanduser(root)):
        raise UserError(
            f'{path}.data_root: the directory {root!r} does not exist{from_where(root)}'
        )
    file = dataset.get('ann_file')
    if isinstance(file, str) and file:
        full = _join(root, file)
        if is_local(full) and not os.path.exists(os.path.expanduser(full)):
            raise UserError(
                f'{path}.ann_file: the annotation file {full!r} does not exist{from_where(full)}'
            )
    prefix = dataset.get('data_prefix')
    prefixes = {'': prefix} if isinstance(prefix, str) else prefix or {}
    if not isinstance(prefixes, dict):
        raise UserError(f'{path}.data_prefix must be str or dict, not {prefix!r}')
    has_labels = any('Annotations' in str(step) for step in dataset.get('pipeline') or ())
    for name, value in prefixes.items():
        if 'seg' in name and not has_labels:
            continue
        full = _join(root, value) if isinstance(value, str) else ''
        if full and is_local(full) and not os.path.isdir(os.path.expanduser(full)):
            key = f'{path}.data_prefix.{name}' if name else f'{path}.data_prefix'
            raise UserError(f'{key}: the directory {full!r} does not exist{from_where(full)}')


def _check_evaluator(evaluator: Any, key: str) -> None:
    """Check the annotation file that COCO-style metrics read themselves."""
    several = isinstance(evaluator, list | tuple)
    for i, metric in enumerate(evaluator if several else [evaluator]):
        file = metric.get('ann_file') if isinstance(metric, dict) else None
        if not isinstance(file, str) or metric.get('backend_args') or not is_local(file):
            continue
        if not os.path.exists(os.path.expanduser(file)):
            path = f'{key}.{i}' if several else key
            raise UserError(
                f'{path}.ann_file: the annotation file {file!r} does not exist{from_where(file)}'
            )


def _join(root: str, path: str) -> str:
    return os.path.join(root, path) if root and is_local(path) else path
