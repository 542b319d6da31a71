"""Multi-scale deformable attention (Zhu et al., 2021), by mmcv's own PyTorch implementation.

mmcv calls the compiled op for tensors on accelerators and that implementation on the CPU.
"""

import torch
from torch import Tensor

from ._common import compute_dtype

__all__ = ['ms_deform_attn_backward', 'ms_deform_attn_forward']


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Weighted sum of bilinear samples from the levels of a feature pyramid.

    Args:
        value: (b, keys, heads, d), the levels one after the other.
        value_spatial_shapes: (levels, 2), height and width of each level.
        value_level_start_index: Unused: it follows from the shapes.
        sampling_locations: (b, queries, heads, levels, points, 2), x and y within 0..1.
        attention_weights: (b, queries, heads, levels, points).
        im2col_step: Unused.

    Returns:
        (b, queries, heads * d) in the dtype of ``value``.
    """
    dtype = compute_dtype(value)
    operands = (t.to(dtype) for t in (value, sampling_locations, attention_weights))
    return _attend(value_spatial_shapes, *operands).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of :func:`ms_deform_attn_forward`, by recomputing it.

    Args:
        grad_output: (b, queries, heads * d).
        grad_value: Output, like ``value``.
        grad_sampling_loc: Output, like ``sampling_locations``.
        grad_attn_weight: Output, like ``attention_weights``.

    The others are those of the forward pass.
    """
    dtype = compute_dtype(value)
    operands = [
        t.detach().to(dtype).requires_grad_()
        for t in (value, sampling_locations, attention_weights)
    ]
    with torch.enable_grad():
        output = _attend(value_spatial_shapes, *operands)
    gradients = torch.autograd.grad(output, operands, grad_output.to(dtype))
    for target, gradient in zip(
        (grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True
    ):
        target.copy_(gradient)


def _attend(shapes: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    # Plain numbers: the function splits tensors by these sizes, which cannot be tensors.
    levels = [tuple(shape) for shape in shapes.tolist()]
    return multi_scale_deformable_attn_pytorch(value, levels, locations, weights)
