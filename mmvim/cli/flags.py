"""Effects of the command-line flags on the config."""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import HOOKS, MODELS
from mmengine.utils import import_modules_from_strings

from mmvim._configs import innermost_dataset, is_mmengine, merge_options, read_config, type_name
from mmvim.engine.hooks import CheckpointHook
from mmvim.engine.optim import ExponentialMovingAverage
from mmvim.engine.tasks import TASKS, apply_tta, task_of
from mmvim.errors import UserError

from . import checks
from .config_keys import walk_dicts

_LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def load_config(args: argparse.Namespace) -> Config:
    """Read the config; any exception on the way is an error of the user."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    return cfg


def apply_train_flags(cfg: Config, args: argparse.Namespace) -> None:
    """Put the flags of ``train.py`` into the config.

    Raises:
        UserError: A flag does not fit the config.
    """
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp or args.amp_dtype:
        _use_amp(cfg, args.amp_dtype)
    if args.auto_scale_lr:
        settings = cfg.get('auto_scale_lr')
        if not isinstance(settings, dict) or not isinstance(settings.get('base_batch_size'), int):
            raise UserError(
                '--auto-scale-lr needs auto_scale_lr = dict(base_batch_size=N) in the config, '
                f'which has {settings!r}'
            )
        settings['enable'] = True
    if args.resume not in (None, 'auto'):
        cfg.resume, cfg.load_from = True, args.resume
    if args.no_persistent_workers:
        _set_loaders(cfg, persistent_workers=False)


def apply_test_flags(cfg: Config, args: argparse.Namespace) -> None:
    """Put the flags of ``test.py`` into the config, except those of :func:`apply_test_outputs`.

    Raises:
        UserError: A flag does not fit the config or another flag.
    """
    # mmengine would otherwise try to resume a training loop, which a test lacks.
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.out_item and not args.out:
        raise UserError('--out-item needs --out PATH')
    if args.interval < 1:
        raise UserError(f'--interval must be at least 1, not {args.interval}')
    if (args.amp or args.amp_dtype) and isinstance(cfg.get('test_cfg'), dict):
        cfg.test_cfg['fp16'] = True
    if args.amp_dtype:
        _check_amp_dtype(args.amp_dtype)
        # The test loop has no setting for this: it uses torch's default.
        torch.set_autocast_dtype(get_device(), getattr(torch, args.amp_dtype))
    if args.show or args.show_dir:
        task = task_of(cfg, '--show-dir' if args.show_dir else '--show')
        hook = (cfg.get('default_hooks') or {}).get('visualization')
        steps = innermost_dataset(cfg.get('test_dataloader')).get('pipeline') or ()
        if any('Video' in type_name(step) for step in steps):
            raise UserError(
                '--show and --show-dir draw images, and the test pipeline reads videos: '
                'tools/demo/video_demo.py draws on those'
            )
        if not isinstance(hook, dict):
            raise UserError(
                '--show and --show-dir need a VisualizationHook: default_hooks.visualization of '
                f'the config is {hook!r}'
            )
        show_dir = os.path.abspath(args.show_dir) if args.show_dir else None
        task.visualize(hook, cfg, show_dir)
        if task.show_interval:
            hook['interval'] = args.interval
        if args.show:
            hook.update(show=True, wait_time=args.wait_time)


def apply_options(cfg: Config, args: argparse.Namespace) -> None:
    """Merge ``--cfg-options`` after all flags, then settle what depends on the result."""
    checks.check_options(cfg, args.cfg_options)
    if args.no_pin_memory:
        _set_loaders(cfg, pin_memory=False)
    merge_options(cfg, args.cfg_options)
    if any(key.partition('.')[0] == 'custom_imports' for key in args.cfg_options or {}):
        # Those of the file were imported when it was read.
        _import_custom_modules(cfg)
    if cfg.get('env_cfg') is None:
        # Runner has this default; FlexibleRunner has none and fails.
        cfg.env_cfg = {'dist_cfg': {'backend': 'nccl'}}
    task = TASKS.get(cfg.get('default_scope'))
    for key in _LOADERS:
        loader = cfg.get(key)
        if not isinstance(loader, dict):
            continue
        for name, value in (task.dataloader_defaults if task else {}).items():
            if name != 'pin_memory' or torch.cuda.is_available():
                loader.setdefault(name, value)
        if not loader.get('num_workers'):
            # torch refuses these without workers, so num_workers=0 alone would fail.
            for name in ('persistent_workers', 'prefetch_factor'):
                loader.pop(name, None)


def _import_custom_modules(cfg: Config) -> None:
    try:
        import_modules_from_strings(**cfg.custom_imports)
    except (ImportError, TypeError) as error:
        raise UserError(
            f'custom_imports must be dict(imports=[MODULE, ...], allow_failed_imports=False) of '
            f'modules that can be imported, got {dict(cfg.custom_imports)}: {error}'
        ) from error


def apply_test_outputs(cfg: Config, args: argparse.Namespace) -> None:
    """Apply ``--tta`` and ``--out``, which rearrange the final config.

    Raises:
        UserError: The flag is unknown for this task, or does not fit the config.
    """
    if args.tta:
        apply_tta(cfg, task_of(cfg, '--tta'))
    if not args.out:
        return
    directory = os.path.dirname(os.path.abspath(args.out))
    os.makedirs(directory, exist_ok=True)
    if args.out_item == 'metrics':
        if not args.out.endswith(('.json', '.yaml', '.yml', '.pkl', '.pickle')):
            raise UserError(
                f'--out must end with .json, .yaml, .yml, .pkl or .pickle for metrics, '
                f'not {args.out!r}'
            )
        return
    task_of(cfg, '--out').dump_predictions(cfg, args.out)


def _set_loaders(cfg: Config, **settings: Any) -> None:
    for key in _LOADERS:
        if isinstance(cfg.get(key), dict):
            cfg[key].update(settings)


def _check_amp_dtype(dtype: str) -> None:
    if dtype == 'float16' and get_device() == 'cpu':
        raise UserError('--amp-dtype float16 needs a GPU; a CPU has bfloat16')


def _use_amp(cfg: Config, dtype: str | None) -> None:
    wrapper = cfg.get('optim_wrapper')
    name = type_name(wrapper or {}) or 'OptimWrapper'
    if not isinstance(wrapper, dict) or name not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(
            '--amp works with optim_wrapper.type OptimWrapper or AmpOptimWrapper, not '
            f"{name}; wrappers such as DeepSpeed's have precision settings of their own"
        )
    wrapper['type'] = 'AmpOptimWrapper'
    if dtype:
        _check_amp_dtype(dtype)
        wrapper['dtype'] = dtype
    # bfloat16 has the range of float32: no scaling is needed.
    is_bf16 = wrapper.get('dtype') in ('bfloat16', torch.bfloat16)
    wrapper.setdefault('loss_scale', {'enabled': False} if is_bf16 else 'dynamic')


def fit_to_cpu(cfg: Config, notes: list[str]) -> None:
    """Replace what works only on an accelerator."""
    for key in _LOADERS:
        if isinstance(cfg.get(key), dict) and cfg[key].get('pin_memory'):
            cfg[key]['pin_memory'] = False
    wrapper = cfg.get('optim_wrapper')
    if isinstance(wrapper, dict) and is_mmengine(wrapper, 'AmpOptimWrapper'):
        wrapper['type'] = 'mmvim.CPUAmpOptimWrapper'
        for name in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(name, None)
        notes.append('There is no GPU: mixed precision is bfloat16 without loss scaling.')


_FUSED = ('Adam', 'AdamW', 'SGD')
# Keys of an optimizer that choose its implementation, or rule one out.
_IMPLEMENTATIONS = ('fused', 'foreach', 'capturable', 'differentiable')


def use_fast_training(cfg: Config) -> None:
    """Make a training run lose no time between its kernels, with unchanged results."""
    hooks = cfg.get('custom_hooks') or ()
    present = [type_name(hook) for hook in hooks]
    missing = [name for name in ('ParameterGroupsHook', 'RunAheadHook') if name not in present]
    cfg.custom_hooks = [*hooks, *({'type': f'mmvim.{name}'} for name in missing)]
    wrapper = cfg.get('optim_wrapper')
    optimizer = wrapper.get('optimizer') if isinstance(wrapper, dict) else None
    if get_device() != 'cuda' or not isinstance(optimizer, dict) or cfg.get('strategy'):
        return
    kind = type_name(optimizer)
    if kind == 'Lamb':
        optimizer['type'] = 'mmvim.Lamb'
    elif kind in _FUSED and not any(name in optimizer for name in _IMPLEMENTATIONS):
        optimizer['fused'] = True


def use_resumable_loops(cfg: Config) -> None:
    """Replace mmengine's training loops by this package's, which extend them."""
    loop = cfg.get('train_cfg')
    if not isinstance(loop, dict):
        return
    names = {True: 'EpochBasedTrainLoop', False: 'IterBasedTrainLoop'}
    if 'type' not in loop and isinstance(loop.get('by_epoch'), bool):
        loop['type'] = f'mmvim.{names[loop.pop("by_epoch")]}'
    elif is_mmengine(loop, *names.values()):
        loop['type'] = f'mmvim.{type_name(loop)}'


def use_own_classes(cfg: Config) -> None:
    """Replace mmengine's classes, where a config gives the class itself, by those that extend them.

    Where it gives their names, the registries hold this package's.
    """
    own = {'CheckpointHook': CheckpointHook, 'ExponentialMovingAverage': ExponentialMovingAverage}
    for _, node in walk_dicts(cfg):
        for key in ('type', 'ema_type'):
            kind = node.get(key)
            if isinstance(kind, type) and is_mmengine(kind, *own):
                node[key] = own[type_name(kind)]
    for name, registry in (('CheckpointHook', HOOKS), ('ExponentialMovingAverage', MODELS)):
        registry.register_module(name=name, module=own[name], force=True)


def use_backbone_hooks(cfg: Config) -> None:
    """Turn ``compile`` and ``graph`` into their hooks.

    Raises:
        UserError: If both are set, or an option of ``graph`` is unknown.
    """
    hooks = []
    for key, hook in (('compile', 'mmvim.CompileHook'), ('graph', 'mmvim.GraphHook')):
        options = cfg.pop(key, None)
        if options is None or options is False:
            continue
        if options is not True and not isinstance(options, dict):
            raise UserError(f'{key} must be True, False or a dict of options, not {options!r}')
        options = {} if options is True else options
        unknown = sorted({*options} - {'max_shapes'}) if key == 'graph' else ()
        if unknown:
            raise UserError(f'graph has no option {unknown[0]!r}; allowed: max_shapes')
        hooks.append({'type': hook, **options})
    if len(hooks) > 1:
        raise UserError(
            "compile and graph exclude each other; compile=dict(mode='reduce-overhead') does both"
        )
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or ()), *hooks]
