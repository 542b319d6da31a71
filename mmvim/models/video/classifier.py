"""Video classifier that averages views."""

from __future__ import annotations

import torch
from mmpretrain.models import ImageClassifier
from torch import Tensor

from mmvim._checks import check_positive


class VideoClassifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier`` for videos of one or several views.

    Training and heads are ``ImageClassifier``'s. Predictions for inputs (batch, views, channels,
    frames, height, width) are the mean of the views' class probabilities.

    Args:
        views_per_step (int, optional): Most views that pass the network at once in evaluation;
            lower it where twelve views of a batch do not fit into memory. Defaults to None: all.
        data_preprocessor (dict, optional): Defaults to :class:`mmvim.VideoDataPreprocessor`.
        **kwargs: Of ``ImageClassifier``: backbone, neck, head, train_cfg, init_cfg, pretrained.

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
            data_samples (list, optional): Get the predictions. Defaults to new ones.

        Returns:
            list: mmpretrain's ``DataSample`` with 'pred_score' and 'pred_label' of each video.
        """
        if inputs.dim() != 6:
            return super().predict(inputs, data_samples, **kwargs)
        views = inputs.shape[1]
        clips = inputs.flatten(0, 1)
        scores = [
            self.head(self.extract_feat(part)).float()
            for part in clips.split(self.views_per_step or len(clips))
        ]
        probabilities = torch.cat(scores).softmax(-1).unflatten(0, (-1, views)).mean(1)
        # The head takes the softmax of what it gets, which gives these probabilities back.
        return self.head._get_predictions(probabilities.log(), data_samples, **kwargs)
