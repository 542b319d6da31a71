"""Schedule and teacher of a classifier that learns from the average of its weights."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop
from torch import nn

from mmvim.checkpoints.loading import unwrapped
from mmvim.registry import HOOKS


@HOOKS.register_module()
class MesaHook(Hook):
    """Make the model of the ``EMAHook`` the teacher of a ``MesaClassifier``.

    MESA of Du et al. (Sharpness-Aware Training for Free, NeurIPS 2022), with the start as in
    MambaVision: distillation begins with the first epoch ``e`` (counted from 0) for which
    ``e / max_epochs > start``; in training by iterations, with the first such iteration.
    The teacher is put into evaluation mode. Nothing is saved: in a resumed run ``EMAHook`` restores
    the teacher, and the progress decides.

    Args:
        start (float): Fraction of the training before distillation starts, in [0, 1).
            Defaults to 0.25.

    Raises:
        ValueError: If ``start`` is out of range.

    Example:
        >>> custom_hooks = [
        ...     dict(type='EMAHook', momentum=2e-4, update_buffers=True),
        ...     dict(type='mmvim.MesaHook', start=0.25)]
    """

    def __init__(self, start: float = 0.25) -> None:
        if isinstance(start, bool) or not isinstance(start, int | float) or not 0 <= start < 1:
            raise ValueError(f'MesaHook: start={start!r} must be a number in [0, 1)')
        self.start = start
        self._student: nn.Module | None = None
        self._teacher: nn.Module | None = None

    def before_train(self, runner: Any) -> None:
        """Find student and teacher.

        Raises:
            ValueError: The model cannot learn from a teacher, or there is no teacher on its device.
        """
        model = unwrapped(runner.model)
        if not hasattr(model, 'learn_from'):
            raise ValueError(
                "custom_hooks: MesaHook needs a model of type 'mmvim.MesaClassifier', "
                f'not {type(model).__name__!r}'
            )
        average = next((hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)), None)
        if average is None:
            raise ValueError(
                'custom_hooks: MesaHook needs an EMAHook as well, whose average is the teacher'
            )
        devices = [next(m.parameters()).device for m in (model, average)]
        if devices[0] != devices[1]:
            raise ValueError(
                f'custom_hooks: the average of the EMAHook is on {devices[1]} and the model on '
                f'{devices[0]}; MesaHook needs both on one device'
            )
        self._student = model
        self._teacher = average.module.eval()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Attach the teacher when distillation starts."""
        has_begun = self._progress(runner) > self.start
        if has_begun and self._student.teacher is None:
            runner.logger.info(
                f'MesaHook: distillation begins at epoch {runner.epoch + 1}, '
                f'iteration {runner.iter + 1}'
            )
        self._student.learn_from(self._teacher if has_begun else None)

    def after_train(self, runner: Any) -> None:
        """Detach the teacher."""
        self._student.learn_from(None)

    @staticmethod
    def _progress(runner: Any) -> float:
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            return runner.epoch / runner.max_epochs
        return runner.iter / runner.max_iters
