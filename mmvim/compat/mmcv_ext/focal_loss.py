"""Focal losses (Lin et al., 2017) in PyTorch.

Logarithms are exact where the compiled ops clamp a probability to the smallest float.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import compute_dtype

__all__ = [
    'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward',
    'softmax_focal_loss_backward',
    'softmax_focal_loss_forward',
]


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """-alpha (1-p)^gamma log p for the target class, -(1-alpha) p^gamma log(1-p) for the others.

    Args:
        input: (n, c) logits.
        target: (n,) class indices; any other value, usually c, is background.
        weight: (c,) weight of each target class, or empty.
        output: Output, (n, c).
        gamma: Focusing parameter.
        alpha: Weight of the target class.
    """
    logits, positive, scale = _sigmoid_terms(input, target, weight)
    p = logits.sigmoid()
    loss = torch.where(
        positive,
        -alpha * (1 - p) ** gamma * F.logsigmoid(logits),
        -(1 - alpha) * p**gamma * F.logsigmoid(-logits),
    )
    output.copy_(loss * scale)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of :func:`sigmoid_focal_loss_forward` by the logits.

    Args:
        grad_input: Output, (n, c).

    The others are those of the forward pass.
    """
    logits, positive, scale = _sigmoid_terms(input, target, weight)
    p = logits.sigmoid()
    gradient = torch.where(
        positive,
        alpha * (1 - p) ** gamma * (gamma * p * F.logsigmoid(logits) - (1 - p)),
        (1 - alpha) * p**gamma * (p - gamma * (1 - p) * F.logsigmoid(-logits)),
    )
    grad_input.copy_(gradient * scale)


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """-alpha (1-p)^gamma log p of the target class's probability p.

    Args:
        input: (n, c) probabilities (after the softmax).
        target: (n,) class indices; negative ones are ignored.
        weight: (c,) weight of each target class, or empty.
        output: Output, (n,).
        gamma: Focusing parameter.
        alpha: Factor.
    """
    p, valid, scale = _softmax_terms(input, target, weight)
    loss = -alpha * (1 - p) ** gamma * p.log()
    output.copy_(torch.where(valid, loss * scale, 0))


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Derivative of :func:`softmax_focal_loss_forward` by the logits before the softmax.

    Args:
        buff: Output, (n,): p times the derivative by p.
        grad_input: Output, (n, c).

    The others are those of the forward pass.
    """
    p, valid, scale = _softmax_terms(input, target, weight)
    slope = -((1 - p) ** gamma)
    if gamma != 0:
        rest = (1 - p).clamp(min=torch.finfo(p.dtype).tiny)
        slope = slope + gamma * rest ** (gamma - 1) * p * p.log()
    buff.copy_(torch.where(valid, alpha * slope * scale, 0))
    one_hot = target[:, None] == torch.arange(input.size(1), device=input.device)
    grad_input.copy_(buff[:, None].to(p.dtype) * (one_hot.to(p.dtype) - input.to(p.dtype)))


def _sigmoid_terms(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = input.to(compute_dtype(input))
    classes = input.size(1)
    positive = target[:, None] == torch.arange(classes, device=input.device)
    if weight.numel() == 0:
        return logits, positive, logits.new_ones(())
    if ((target < 0) | (target >= classes)).any():
        raise ValueError(
            'sigmoid_focal_loss: with a weight, which is looked up by target, every target must '
            f'be in 0..{classes - 1}, found {int(target.min())}..{int(target.max())}'
        )
    return logits, positive, weight.to(logits.dtype)[target][:, None]


def _softmax_terms(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    valid = target >= 0
    label = target.clamp(min=0)
    p = input.to(compute_dtype(input)).gather(1, label[:, None])[:, 0]
    p = p.clamp(min=torch.finfo(p.dtype).tiny)
    scale = weight.to(p.dtype)[label] if weight.numel() else p.new_ones(())
    return p, valid, scale
