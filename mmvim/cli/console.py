"""The terminal of a run: one screen of what matters; the log file has everything."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from torch import nn

import mmvim
from mmvim import ops

#: Functions of mmengine's LoggerHook whose lines are a progress bar's task.
_PROGRESS = ('after_val_iter', 'after_test_iter')


class Console(Hook):
    """The terminal of a run.

    Until the run starts, only warnings and what is passed to :meth:`note` appear; then a summary;
    then the log without its lines on the progress of an evaluation. On a terminal, bars show the
    progress. Only the first process of a distributed run has a console.

    Args:
        verbose: Whether everything appears.
    """

    priority = 'LOWEST'

    def __init__(self, verbose: bool = False) -> None:
        self.verbose = verbose
        self._started = verbose
        self._notes: list[str] = []
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._streams: list[logging.StreamHandler] = []

    @contextlib.contextmanager
    def watch(self) -> Iterator['Console']:
        """Apply to all loggers of mmengine, also those that are made in the meantime.

        A runner writes its config as soon as it has made its logger, before any hook can run.
        """
        initialise = MMLogger.__init__

        def wrapped(logger: MMLogger, *args: Any, **kwargs: Any) -> None:
            initialise(logger, *args, **kwargs)
            adopt(logger)

        def adopt(logger: logging.Logger) -> None:
            for handler in logger.handlers:
                if type(handler) is logging.StreamHandler:
                    handler.addFilter(self.shows)
                    self._streams.append(handler)

        for logger in list(MMLogger._instance_dict.values()):
            adopt(logger)
        MMLogger.__init__ = wrapped
        try:
            yield self
        finally:
            MMLogger.__init__ = initialise
            self._close()
            for handler in self._streams:
                handler.removeFilter(self.shows)

    def shows(self, record: logging.LogRecord) -> bool:
        """Whether a record appears on the terminal."""
        if self.verbose or record.levelno >= logging.WARNING:
            return True
        return self._started and record.funcName not in _PROGRESS

    def note(self, text: str) -> None:
        """Add a line to the summary."""
        self._notes.append(text)

    def before_train(self, runner: Any) -> None:
        """Show the summary and start the bars."""
        self._start(runner, {'training': runner.train_loop, 'validation': runner.val_loop})

    def before_test(self, runner: Any) -> None:
        """Show the summary and start the bars."""
        self._start(runner, {'test': runner.test_loop})

    def _start(self, runner: Any, loops: dict[str, Any]) -> None:
        if is_main_process():
            print('\n'.join(summary(runner, loops, self._notes)), flush=True)
        self._started = True
        if not is_main_process() or self.verbose or not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = '{task.description}', BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bars = Progress(*columns, transient=True)
        self._bars.start()
        # rich prints above its bars what arrives at the stdout that it has put in place.
        for handler in self._streams:
            handler.setStream(sys.stdout)

    def _advance(self, name: str, done: int, total: int) -> None:
        if self._bars is None:
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name)
        self._bars.update(self._tasks[name], completed=done, total=total)

    def _finish(self, name: str) -> None:
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))

    def _close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            for handler in self._streams:
                handler.setStream(sys.stdout)
            self._bars, self._tasks = None, {}

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Move the bar on."""
        self._advance('training', runner.iter + 1, runner.max_iters)

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Move the bar on."""
        self._advance('validation', batch_idx + 1, len(runner.val_dataloader))

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Move the bar on."""
        self._advance('test', batch_idx + 1, len(runner.test_dataloader))

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        """Take the bar away."""
        self._finish('validation')

    def after_run(self, runner: Any) -> None:
        """Take the bars away."""
        self._close()


def summary(runner: Any, loops: dict[str, Any], notes: list[str]) -> list[str]:
    """The summary of a run, in lines.

    Args:
        runner: The runner, ready to start.
        loops: Its loops by name; those that are None are left out.
        notes: Further lines.
    """
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    rows = [('model', _model(model)), ('device', _device()), ('operators', _operators())]
    rows.append(('precision', _precision(runner)))
    rows += [(name, _data(loop.dataloader)) for name, loop in loops.items() if loop is not None]
    if 'training' in loops:
        loop = runner.train_loop
        epochs = getattr(loop, '_max_epochs', None)
        by_epoch = type(loop).__name__.startswith('Epoch')
        length = f'{epochs} epochs, ' if by_epoch else ''
        rows.append(('schedule', f'{length}{runner.max_iters} iterations'))
    if getattr(runner, '_resume', False) and 'training' in loops:
        rows.append(('start', f'resumed at epoch {runner.epoch}, iteration {runner.iter}'))
    else:
        given = getattr(runner, '_load_from', None)
        pretrained = [
            str(init['checkpoint'])
            for module in model.modules()
            for init in _init_configs(module)
            if init.get('checkpoint')
        ]
        source = given or ', '.join(dict.fromkeys(pretrained))
        rows.append(('start', f'weights of {source}' if source else 'random weights'))
    rows.append(('log', str(runner.logger.log_file)))
    name = os.path.basename(runner.cfg.filename) if runner.cfg.filename else ''
    config = Path(runner.work_dir) / (name or f'{runner.timestamp}.py')
    rows.append(('config', str(config)))
    width = max(len(name) for name, _ in rows) + 2
    return [f'mmvim {mmvim.__version__}', *(f'  {a:<{width}}{b}' for a, b in rows), *notes]


def _init_configs(module: nn.Module) -> list[dict]:
    given = getattr(module, 'init_cfg', None)
    given = [given] if isinstance(given, dict) else given or []
    return [init for init in given if isinstance(init, dict)]


def _model(model: nn.Module) -> str:
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    names = type(model).__name__
    if hasattr(model, 'backbone'):
        names += f' with {type(model.backbone).__name__}'
    frozen = '' if trained == count else f', {trained / 1e6:.2f} M of them trained'
    return f'{names}, {count / 1e6:.2f} M parameters{frozen}'


def _device() -> str:
    kind, count = get_device(), get_world_size()
    if kind == 'cuda':
        kind += f' ({torch.cuda.get_device_name()})'
    elif kind == 'cpu':
        kind += f' ({torch.get_num_threads()} threads)'
    return kind + (f', {count} processes' if count > 1 else '')


def _operators() -> str:
    info = ops.backend_info()
    kind = 'cuda' if get_device() == 'cuda' else 'cpu'
    if ops.get_backend() == 'torch':
        return 'PyTorch (as requested)'
    if info['loaded'] and info[f'{kind}_kernels']:
        detail = info['cpu_instruction_set'] if kind == 'cpu' else ''
        return 'compiled' + (f' ({detail})' if detail else '')
    return f'PyTorch, slower than compiled ones: {info["reason"] or info["no_cuda"]}'


def _precision(runner: Any) -> str:
    wrapper = getattr(runner, 'optim_wrapper', None)
    if getattr(runner.cfg.get('test_cfg'), 'fp16', False) and not hasattr(wrapper, 'optimizer'):
        return f'mixed, {torch.get_autocast_dtype(get_device())}'.replace('torch.', '')
    if 'Amp' in type(wrapper).__name__:
        dtype = getattr(wrapper, 'cast_dtype', None) or torch.get_autocast_dtype(get_device())
        return f'mixed, {dtype}'.replace('torch.', '')
    return 'float32'


def _data(loader: Any) -> str:
    dataset = loader.dataset
    meta = getattr(dataset, 'metainfo', None) or {}
    classes = meta.get('classes') or ()
    size = f', {len(dataset)} samples' if hasattr(dataset, '__len__') else ''
    named = f', {len(classes)} classes' if classes else ''
    batch = f'batches of {loader.batch_size}' if getattr(loader, 'batch_size', None) else 'batches'
    workers = getattr(loader, 'num_workers', 0)
    return f'{type(dataset).__name__}{size}{named}, {batch}, {workers} workers'
