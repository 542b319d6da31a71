"""MESA: a classifier that also learns from the moving average of its own weights.

Du et al.: Sharpness-Aware Training for Free, NeurIPS 2022, https://arxiv.org/abs/2205.14083.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from mmpretrain.models import ImageClassifier
from torch import Tensor, nn


class MesaClassifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier`` with self-distillation from its averaged weights.

    The loss is the head's, logged as ``loss_cls``, plus, while there is a teacher, ``loss_mesa``::

        mesa_weight * sum_c q_c * log(q_c / p_c),  averaged over the batch,

    with ``p`` and ``q`` the softmax of the student's and the teacher's logits divided by
    ``temperature``. The teacher sees the same images (mixed ones included), in evaluation mode, and
    gets no gradient. Everything else, including the state dict, is as in ``ImageClassifier``.

    :class:`mmvim.engine.MesaHook` sets the teacher when distillation starts; without it (as in
    testing) there is none.

    Args:
        *args: As in ``ImageClassifier``.
        mesa_weight (float): Factor on the distillation loss, not negative.
        temperature (float): Divisor of the logits, positive. Defaults to 3, as in MambaVision.
        **kwargs: As in ``ImageClassifier``.

    Raises:
        ValueError: If ``mesa_weight`` or ``temperature`` is out of range.

    Example:
        >>> model = dict(
        ...     type='mmvim.MesaClassifier', mesa_weight=25.0,
        ...     backbone=dict(type='mmvim.MambaVision', arch='tiny'),
        ...     head=dict(type='LinearClsHead', num_classes=1000, in_channels=640))
        >>> custom_hooks = [dict(type='EMAHook', momentum=2e-4),
        ...                 dict(type='mmvim.MesaHook', start=0.25)]
    """

    def __init__(
        self, *args: Any, mesa_weight: float, temperature: float = 3.0, **kwargs: Any
    ) -> None:
        for name, value in (('mesa_weight', mesa_weight), ('temperature', temperature)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (value > 0 or (value == 0 and name == 'mesa_weight')):
                raise ValueError(f'{name}={value!r} must be a positive number')
        super().__init__(*args, **kwargs)
        self.mesa_weight = mesa_weight
        self.temperature = temperature
        # A weak reference keeps the teacher out of this model's parameters, state and copies.
        self._teacher: weakref.ref[nn.Module] | None = None

    @property
    def teacher(self) -> nn.Module | None:
        """The model to learn from; its ``mode='tensor'`` gives logits."""
        return None if self._teacher is None else self._teacher()

    def learn_from(self, teacher: nn.Module | None) -> None:
        """Set the teacher, which the caller keeps alive; None ends the distillation."""
        self._teacher = None if teacher is None else weakref.ref(teacher)

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            inputs (Tensor): (batch, channels, height, width), preprocessed.
            data_samples (list[DataSample]): The labels.

        Returns:
            dict[str, Tensor]: The head's losses, its ``loss`` as ``loss_cls``, and ``loss_mesa``.
        """
        features = self.extract_feat(inputs)
        losses = self.head.loss(features, data_samples)
        losses = {'loss_cls' if name == 'loss' else name: loss for name, loss in losses.items()}
        teacher = self.teacher
        if teacher is not None and self.mesa_weight:
            with torch.no_grad():
                target = teacher(inputs, mode='tensor')
            losses['loss_mesa'] = self.mesa_weight * self._divergence(self.head(features), target)
        return losses

    def _divergence(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(logits.float() / self.temperature, dim=-1)
        log_q = F.log_softmax(target.float() / self.temperature, dim=-1)
        return F.kl_div(log_p, log_q, reduction='batchmean', log_target=True)
