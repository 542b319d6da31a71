"""Overlaps of axis-aligned boxes."""

import torch
from torch import Tensor

from ._common import compute_dtype

__all__ = ['bbox_overlaps']


def bbox_overlaps(
    bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int
) -> None:
    """Intersection over union, or over the first box's area, of boxes (x1, y1, x2, y2).

    Args:
        bboxes1: (m, 4).
        bboxes2: (n, 4); m == n if ``aligned``.
        ious: Output, (m,) if ``aligned`` else (m, n).
        mode: 0, relative to the union; 1, relative to the area of the first box.
        aligned: Pair box i with box i instead of each with each.
        offset: 0, or 1 if a box with equal corners covers one pixel.
    """
    dtype = compute_dtype(bboxes1, bboxes2)
    first, second = bboxes1.to(dtype), bboxes2.to(dtype)
    area1 = (first[:, 2:] - first[:, :2] + offset).prod(-1)
    area2 = (second[:, 2:] - second[:, :2] + offset).prod(-1)
    if not aligned:
        first, area1 = first[:, None], area1[:, None]
    top_left = torch.maximum(first[..., :2], second[:, :2])
    bottom_right = torch.minimum(first[..., 2:], second[:, 2:])
    overlap = (bottom_right - top_left + offset).clamp(min=0).prod(-1)
    ious.copy_(overlap / (area1 + area2 - overlap if mode == 0 else area1))
