"""Batches of clips for a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from mmvim._checks import check_numbers, check_positive


class VideoDataPreprocessor(BaseDataPreprocessor):
    """Preprocessor that stacks, moves and normalises clips, and mixes them in training.

    Clips are (batch, channels, frames, height, width). A sample may have several views
    (:class:`mmvim.RepeatAugment`, several clips, three crops). In training each becomes a separate
    sample, with the label of its video. In evaluation they stay together, (batch, views,
    channels, frames, height, width), for :class:`mmvim.VideoClassifier`, which averages them.

    Args:
        mean (Sequence[float]): Mean of each channel, in 0 .. 255. Defaults to ImageNet's, RGB.
        std (Sequence[float]): Standard deviation of each channel. Defaults to ImageNet's, RGB.
        num_classes (int, optional): Number of classes; needed for mixing. Defaults to None.
        batch_augments (dict, optional): ``augments`` (and ``probs``) of mmpretrain's
            ``RandomBatchAugment``, such as Mixup and CutMix. A classifier passes its ``train_cfg``
            here. All frames of a clip are mixed in the same way. Defaults to None.
        non_blocking (bool): Whether copies to a device may overlap with it. Defaults to False.

    Raises:
        ValueError: If mean and std differ in length or a deviation is not positive.
    """

    def __init__(
        self,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
        num_classes: int | None = None,
        batch_augments: dict | None = None,
        non_blocking: bool = False,
    ) -> None:
        super().__init__(non_blocking)
        for name, values in (('mean', mean), ('std', std)):
            check_numbers(name, values)
        if num_classes is not None:
            check_positive(num_classes=num_classes)
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(f'mean={mean!r} and std={std!r} must be equally long and std positive')
        self.num_classes = num_classes
        self.register_buffer('mean', torch.tensor(mean).float().view(-1, 1, 1, 1), False)
        self.register_buffer('std', torch.tensor(std).float().view(-1, 1, 1, 1), False)
        self.batch_augments = None
        if batch_augments:
            from mmpretrain.models.utils.batch_augments import RandomBatchAugment

            if num_classes is None:
                raise ValueError('batch_augments need num_classes')
            self.batch_augments = RandomBatchAugment(**batch_augments)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Make a batch.

        Args:
            data (dict): 'inputs', a tensor or list of tensors of one shape, (channels, frames,
                height, width) each or with views before; 'data_samples', optional.
            training (bool): Whether to make samples of views and to mix. Defaults to False.

        Returns:
            dict: 'inputs' float32, 'data_samples'.

        Raises:
            ValueError: If the inputs have no such shape.
        """
        inputs = self.cast_data(data['inputs'])
        samples = data.get('data_samples')
        if not isinstance(inputs, Tensor):
            inputs = torch.stack(list(inputs))
        if inputs.dim() not in (5, 6) or inputs.shape[-4] != len(self.mean):
            raise ValueError(
                f'clips must be (batch, {len(self.mean)}, frames, height, width), perhaps with '
                f'views after the batch, got {tuple(inputs.shape)}'
            )
        if training and inputs.dim() == 6:
            views = inputs.shape[1]
            inputs = inputs.flatten(0, 1)
            if samples is not None:
                samples = [sample.clone() for sample in samples for _ in range(views)]
        inputs = (inputs.float() - self.mean) / self.std
        if samples is not None:
            mixes = training and self.batch_augments is not None
            labels = self._labels(samples) if mixes else None
            samples = self.cast_data(samples)
            if mixes:
                inputs = self._mix(inputs, samples, labels)
        return {'inputs': inputs, 'data_samples': samples}

    def _labels(self, samples: list) -> Tensor:
        # Where the samples are: on a GPU the comparison would wait for it.
        labels = torch.cat([sample.gt_label for sample in samples])
        if labels.max() >= self.num_classes:
            raise ValueError(
                f'label {int(labels.max())} does not fit num_classes={self.num_classes} of the '
                'data preprocessor'
            )
        return labels

    def _mix(self, inputs: Tensor, samples: list, labels: Tensor) -> Tensor:
        labels = labels.to(inputs.device, non_blocking=True)
        scores = torch.nn.functional.one_hot(labels, self.num_classes).float()
        # mmpretrain's augmentations expect images: frames move into the channel dimension.
        channels = inputs.shape[1]
        mixed, scores = self.batch_augments(inputs.flatten(1, 2), scores)
        for sample, score in zip(samples, scores, strict=True):
            sample.set_gt_score(score)
        return mixed.unflatten(1, (channels, -1))
