"""Warm-up of averaged weights in short runs."""

from typing import Any

from mmengine.hooks import Hook

from mmvim.engine.optim import ExponentialMovingAverage
from mmvim.registry import HOOKS


@HOOKS.register_module()
class AverageWarmupHook(Hook):
    """Warm up the averages of ``EMAHook`` where the run is too short for their momentum.

    That is where more than 5 % of an :class:`mmvim.ExponentialMovingAverage` would still be the
    weights from before training at the end: a recipe's momentum of 4e-5 needs 75,000 updates. An
    average that was given ``warmup`` keeps it, and so does one that begins later in the run.
    """

    def before_train(self, runner: Any) -> None:
        """Decide by the length of the run."""
        for hook in runner.hooks:
            average = getattr(hook, 'ema_model', None)
            if not isinstance(average, ExponentialMovingAverage) or average.warmup is not None:
                continue
            updates = runner.max_iters // average.interval
            left = (1 - average.momentum) ** updates
            average.warmup = left > 0.05 and not (hook.begin_iter or hook.begin_epoch)
            if average.warmup:
                runner.logger.warning(
                    f'{type(hook).__name__}: with momentum={average.momentum:g}, {left:.0%} of the '
                    'averages, which validation, test and demos use, would still be the weights '
                    f'from before training after the {updates} updates of this run. Update n has '
                    'the momentum max(momentum, 9 / (10 + n)) instead (warmup=False of the hook: '
                    'the same one for all)'
                )
