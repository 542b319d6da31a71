"""Video classifier that averages over views."""

from __future__ import annotations

import torch
from mmpretrain.models import ClsHead, ImageClassifier, MultiLabelClsHead, heads
from torch import Tensor

from mmvim._checks import check_positive

# OpenMMLab's own mmpretrain has none.
_REGRESSION = getattr(heads, 'RegressionHead', ())


class VideoClassifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier`` for videos of one or several views.

    Training and heads are ``ImageClassifier``'s. Predictions for inputs (batch, views, channels,
    frames, height, width) are the mean of the views' predictions: of the softmax of a ``ClsHead``,
    the sigmoid of a ``MultiLabelClsHead``, the values of a ``RegressionHead``.

    Args:
        views_per_step (int, optional): Largest number of views that pass through the network at
            once in evaluation, to save memory. Defaults to None: all.
        data_preprocessor (dict, optional): Defaults to :class:`mmvim.VideoDataPreprocessor`.
        **kwargs: Arguments of ``ImageClassifier``: backbone, neck, head, train_cfg, init_cfg,
            pretrained.

    Raises:
        ValueError: If ``views_per_step`` is not positive.
    """

    def __init__(
        self,
        *args,
        views_per_step: int | None = None,
        data_preprocessor: dict | None = None,
        **kwargs,
    ) -> None:
        if views_per_step is not None:
            check_positive(views_per_step=views_per_step)
        if data_preprocessor is None or isinstance(data_preprocessor, dict):
            data_preprocessor = {'type': 'mmvim.VideoDataPreprocessor', **(data_preprocessor or {})}
        super().__init__(*args, data_preprocessor=data_preprocessor, **kwargs)
        self.views_per_step = views_per_step

    def predict(self, inputs: Tensor, data_samples: list | None = None, **kwargs) -> list:
        """Classify.

        Args:
            inputs (Tensor): (batch, views, channels, frames, height, width), or without views.
            data_samples (list, optional): Receive the predictions. Defaults to new ones.

        Raises:
            TypeError: The head is of another kind and there are views.

        Returns:
            list: mmpretrain's ``DataSample`` with 'pred_score' and 'pred_label' of each video.
        """
        if inputs.dim() != 6:
            return super().predict(inputs, data_samples, **kwargs)
        if not isinstance(self.head, (ClsHead, MultiLabelClsHead)):
            raise TypeError(
                f'head={type(self.head).__name__} cannot merge views; allowed are subclasses of '
                "mmpretrain's ClsHead and MultiLabelClsHead, or clips without views"
            )
        views = inputs.shape[1]
        clips = inputs.flatten(0, 1)
        scores = [
            self.head(self.extract_feat(part)).float()
            for part in clips.split(self.views_per_step or len(clips))
        ]
        merged = self._mean_of_views(torch.cat(scores).unflatten(0, (-1, views)))
        return self.head._get_predictions(merged, data_samples, **kwargs)

    def _mean_of_views(self, scores: Tensor) -> Tensor:
        """Scores (batch, classes) that predict the mean of the views' predictions.

        ``scores`` is (batch, views, classes). A head turns scores into predictions itself, so the
        mean passes through the inverse.
        """
        if isinstance(self.head, MultiLabelClsHead):
            return scores.sigmoid().mean(1).logit()
        if isinstance(self.head, _REGRESSION):
            return scores.mean(1)
        return scores.softmax(-1).mean(1).log()
