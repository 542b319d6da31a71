"""RoIPool (Girshick, 2015) in PyTorch.

torchvision's operator is not used because, unlike mmcv's, it first rounds the corners of a region
to whole pixels.
"""

import torch
from torch import Tensor

from ._common import compute_dtype

__all__ = ['roi_pool_backward', 'roi_pool_forward']


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Maximum of the pixels that each bin of each region touches; 0 for an empty bin.

    Args:
        input: (b, c, h, w) features.
        rois: (n, 5) as (image index, x1, y1, x2, y2), the corner x2, y2 included.
        output: Output, (n, c, pooled_height, pooled_width).
        argmax: Output, int32 of the same shape: row * w + column of the maximum, -1 if none.
        pooled_height: Bins per column.
        pooled_width: Bins per row.
        spatial_scale: Size of a unit of ``rois`` in pixels of ``input``.
    """
    height, width = input.shape[-2:]
    output.zero_()
    argmax.fill_(-1)
    rois = rois.cpu().double()
    start = rois[:, [2, 1]] * spatial_scale
    size = (rois[:, [4, 3]] + 1) * spatial_scale - start
    rows = _bin_edges(start[:, 0], size[:, 0], pooled_height, height)
    columns = _bin_edges(start[:, 1], size[:, 1], pooled_width, width)
    images = rois[:, 0].long().tolist()
    for n in torch.nonzero((size > 0).all(1))[:, 0].tolist():
        filled = [(j, left, right) for j, (left, right) in enumerate(columns[n]) if left < right]
        if not filled:
            continue
        # The maximum along each row of pixels first, for all bins in a row, then down the columns.
        along_rows = [input[images[n], :, :, left:right].max(-1) for _, left, right in filled]
        values = torch.stack([best.values for best in along_rows], -1)
        lefts = torch.tensor([left for _, left, _ in filled], device=input.device)
        pixels = torch.stack([best.indices for best in along_rows], -1) + lefts
        bins = [j for j, _, _ in filled]
        for i, (top, bottom) in enumerate(rows[n]):
            if top < bottom:
                value, row = values[:, top:bottom].max(1)
                row += top
                column = pixels.gather(1, row[:, None])[:, 0]
                output[n, :, i, bins] = value
                argmax[n, :, i, bins] = (row * width + column).to(argmax.dtype)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of :func:`roi_pool_forward`: each bin's goes to the pixel that was its maximum.

    Args:
        grad_output: (n, c, pooled_height, pooled_width).
        argmax: As written by the forward pass.
        grad_input: Output, (b, c, h, w).

    The others are those of the forward pass.
    """
    _, channels, height, width = grad_input.shape
    plane = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)
    index = plane[:, :, None, None] * (height * width) + argmax
    kept = argmax >= 0
    dtype = compute_dtype(grad_output)
    total = torch.zeros(grad_input.numel(), dtype=dtype, device=grad_input.device)
    total.index_add_(0, index[kept], grad_output[kept].to(dtype))
    grad_input.copy_(total.view_as(grad_input))


def _bin_edges(start: Tensor, size: Tensor, bins: int, limit: int) -> list[list[list[int]]]:
    """[start, end) of each bin in pixels, for all regions at once."""
    index = torch.arange(bins + 1, dtype=start.dtype)
    # The division comes last, so that whole-number edges are exact and not rounded up.
    edges = index * size[:, None] / bins + start[:, None]
    edges = torch.stack([edges[:, :-1].floor(), edges[:, 1:].ceil()], -1)
    return edges.clamp(0, limit).long().tolist()
