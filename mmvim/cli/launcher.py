"""One launcher for mmpretrain, mmdet, mmsegmentation, and configs of other tasks.

``tools/train.py`` and ``tools/test.py`` call :func:`main_train` and :func:`main_test`. The
config determines a run; the differences between task libraries are in :mod:`mmvim.engine.tasks`.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import mmengine
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmvim.checkpoints.loading import checked_loading
from mmvim.engine import class_names
from mmvim.engine.hooks import (
    AverageWarmupHook,
    DataCheckHook,
    Terminated,
    TerminationHook,
    WeightsHook,
)
from mmvim.engine.label_maps import image_root, name_below
from mmvim.engine.tasks import task_of

from . import checks, diagnosis, distributed, flags, resuming, samples
from .console import Console
from .parsers import build_test_parser, build_train_parser


def main_train(argv: Sequence[str] | None = None) -> Any:
    """Train as the command line says.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The runner, after training.

    Raises:
        SystemExit: Code 2 after an error that the user can fix, 143 after SIGTERM.
    """
    args = build_train_parser().parse_args(argv)
    with diagnosis.reported_errors() as context, Console(args.verbose).watch() as console:
        cfg, notes = flags.load_config(args), []
        context.cfg = cfg
        flags.apply_train_flags(cfg, args)
        flags.apply_options(cfg, args)
        rest, warnings = [], []
        if args.resume == 'auto' or (cfg.get('resume') is True and not cfg.get('load_from')):
            rest = resuming.resume_last(cfg, notes, warnings)
        elif cfg.get('resume') is True:
            resuming.resume_path(cfg, cfg.load_from)
        checks.check_config(cfg, ('train', 'val'), paths=not args.no_checks)
        checks.check_checkpoint(cfg.get('load_from'), '--resume' if args.resume else 'load_from')
        checks.check_pretrained(cfg)
        flags.use_resumable_loops(cfg)
        flags.use_fast_training(cfg)
        runner = _build_runner(cfg, args, ('train', 'val'), notes, console)
        runner.register_hook(AverageWarmupHook())
        for warning in warnings:
            runner.logger.warning(warning)
        if rest:
            resuming.leave_out_foreign(runner, rest)
        _train(runner, complete=bool(cfg.get('resume')))
        distributed.finish()
    return runner


def _train(runner: Any, complete: bool) -> None:
    """Train, until the end or until a signal; in the latter case the process ends here."""
    hook = next((hook for hook in runner.hooks if isinstance(hook, TerminationHook)), None)
    if hook is None:
        hook = TerminationHook()
        runner.register_hook(hook)
    try:
        with checked_loading(runner, complete=complete):
            runner.train()
    except Terminated as error:
        what = f'saved {error.checkpoint}' if error.checkpoint else 'nothing is saved'
        runner.logger.warning(f'{error}: {what}; --resume continues the run')
        runner.call_hook('after_run')
        # Ranks may be at different places: the process group is left to the end of the process.
        sys.exit(128 + error.signum)
    except RuntimeError as error:
        if not hook.received or 'DataLoader worker (pid' not in str(error):
            raise
        # The workers died first, perhaps in the middle of a step: nothing can be saved.
        runner.logger.warning('terminated: the last checkpoint stands; --resume continues the run')
        sys.exit(128 + hook.received)
    finally:
        hook.close()


def main_test(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Test as the command line says.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The metrics.

    Raises:
        SystemExit: Code 2 after an error that the user can fix.
    """
    args = build_test_parser().parse_args(argv)
    with diagnosis.reported_errors() as context, Console(args.verbose).watch() as console:
        cfg, notes = flags.load_config(args), []
        context.cfg = cfg
        flags.apply_test_flags(cfg, args)
        flags.apply_options(cfg, args)
        checks.check_config(cfg, ('test',), paths=not args.no_checks)
        checks.check_checkpoint(cfg.load_from, 'checkpoint')
        flags.apply_test_outputs(cfg, args)
        runner = _build_runner(cfg, args, ('test',), notes, console)
        if args.ema or args.no_ema:
            runner.register_hook(WeightsHook(args.ema))
        if args.show or args.show_dir:
            _name_pictures(runner, image_root(cfg))
            _paint_every(runner, args.interval)
        with checked_loading(runner, complete=True):
            metrics = runner.test()
        if args.out_item == 'metrics' and is_main_process():
            mmengine.dump(metrics, args.out)
        distributed.finish()
    return metrics


def _build_runner(
    cfg: Config,
    args: argparse.Namespace,
    loops: tuple[str, ...],
    notes: list[str],
    console: Console,
) -> Any:
    """Build the runner, with safeguards that the config need not mention."""
    distributed.prepare(cfg, cfg.launcher, notes)
    if get_device() == 'cpu':
        flags.fit_to_cpu(cfg, notes)
    flags.use_backbone_hooks(cfg)
    samples.install()
    diagnosis.install()
    if not args.no_checks:
        class_names.install()
    flags.use_own_classes(cfg)
    runner = RUNNERS.build(cfg) if cfg.get('runner_type') else Runner.from_cfg(cfg)
    if not args.no_checks:
        runner.register_hook(DataCheckHook(loops))
    runner.register_hook(console)
    for note in notes:
        runner.logger.info(note)
        console.note(note)
    return runner


def _name_pictures(runner: Any, root: str) -> None:
    """Keep pictures of equal names in different folders apart, which hooks name by their files."""
    for method in ('add_datasample', 'visualize_cls'):
        paint = getattr(runner.visualizer, method, None)
        if paint is not None:
            setattr(runner.visualizer, method, wraps(paint)(partial(_paint_below, root, paint)))


def _paint_below(root: str, paint: Callable, *args: Any, **kwargs: Any) -> None:
    path = (kwargs.get('data_sample') or {}).get('img_path')
    if isinstance(path, str):
        base, below = os.path.basename(path), name_below(root, path)
        if args and isinstance(args[0], str):
            args = (args[0].replace(base, below.replace(os.sep, '_'), 1), *args[1:])
        if kwargs.get('out_file'):
            folder, name = os.path.split(kwargs['out_file'])
            kwargs['out_file'] = os.path.join(folder, name.replace(base, below, 1))
    paint(*args, **kwargs)


def _paint_every(runner: Any, interval: int) -> None:
    """Set an interval for visualization hooks that draw every test image."""
    if interval == 1 or task_of(runner.cfg, '--interval').show_interval:
        return
    for hook in runner.hooks:
        if 'VisualizationHook' in type(hook).__name__:
            _thin_out(hook, interval)


def _thin_out(hook: Hook, interval: int) -> None:
    paint = hook.after_test_iter
    seen = 0

    @wraps(paint)
    def after_test_iter(runner, batch_idx, data_batch=None, outputs=None) -> None:
        nonlocal seen
        chosen = [item for i, item in enumerate(outputs, start=seen) if i % interval == 0]
        seen += len(outputs)
        paint(runner, batch_idx, data_batch=data_batch, outputs=chosen)

    hook.after_test_iter = after_test_iter
