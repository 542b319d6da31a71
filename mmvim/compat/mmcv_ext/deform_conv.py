"""Deformable convolution v1 and v2 (Dai et al., 2017; Zhu et al., 2019), on torchvision.

Offsets and masks have the same layout in mmcv and torchvision. The functions share these arguments:
``input`` (b, c_in, h, w), ``weight`` (c_out, c_in / group, rows, columns) and ``offset``
(b, deformable_group * 2 * rows * columns, h_out, w_out), y before x; ``mask`` has one value where
``offset`` has two. ``columns`` and ``ones`` are scratch. ``geometry`` is what ``mmcv.ops`` passes
by name: stride, padding and dilation in x and y, ``group``, groups of channels of the convolution,
and ``deformable_group``, groups of input channels with offsets of their own. The size of the kernel
is that of ``weight``, and ``im2col_step``, which bounds the memory of the compiled ops, has no
effect: torchvision bounds its own.
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

# In torchvision's order, as the two versions name it.
_PLAIN = ('dH', 'dW', 'padH', 'padW', 'dilationH', 'dilationW', 'group', 'deformable_group')
_MODULATED = (
    *('stride_h', 'stride_w', 'pad_h', 'pad_w'),
    *('dilation_h', 'dilation_w', 'group', 'deformable_group'),
)


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **geometry: int,
) -> None:
    """Write the convolution of samples at shifted positions to ``output``."""
    output.copy_(_forward(input, weight, offset, None, None, [geometry[k] for k in _PLAIN]))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Write the gradients with respect to ``input`` and ``offset``.

    torchvision also computes the gradient of ``weight``. It is left in ``columns``, where
    :func:`deform_conv_backward_parameters`, called next with the same scratch, finds it.
    """
    grad_input, grad_weight, grad_offset, _, _ = _backward(
        gradOutput, input, weight, offset, None, None, [geometry[k] for k in _PLAIN]
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
    *,
    scale: float,
    **geometry: int,
) -> None:
    """Add ``scale`` times the gradient with respect to ``weight`` to ``gradWeight``.

    ``columns`` holds the result of :func:`deform_conv_backward_input`, or is empty.
    """
    if columns.shape == gradWeight.shape:
        grad_weight = columns.clone()
        # Emptied, so that a second backward pass cannot reuse the first one's result.
        columns.resize_(0)
    else:
        # The gradient of the weight does not depend on the weight: zeros stand in for it.
        weight, sizes = torch.zeros_like(gradWeight), [geometry[k] for k in _PLAIN]
        grad_weight = _backward(gradOutput, input, weight, offset, None, None, sizes)[1]
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
    *,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Deformable convolution whose samples are weighted by ``mask``.

    ``bias`` is (c_out,), or anything without ``with_bias``.
    """
    sizes = [geometry[k] for k in _MODULATED]
    output.copy_(_forward(input, weight, offset, mask, bias if with_bias else None, sizes))


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
    *,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Write the gradients of :func:`modulated_deform_conv_forward`.

    ``grad_bias`` is left alone without ``with_bias``.
    """
    sizes = [geometry[k] for k in _MODULATED]
    gradients = _backward(
        grad_output, input, weight, offset, mask, bias if with_bias else None, sizes
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
    sizes: list[int],
) -> Tensor:
    operands = _operands(input, weight, offset, mask, bias)
    return torchvision_ops().deform_conv2d(*operands, *sizes, mask is not None)


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands = _operands(input, weight, offset, mask, bias)
    return torchvision_ops()._deform_conv2d_backward(
        grad_output.to(operands[0].dtype).contiguous(), *operands, *sizes, mask is not None
    )


def _operands(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(input)
    # torchvision's operator takes all five; unused ones only have to exist.
    mask = input.new_zeros(input.size(0), 1) if mask is None else mask
    bias = input.new_zeros(weight.size(0)) if bias is None else bias
    return tuple(t.to(dtype).contiguous() for t in (input, weight, offset, mask, bias))
