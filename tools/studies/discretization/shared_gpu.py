"""Predictions that leave the GPU in one copy a batch.

mmpretrain's metric copies the scores and the label of each image by itself. Each copy waits for the
GPU, which other processes use at the same time.
"""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class OneCopy(Hook):
    """Copy the scores and labels of a batch before they are taken apart."""

    def before_run(self, runner) -> None:
        """Put the copy in front of what the head does with its scores."""
        head = runner.model.head
        predict = head._get_predictions

        def predict_on_cpu(scores, samples):
            labels = torch.cat([sample.gt_label for sample in samples]).cpu()
            for sample, label in zip(samples, labels.split(1), strict=True):
                sample.set_gt_label(label)
            return predict(scores.float().cpu(), samples)

        head._get_predictions = predict_on_cpu
