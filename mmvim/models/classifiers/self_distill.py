"""Self-distillation of VideoMamba (Li et al., https://arxiv.org/abs/2403.06977, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmvim._checks import check_number
from mmvim.layers import RMSNorm


class SelfDistillClassifier(ImageClassifier):
    """``ImageClassifier`` whose tokens also learn to match those of a smaller, trained model.

    The loss is that of the head plus ``distill_weight`` times the mean over all tokens of
    ``2 - 2 cos(distill_head(student), teacher)``. ``distill_head`` is an RMSNorm and a linear layer
    to the teacher's channels. The head classifies the class token.

    The teacher is in evaluation mode and does not learn. It belongs neither to the parameters nor
    to the checkpoints; checkpoints fit an ``ImageClassifier`` with the same backbone, except for
    ``distill_head``.

    Args:
        backbone (dict): A VideoMamba with ``out_type='raw'`` and a class token.
        teacher (dict): Likewise, with ``init_cfg`` for its weights. Both must divide an image into
            the same patches.
        distill_weight (float): Weight of the distillation loss. Defaults to 1.
        **kwargs: Arguments of ``ImageClassifier``: head, train_cfg, data_preprocessor, init_cfg.

    Raises:
        ValueError: If a model does not return all tokens, or their numbers differ.
    """

    def __init__(
        self,
        backbone: dict,
        teacher: dict,
        head: dict,
        distill_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, head=head, **kwargs)
        check_number('distill_weight', distill_weight, 0)
        if distill_weight == 0:
            raise ValueError(f'distill_weight={distill_weight!r} must be positive')
        teacher = MODELS.build(teacher).eval().requires_grad_(False)
        for name, model in (('backbone', self.backbone), ('teacher', teacher)):
            if getattr(model, 'out_type', None) != 'raw' or not model.num_extra_tokens:
                raise ValueError(f"{name} must have out_type='raw' and a class token")
        # Inside a list it is not a submodule: parameters, checkpoints and DDP ignore it.
        self._teacher = [teacher]
        self.distill_weight = distill_weight
        self.distill_head = nn.Sequential(
            RMSNorm(self.backbone.embed_dims),
            nn.Linear(self.backbone.embed_dims, teacher.embed_dims),
        )
        nn.init.trunc_normal_(self.distill_head[1].weight, std=0.02)
        nn.init.zeros_(self.distill_head[1].bias)
        # After the hook of ImageClassifier, which renames the weights of official files.
        self._register_load_state_dict_pre_hook(self._find_distill_head)

    @property
    def teacher(self) -> nn.Module:
        """The model to learn from."""
        return self._teacher[0]

    def _find_distill_head(
        self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any
    ) -> None:
        """Take an official file's distillation head; without it, the file serves for tests."""
        for name, own in self.distill_head.state_dict().items():
            given = state_dict.pop(f'{prefix}backbone.distill_head.{name}', own)
            state_dict.setdefault(f'{prefix}distill_head.{name}', given)

    def init_weights(self) -> None:
        """Initialise, and load the teacher's weights."""
        super().init_weights()
        self.teacher.init_weights()

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> SelfDistillClassifier:
        self.teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def extract_feat(self, inputs: Tensor, stage: str = 'neck') -> tuple[Tensor, ...] | Tensor:
        """Compute features; arguments as in ``ImageClassifier``, without a neck.

        Returns:
            tuple or Tensor: For 'backbone' all tokens (batch, length, channels); otherwise the
            class token (batch, channels), for 'pre_logits' as the head sees it.
        """
        feats = super().extract_feat(inputs, stage='backbone')
        if stage == 'backbone':
            return feats
        feats = (feats[-1][:, 0],)
        return feats if stage == 'neck' else self.head.pre_logits(feats)

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            inputs (Tensor): (batch, channels, height, width).
            data_samples (list): mmpretrain's ``DataSample``.

        Returns:
            dict: 'loss' (and other entries of the head) and 'loss_distill'.
        """
        tokens = self.extract_feat(inputs, stage='backbone')[-1]
        losses = self.head.loss((tokens[:, 0],), data_samples)
        with torch.no_grad():
            target = self.teacher(inputs)[-1]
        student = self.distill_head(tokens)
        if student.shape != target.shape:
            raise ValueError(
                f'the backbone has {student.shape[1]} tokens and the teacher {target.shape[1]}'
            )
        cosine = F.cosine_similarity(student.float(), target.float(), dim=-1)
        losses['loss_distill'] = self.distill_weight * (2 - 2 * cosine).mean()
        return losses
