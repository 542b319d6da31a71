"""Parts of an application as parts of an exported file: pixels in, scores out; whole detectors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .formats import Exportable


class Processed(nn.Module):
    """A classifier or segmentor that takes pixels and gives scores.

    Args:
        model: The model.
        described: Its metadata, from :func:`mmvim.export.metadata.describe`.

    Raises:
        ValueError: The model is no classifier or segmentor of RGB or grey images.
    """

    def __init__(self, model: nn.Module, described: Mapping[str, Any]) -> None:
        super().__init__()
        order, output = described.get('channels'), described.get('output')
        if output != 'logits' or order not in ('RGB', 'BGR', 'grey'):
            raise ValueError(
                'processing is for classifiers and segmentors of RGB or grey images; this model '
                f'gives {output} of {order} images'
            )
        if 'sliding_window' in described:
            raise ValueError('a segmentor that slides over the picture cannot include processing')
        self.inner = Exportable(model)
        self.is_reversed = order == 'BGR'
        self.activation = described['activation']
        self.is_map = 'align_corners' in described
        self.align_corners = described.get('align_corners')
        mean, std = described.get('mean', [0.0]), described.get('std', [1.0])
        self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer('std', torch.tensor(std).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise, run the model, and turn its logits into scores.

        Args:
            pixels: RGB or grey (batch, channels, height, width), 0 to 255, of the model's size.

        Returns:
            Scores (batch, classes), or (batch, classes, height, width) of a segmentor; those of
            a regression as they are.
        """
        if self.is_reversed:
            pixels = pixels.flip(1)
        logits = self.inner((pixels - self.mean) / self.std)
        if self.is_map:
            size = pixels.shape[-2:]
            logits = F.interpolate(logits, size, mode='bilinear', align_corners=self.align_corners)
        if self.activation == 'none':
            return logits
        return logits.sigmoid() if self.activation == 'sigmoid' else logits.softmax(1)


class WholeDetector(nn.Module):
    """A single-stage detector with its head, up to the maps that boxes are decoded from.

    Args:
        model: A detector of mmdet with a ``bbox_head``, such as RetinaNet, FCOS or ATSS.

    Raises:
        ValueError: The detector has none: its second stage needs proposals.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not hasattr(model, 'bbox_head') or not hasattr(model, 'extract_feat'):
            raise ValueError(
                f'{type(model).__name__} has no bbox_head: only single-stage detectors are '
                'exported with their heads'
            )
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps of each kind (scores, boxes, ...), from the finest level to the coarsest."""
        kinds = self.model.bbox_head(self.model.extract_feat(images))
        return tuple(x for levels in kinds for x in levels)
