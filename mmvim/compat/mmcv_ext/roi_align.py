"""RoIAlign (He et al., 2017) with average pooling, on torchvision."""

from torch import Tensor

from ._common import compute_dtype, torchvision_ops

__all__ = ['roi_align_backward', 'roi_align_forward']

_AVERAGE = 1


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average of bilinear samples in each bin of each region.

    Args:
        input: (b, c, h, w) features.
        rois: (n, 5) as (image index, x1, y1, x2, y2).
        output: Output, (n, c, aligned_height, aligned_width).
        argmax_y: Unused, as it belongs to maximum pooling.
        argmax_x: Unused, likewise.
        aligned_height: Bins per column.
        aligned_width: Bins per row.
        spatial_scale: Size of a unit of ``rois`` in pixels of ``input``.
        sampling_ratio: Samples per bin and direction; 0: as many as the bin has pixels.
        pool_mode: 1, the average.
        aligned: Put pixel centres at half-integer coordinates.

    Raises:
        NotImplementedError: Maximum pooling, which torchvision does not have.
    """
    _check_mode(pool_mode)
    dtype = compute_dtype(input)
    pooled = torchvision_ops().roi_align(
        input.to(dtype),
        rois.to(dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        sampling_ratio,
        aligned,
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward` with respect to ``input``.

    Args:
        grad_output: (n, c, aligned_height, aligned_width).
        grad_input: Output, (b, c, h, w).

    The others are those of the forward pass.
    """
    _check_mode(pool_mode)
    dtype = compute_dtype(grad_output)
    gradient = torchvision_ops()._roi_align_backward(
        grad_output.to(dtype),
        rois.to(dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input.copy_(gradient)


def _check_mode(pool_mode: int) -> None:
    if pool_mode != _AVERAGE:
        raise NotImplementedError(
            "roi_align: pool_mode 'max' needs an mmcv with compiled ops; the replacement on "
            "torchvision has 'avg' only"
        )
