"""Non-maximum suppression of axis-aligned boxes: hard (torchvision), soft and with groups."""

import numpy as np
import torch
from torch import Tensor

from ._common import compute_dtype, torchvision_ops

__all__ = ['nms', 'nms_match', 'softnms']

_SOFT_METHODS = ('naive', 'linear', 'gaussian')


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the kept boxes, by descending score.

    Args:
        boxes: (n, 4) as (x1, y1, x2, y2).
        scores: (n,).
        iou_threshold: A box that overlaps a better one by more than this is dropped.
        offset: 0, or 1 where a box of equal corners is one pixel large.
    """
    dtype = compute_dtype(boxes)
    boxes = boxes.to(dtype)
    if offset:
        # max x2 - min x1 + 1 of two boxes is that of boxes whose right edge lies one further.
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    # A wider dtype preserves the order of the scores.
    return torchvision_ops().nms(boxes, scores.to(dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al., 2017): overlapping boxes lose score instead of being dropped.

    Args:
        boxes: (n, 4) as (x1, y1, x2, y2), on the CPU.
        scores: (n,).
        dets: Output, (n, 5): the first k rows become the selected boxes with their new scores.
        iou_threshold: Overlap from which ``naive`` and ``linear`` act.
        sigma: Width of ``gaussian``.
        min_score: A box whose score falls below it is dropped.
        method: 0 naive (score 0), 1 linear (times 1 - IoU), 2 Gaussian (times exp(-IoU²/sigma)).
        offset: 0, or 1 where a box of equal corners is one pixel large.

    Returns:
        (k,) indices of the selected boxes, in the order of selection.
    """
    if method not in range(len(_SOFT_METHODS)):
        raise ValueError(f'softnms: method is {method}, allowed are 0, 1, 2 {_SOFT_METHODS}')
    dtype = compute_dtype(boxes)
    box = boxes.to('cpu', dtype).numpy()
    score = scores.to('cpu', dtype).numpy().copy()
    area = (box[:, 2] - box[:, 0] + offset) * (box[:, 3] - box[:, 1] + offset)
    left = np.arange(len(box))
    selected = []
    while len(left):
        position = int(np.argmax(score[left]))
        best = left[position]
        selected.append(int(best))
        left = np.delete(left, position)
        iou = _iou(box, area, best, left, offset)
        if method == 0:
            score[left] *= iou < iou_threshold
        elif method == 1:
            score[left] *= np.where(iou >= iou_threshold, 1 - iou, 1)
        else:
            score[left] *= np.exp(-(iou * iou) / sigma)
        left = left[score[left] >= min_score]
    count = len(selected)
    dets[:count, :4] = torch.from_numpy(box[selected]).to(dets.dtype)
    dets[:count, 4] = torch.from_numpy(score[selected]).to(dets.dtype)
    return torch.tensor(selected, dtype=torch.long, device=boxes.device)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes: each kept box's index, followed by those that it suppressed.

    Args:
        dets: (n, 5) as (x1, y1, x2, y2, score).
        iou_threshold: A box that overlaps a better one by this much or more joins its group.
    """
    dtype = compute_dtype(dets)
    box = dets.to('cpu', dtype).numpy()
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    left = np.argsort(-box[:, 4], kind='stable')
    groups = []
    while len(left):
        best, left = left[0], left[1:]
        suppressed = _iou(box, area, best, left, 0) >= iou_threshold
        groups.append([int(best), *left[suppressed].tolist()])
        left = left[~suppressed]
    return groups


def _iou(
    box: np.ndarray, area: np.ndarray, best: int, others: np.ndarray, offset: int
) -> np.ndarray:
    top_left = np.maximum(box[best, :2], box[others, :2])
    bottom_right = np.minimum(box[best, 2:4], box[others, 2:4])
    overlap = np.maximum(bottom_right - top_left + offset, 0).prod(-1)
    # Two empty boxes overlap by 0/0, which compares as "not above", as in the compiled op.
    with np.errstate(invalid='ignore', divide='ignore'):
        return overlap / (area[best] + area[others] - overlap)
