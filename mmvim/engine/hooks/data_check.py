"""Consistency of the data with the model's classes."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import DefaultScope
from torch import nn

from mmvim.engine.tasks import TASKS
from mmvim.errors import UserError
from mmvim.registry import HOOKS


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Stop a run whose data set is empty or does not match the classes of the model's heads.

    Before the run, the number of classes of the data set is compared with that of the heads. In the
    first pass over the training data, each label is compared with the number of classes before the
    model sees it: on a GPU a label that is too large would otherwise fail an assertion in a kernel.
    Only the task libraries of :data:`mmvim.engine.tasks.TASKS` are known; others are left alone.

    Args:
        loops: The loops whose data to check before the run: ``'train'``, ``'val'``, ``'test'``.
    """

    priority = 'VERY_HIGH'

    def __init__(self, loops: tuple[str, ...] = ('train', 'val')):
        self.loops = loops
        self._unseen = 0
        self._outputs: dict[str, int] = {}
        self._task = None

    def before_run(self, runner) -> None:
        """Compare class counts.

        Raises:
            UserError: A data set is empty, or its number of classes differs from a head's.
        """
        scope = runner.default_scope
        self._task = TASKS.get(scope.scope_name if isinstance(scope, DefaultScope) else scope)
        if self._task is not None:
            model = runner.model
            while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
                model = model.module
            self._outputs = self._task.class_outputs(model)
        for loop in self.loops:
            if getattr(runner, f'_{loop}_loop') is not None:
                self._check_dataset(getattr(runner, f'{loop}_dataloader').dataset, loop)

    def _check_dataset(self, dataset: Any, loop: str) -> None:
        if hasattr(dataset, '__len__') and len(dataset) == 0:
            raise UserError(
                f'{loop}_dataloader.dataset ({type(dataset).__name__}) is empty: no sample was '
                'found, or filter_cfg removed all of them'
            )
        classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
        if classes is None or isinstance(classes, str):
            return
        for name, count in self._outputs.items():
            if count != len(classes):
                listed = ', '.join(map(str, classes[:5])) + (', …' if len(classes) > 5 else '')
                raise UserError(
                    f'{name} is {count}, but {loop}_dataloader.dataset '
                    f'({type(dataset).__name__}) has {len(classes)} classes ({listed}); '
                    'both must agree (--no-checks turns this check off)'
                )

    def before_train(self, runner) -> None:
        """Count the samples of the first pass."""
        dataset = runner.train_dataloader.dataset
        if self._outputs and hasattr(dataset, '__len__'):
            self._unseen = len(dataset)

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        """Check the labels of a batch.

        Raises:
            UserError: A label is negative or not below the number of classes.
        """
        if self._unseen <= 0:
            return
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        if not isinstance(samples, list | tuple):
            return
        self._unseen -= len(samples) * runner.world_size
        name, count = min(self._outputs.items(), key=lambda item: item[1])
        ignored = self._ignored_label(runner)
        found = [self._task.labels(sample) for sample in samples if hasattr(sample, 'get')]
        found = [
            labels.reshape(-1)
            for labels in found
            if labels is not None and labels.numel() and not labels.is_floating_point()
        ]
        # One look at the batch; which sample it is matters when there is something wrong.
        if not found or not self._bad(torch.cat(found), count, ignored).any():
            return
        for sample in samples:
            labels = self._task.labels(sample) if hasattr(sample, 'get') else None
            if labels is None or not labels.numel() or labels.is_floating_point():
                continue
            bad = self._bad(labels, count, ignored)
            if bad.any():
                where = sample.get('img_path')
                raise UserError(
                    f'label {int(labels[bad][0])} of {where!r} does not fit {name} = {count}; '
                    f'allowed: 0 to {count - 1}'
                    + (f' and {ignored} (ignored)' if ignored is not None else '')
                )

    @staticmethod
    def _bad(labels: torch.Tensor, count: int, ignored: int | None) -> torch.Tensor:
        bad = (labels < 0) | (labels >= count)
        return bad if ignored is None else bad & (labels != ignored)

    def _ignored_label(self, runner) -> int | None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        head = getattr(model, 'decode_head', None)
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        return getattr(head, 'ignore_index', None)
