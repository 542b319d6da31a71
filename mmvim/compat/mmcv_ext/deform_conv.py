"""Deformable convolution v1 and v2 (Dai et al., 2017; Zhu et al., 2019), on torchvision.

Offsets and masks have the same layout in mmcv and torchvision. ``im2col_step`` of the compiled ops
bounds their memory; torchvision bounds its own.
"""

import torch
from torch import Tensor

from ._common import compute_dtype, torchvision_ops

__all__ = [
    'deform_conv_backward_input',
    'deform_conv_backward_parameters',
    'deform_conv_forward',
    'modulated_deform_conv_backward',
    'modulated_deform_conv_forward',
]


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Convolution that samples its input at shifted positions.

    Args:
        input: (b, c_in, h, w).
        weight: (c_out, c_in / group, kH, kW).
        offset: (b, deformable_group * 2 * kH * kW, h_out, w_out), y before x.
        output: Output, (b, c_out, h_out, w_out).
        columns: Unused scratch.
        ones: Unused scratch.
        kW: Kernel width, as ``weight`` has it.
        kH: Kernel height, likewise.
        dW: Stride in x.
        dH: Stride in y.
        padW: Padding in x.
        padH: Padding in y.
        dilationW: Dilation in x.
        dilationH: Dilation in y.
        group: Groups of channels of the convolution.
        deformable_group: Groups of input channels with offsets of their own.
        im2col_step: Unused.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(_forward(input, weight, offset, None, None, geometry))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Gradient of :func:`deform_conv_forward` with respect to ``input`` and ``offset``.

    torchvision also computes the gradient of ``weight``. It is left in ``columns``, where
    :func:`deform_conv_backward_parameters`, called next with the same scratch, finds it.

    Args:
        input: As in the forward pass, like all that is not named here.
        offset: As in the forward pass.
        gradOutput: (b, c_out, h_out, w_out).
        gradInput: Output, like ``input``.
        gradOffset: Output, like ``offset``.
        weight: As in the forward pass.
        columns: Scratch; holds the gradient of ``weight`` afterwards.
        kW: Kernel width.
        kH: Kernel height.
        dW: Stride in x.
        dH: Stride in y.
        padW: Padding in x.
        padH: Padding in y.
        dilationW: Dilation in x.
        dilationH: Dilation in y.
        group: Groups of channels of the convolution.
        deformable_group: Groups of input channels with offsets of their own.
        im2col_step: Unused.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grad_input, grad_weight, grad_offset, _, _ = _backward(
        gradOutput, input, weight, offset, None, None, geometry
    )
    gradInput.copy_(grad_input)
    gradOffset.copy_(grad_offset)
    columns.resize_(weight.shape).copy_(grad_weight)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the gradient with respect to ``weight`` to ``gradWeight``.

    Args:
        input: As in the forward pass, like all that is not named here.
        offset: As in the forward pass.
        gradOutput: (b, c_out, h_out, w_out).
        gradWeight: Output, (c_out, c_in / group, kH, kW).
        columns: The result of :func:`deform_conv_backward_input`, or empty.
        ones: Unused scratch.
        kW: Kernel width.
        kH: Kernel height.
        dW: Stride in x.
        dH: Stride in y.
        padW: Padding in x.
        padH: Padding in y.
        dilationW: Dilation in x.
        dilationH: Dilation in y.
        group: Groups of channels of the convolution.
        deformable_group: Groups of input channels with offsets of their own.
        scale: Factor.
        im2col_step: Unused.
    """
    if columns.shape == gradWeight.shape:
        grad_weight = columns.clone()
        # Emptied, so that a second backward pass cannot reuse the first one's result.
        columns.resize_(0)
    else:
        geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
        # The gradient of the weight does not depend on the weight: zeros stand in for it.
        weight = torch.zeros_like(gradWeight)
        grad_weight = _backward(gradOutput, input, weight, offset, None, None, geometry)[1]
    gradWeight.add_(grad_weight.to(gradWeight.dtype), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Deformable convolution whose samples are weighted by ``mask``.

    Args:
        input: (b, c_in, h, w).
        weight: (c_out, c_in / group, kernel_h, kernel_w).
        bias: (c_out,), or anything without ``with_bias``.
        ones: Unused scratch.
        offset: (b, deformable_group * 2 * kernel_h * kernel_w, h_out, w_out), y before x.
        mask: (b, deformable_group * kernel_h * kernel_w, h_out, w_out).
        output: Output, (b, c_out, h_out, w_out).
        columns: Unused scratch.
        kernel_h: Kernel height, as ``weight`` has it.
        kernel_w: Kernel width, likewise.
        stride_h: Stride in y.
        stride_w: Stride in x.
        pad_h: Padding in y.
        pad_w: Padding in x.
        dilation_h: Dilation in y.
        dilation_w: Dilation in x.
        group: Groups of channels of the convolution.
        deformable_group: Groups of input channels with offsets and masks of their own.
        with_bias: Whether to add ``bias``.
    """
    geometry = (
        *(stride_h, stride_w, pad_h, pad_w),
        *(dilation_h, dilation_w, group, deformable_group),
    )
    output.copy_(_forward(input, weight, offset, mask, bias if with_bias else None, geometry))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Gradients of :func:`modulated_deform_conv_forward`.

    Args:
        input: As in the forward pass, like all that is not named here.
        weight: As in the forward pass.
        bias: As in the forward pass.
        ones: Unused scratch.
        offset: As in the forward pass.
        mask: As in the forward pass.
        columns: Unused scratch.
        grad_input: Output, like ``input``.
        grad_weight: Output, like ``weight``.
        grad_bias: Output, like ``bias``; untouched without ``with_bias``.
        grad_offset: Output, like ``offset``.
        grad_mask: Output, like ``mask``.
        grad_output: (b, c_out, h_out, w_out).
        kernel_h: Kernel height.
        kernel_w: Kernel width.
        stride_h: Stride in y.
        stride_w: Stride in x.
        pad_h: Padding in y.
        pad_w: Padding in x.
        dilation_h: Dilation in y.
        dilation_w: Dilation in x.
        group: Groups of channels of the convolution.
        deformable_group: Groups of input channels with offsets and masks of their own.
        with_bias: Whether the forward pass added ``bias``.
    """
    geometry = (
        *(stride_h, stride_w, pad_h, pad_w),
        *(dilation_h, dilation_w, group, deformable_group),
    )
    gradients = _backward(
        grad_output, input, weight, offset, mask, bias if with_bias else None, geometry
    )
    outputs = (grad_input, grad_weight, grad_offset, grad_mask, grad_bias if with_bias else None)
    for output, gradient in zip(outputs, gradients, strict=True):
        if output is not None:
            output.copy_(gradient)


def _forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> Tensor:
    operands = _operands(input, weight, offset, mask, bias)
    return torchvision_ops().deform_conv2d(*operands, *geometry, mask is not None)


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands = _operands(input, weight, offset, mask, bias)
    return torchvision_ops()._deform_conv2d_backward(
        grad_output.to(operands[0].dtype).contiguous(), *operands, *geometry, mask is not None
    )


def _operands(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(input)
    # torchvision's operator takes all five; unused ones only have to exist.
    mask = input.new_zeros(input.size(0), 1) if mask is None else mask
    bias = input.new_zeros(weight.size(0)) if bias is None else bias
    return tuple(t.to(dtype).contiguous() for t in (input, weight, offset, mask, bias))
