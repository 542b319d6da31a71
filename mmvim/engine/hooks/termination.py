"""Saving before the scheduler ends the job."""

import signal
import threading
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, get_comm_device, is_distributed
from mmengine.hooks import EMAHook, Hook

from mmvim.engine import random_state
from mmvim.errors import UserError
from mmvim.registry import HOOKS

from .checkpoint import CheckpointHook


class Terminated(Exception):
    """Training was stopped by a signal; the launcher turns it into an exit code.

    Args:
        signum: The signal.
        checkpoint: The saved checkpoint, if any.
    """

    def __init__(self, signum: int, checkpoint: str | None) -> None:
        super().__init__(f'terminated by {signal.Signals(signum).name}')
        self.signum = signum
        self.checkpoint = checkpoint


@HOOKS.register_module()
class TerminationHook(Hook):
    """Save a checkpoint and stop when the process receives SIGTERM.

    A scheduler sends it some time before it kills the job. The current iteration is finished,
    ``iter_N.pth`` is saved, and the process ends with exit code 128 + the signal's number;
    ``--resume`` continues with the next batch. During validation, the validation is abandoned and
    repeated after the resume; with several processes this requires that the state before it has
    been saved; otherwise the run stops after the validation. With gradient accumulation the run
    stops after the next update of the weights. In training it suffices that one process receives
    the signal.

    The launcher adds it to every training, unless the config has one.

    Args:
        signals: Names of the signals to act upon. Slurm's ``--signal=USR1@120`` needs
            ``('SIGTERM', 'SIGUSR1')``. Defaults to ``('SIGTERM',)``.
        interval: Processes ask each other every ``interval`` iterations (one number is exchanged,
            and read the next time, so that no process waits for it). Defaults to 1.

    Attributes:
        received: The received signal, or 0.

    Raises:
        UserError: A signal is unknown, or ``interval`` is not positive.
    """

    priority = 'LOWEST'

    def __init__(self, signals: tuple[str, ...] | str = ('SIGTERM',), interval: int = 1) -> None:
        names = (signals,) if isinstance(signals, str) else tuple(signals)
        for name in names:
            if name not in signal.Signals.__members__:
                raise UserError(
                    f'TerminationHook: there is no signal {name!r}; use names such as SIGTERM'
                )
        if not isinstance(interval, int) or interval < 1:
            raise UserError(f'TerminationHook: interval must be at least 1, not {interval!r}')
        self._signals = [signal.Signals[name] for name in names]
        self._interval = interval
        self.received = 0
        self._asked: torch.Tensor | None = None
        self._handlers: dict[int, Any] = {}
        self._swapped: dict[EMAHook, bool] = {}
        self._states: dict | None = None

    def before_train(self, runner) -> None:
        """Start listening for the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._handlers[number] = signal.signal(number, self._receive)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                self._watch_swaps(hook)

    def after_train(self, runner) -> None:
        """Stop listening."""
        self.close()

    def close(self) -> None:
        """Restore the former handlers."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Save and stop, if a signal was received.

        Raises:
            Terminated: The state has been saved.
        """
        done = runner.iter + 1
        if done % self._interval == 0 and self._any_received():
            wrapper = runner.optim_wrapper
            if not hasattr(wrapper, 'should_update') or wrapper.should_update():
                self._stop(runner, done, together=True)

    def before_val_epoch(self, runner) -> None:
        """Remember the random state, which a repeated validation will need."""
        self._states = random_state.capture()

    def after_val_iter(
        self, runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Abandon the validation, save and stop, if a signal was received.

        Raises:
            Terminated: The state has been saved.
        """
        if not self.received or not self._handlers:
            return
        if is_distributed():
            # Other processes may be past this point: no collective operation is possible here.
            saver = self._saver(runner)
            if saver is not None and saver.last_iter == runner.iter:
                self._stop(runner, runner.iter)
            return
        for hook, swapped in self._swapped.items():
            if swapped:
                hook._swap_ema_parameters()
        self._stop(runner, runner.iter, self._states)

    def _stop(self, runner, done: int, states: dict | None = None, together: bool = False) -> None:
        saver, path = self._saver(runner), None
        if saver is None:
            runner.logger.warning('There is no CheckpointHook: nothing is saved.')
        else:
            path = saver.save_now(runner, done, states)
        if together:
            # Slurm and torchrun end all processes when the first has ended: not while one writes.
            barrier()
        self.close()
        raise Terminated(self.received, path)

    @staticmethod
    def _saver(runner) -> CheckpointHook | None:
        return next((h for h in runner.hooks if isinstance(h, CheckpointHook)), None)

    def _receive(self, signum: int, frame: object) -> None:
        self.received = signum

    def _any_received(self) -> bool:
        if not is_distributed():
            return self.received != 0
        answer, self._asked = self._asked, torch.full((), self.received, device=get_comm_device())
        all_reduce(self._asked, 'max')
        # All processes read the same answer, to the question that they asked the last time.
        signum = int(answer) if answer is not None else 0
        self.received = self.received or signum
        return signum != 0

    def _watch_swaps(self, hook: EMAHook) -> None:
        """Track whether the model holds the averaged weights."""
        swap = hook._swap_ema_parameters
        self._swapped[hook] = False

        def watched() -> None:
            swap()
            self._swapped[hook] = not self._swapped[hook]

        hook._swap_ema_parameters = watched
