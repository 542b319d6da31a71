"""mmengine's training loops, extended to continue an interrupted run exactly.

mmengine 0.10 starts an interrupted epoch over while its iteration count continues, draws data in a
different order when the seed was not fixed, never makes up for a validation that was due when the
run ended, and uses whatever random state the new process has.
"""

from collections.abc import Iterator
from typing import Any

from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterBasedTrainLoop

from mmvim.errors import UserError
from mmvim.registry import LOOPS

from .batches import Batches, check_length, isolate_validation

# In the message hub, and so in every checkpoint.
EPOCH_LENGTH = 'mmvim_epoch_length'
VALIDATED_ITER = 'mmvim_validated_iter'


class _Resumable:
    """Common part of both loops."""

    runner: Any
    dataloader: Any
    _iter: int

    def __init__(self, *args: Any, max_worker_restarts: int = 0, **kwargs: Any) -> None:
        if not isinstance(max_worker_restarts, int) or max_worker_restarts < 0:
            raise UserError(
                f'train_cfg.max_worker_restarts must be 0 or more, not {max_worker_restarts!r}'
            )
        self._max_worker_restarts = max_worker_restarts
        super().__init__(*args, **kwargs)
        check_length(self.dataloader, 'train_dataloader')

    def _prepare(self) -> Batches:
        runner = self.runner
        batches = Batches(self.dataloader, runner.seed, runner.rank, self._max_worker_restarts)
        if runner.val_loop is not None and hasattr(runner.val_loop, 'dataloader'):
            isolate_validation(runner.val_loop.dataloader)
        return batches

    def _validate_if_due(self) -> None:
        self._decide_current_val_interval()
        if self.runner.val_loop is not None and self._validation_is_due():
            self.runner.val_loop.run()

    def _catch_up(self) -> None:
        """Validate now if the run ended between saving and validating."""
        hub = self.runner.message_hub
        # Only checkpoints of these loops record the last validation.
        if self._iter == 0 or EPOCH_LENGTH not in hub.runtime_info or self._within_epoch():
            return
        validated = hub.runtime_info.get(VALIDATED_ITER)
        if validated != self._iter:
            self._validate_if_due()

    def _within_epoch(self) -> bool:
        return False


@LOOPS.register_module()
class EpochBasedTrainLoop(_Resumable, MMEngineEpochBasedTrainLoop):
    """``EpochBasedTrainLoop`` that resumes within an epoch, with its remaining batches.

    The launcher uses it for ``train_cfg=dict(by_epoch=True, …)``. Arguments are mmengine's, and
    ``max_worker_restarts``: how often the run may replace data loader workers that have died, for
    instance because the machine ran out of memory, instead of ending. Defaults to 0.
    """

    def run(self) -> Any:
        """Train."""
        self._batches = self._prepare()
        self._skip = 0
        self.runner.call_hook('before_train')
        self._skip = self._resumed_batches()
        self._catch_up()
        self.runner.message_hub.update_info(EPOCH_LENGTH, len(self.dataloader))
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._validate_if_due()
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_epoch(self) -> None:
        """Train for the rest of an epoch."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        skip, self._skip = self._skip, 0
        for idx, data_batch in enumerate(self._remaining(skip), start=skip):
            self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _remaining(self, skip: int) -> Iterator[Any]:
        if skip == len(self.dataloader):
            return iter(())
        return self._batches.epoch(self._epoch, skip)

    def _resumed_batches(self) -> int:
        """Return how many batches of the current epoch the resumed run has finished."""
        length = len(self.dataloader)
        then = self.runner.message_hub.runtime_info.get(EPOCH_LENGTH, length)
        done = self._iter - self._epoch * then
        if done <= 0:
            return 0
        if then != length or done > length:
            self.runner.logger.warning(
                f'The checkpoint was saved {done} batches into an epoch of {then}, and an epoch '
                f'has {length} batches now: epoch {self._epoch + 1} starts over.'
            )
            return 0
        self.runner.logger.info(
            f'Epoch {self._epoch + 1} continues after {done} of {length} batches.'
        )
        return done

    def _within_epoch(self) -> bool:
        return self._skip > 0

    def _validation_is_due(self) -> bool:
        return self._epoch >= self.val_begin and (
            self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
        )


@LOOPS.register_module()
class IterBasedTrainLoop(_Resumable, MMEngineIterBasedTrainLoop):
    """``IterBasedTrainLoop`` that resumes with the next batch, without loading those before it.

    The launcher uses it for ``train_cfg=dict(by_epoch=False, …)``. Arguments are mmengine's, and
    ``max_worker_restarts`` as for :class:`EpochBasedTrainLoop`.
    """

    def run(self) -> Any:
        """Train."""
        batches = self._prepare()
        self.runner.call_hook('before_train')
        # The whole training is one epoch for hooks.
        self.runner.call_hook('before_train_epoch')
        skip = self._iter
        if skip and getattr(self, 'fast_forward_on_resume', False):
            skip = 0
            print_log(
                'fast_forward_on_resume: the data starts from the beginning', logger='current'
            )
        self.dataloader_iterator = batches.endless(skip)
        self._catch_up()
        self.runner.message_hub.update_info(EPOCH_LENGTH, len(self.dataloader))
        self.runner.model.train()
        while self._iter < self._max_iters and not self.stop_training:
            if not self.runner.model.training:
                self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._validate_if_due()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def _validation_is_due(self) -> bool:
        return self._iter >= self.val_begin and (
            self._iter % self.val_interval == 0 or self._iter == self._max_iters
        )
