"""LAMB with few kernels per step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mmvim.registry import OPTIMIZERS


@OPTIMIZERS.register_module()
class Lamb(Optimizer):
    """LAMB (You et al., Large Batch Optimization for Deep Learning, ICLR 2020) on tensor lists.

    Same as mmpretrain's ``Lamb``, which is NVIDIA's variant: the gradient is divided by its global
    norm where that exceeds ``max_grad_norm``, then ::

        m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g²
        u = m̂ / (sqrt(v̂) + eps) + weight_decay p
        p = p - lr |p| / |u| u

    with bias-corrected m̂ and v̂. mmpretrain's takes some fifteen kernels per parameter, this
    one a few per parameter group. The state is the same, so that either continues from checkpoints
    of the other; ``tools/train.py`` uses this one for ``type='Lamb'`` on a GPU.

    Args:
        params: Parameters, or dicts of parameter groups.
        lr (float): Learning rate. Defaults to 1e-3.
        bias_correction (bool): Whether to correct the averages for their start at 0.
        betas (tuple[float, float]): Coefficients of the averages. Defaults to (0.9, 0.999).
        eps (float): Added to the denominator. Defaults to 1e-6.
        weight_decay (float): Decoupled weight decay. Defaults to 0.01.
        grad_averaging (bool): Whether the gradient enters m with ``1 - beta1`` or with 1.
        max_grad_norm (float): Global norm to which gradients are clipped. Defaults to 1.
        trust_clip (bool): Whether ``|p| / |u|`` is at most 1. Defaults to False.
        always_adapt (bool): Whether parameters without weight decay also get the factor
            ``|p| / |u|``. Defaults to False.

    Raises:
        RuntimeError: If a gradient is sparse.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        grad_averaging: bool = True,
        max_grad_norm: float = 1.0,
        trust_clip: bool = False,
        always_adapt: bool = False,
    ) -> None:
        defaults = {
            'lr': lr,
            'bias_correction': bias_correction,
            'betas': betas,
            'eps': eps,
            'weight_decay': weight_decay,
            'grad_averaging': grad_averaging,
            'max_grad_norm': max_grad_norm,
            'trust_clip': trust_clip,
            'always_adapt': always_adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters, and clip their gradients in place.

        Args:
            closure: Function that re-evaluates the model and returns the loss.

        Returns:
            The closure's result, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [[p for p in group['params'] if p.grad is not None] for group in self.param_groups]
        gradients = [p.grad for params in groups for p in params]
        if any(grad.is_sparse for grad in gradients):
            raise RuntimeError('Lamb does not support sparse gradients')
        if gradients:
            # Sorted, so that the sum does not depend on how parameters are grouped.
            norm = _norms(gradients).sort().values.norm()
            clip = (norm / self.defaults['max_grad_norm']).clamp(min=1)
            torch._foreach_div_(gradients, clip)
        for group, params in zip(self.param_groups, groups, strict=True):
            group['step'] = group.get('step', 0) + 1
            if params:
                self._update(group, params)
        return loss

    def _update(self, group: dict, params: list[Tensor]) -> None:
        beta1, beta2 = group['betas']
        corrections = 1.0, 1.0
        if group['bias_correction']:
            corrections = 1 - beta1 ** group['step'], 1 - beta2 ** group['step']
        for p in params:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        gradients = [p.grad for p in params]
        averages = [self.state[p]['exp_avg'] for p in params]
        squares = [self.state[p]['exp_avg_sq'] for p in params]

        torch._foreach_mul_(averages, beta1)
        torch._foreach_add_(averages, gradients, alpha=1 - beta1 if group['grad_averaging'] else 1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, math.sqrt(corrections[1]))
        torch._foreach_add_(denominators, group['eps'])
        updates = torch._foreach_div(averages, corrections[0])
        torch._foreach_div_(updates, denominators)
        if group['weight_decay'] != 0:
            torch._foreach_add_(updates, params, alpha=group['weight_decay'])
        if group['weight_decay'] != 0 or group['always_adapt']:
            before, after = _norms(params), _norms(updates)
            ratio = torch.where((before > 0) & (after > 0), before / after, 1.0)
            if group['trust_clip']:
                ratio = ratio.clamp(max=1)
            torch._foreach_mul_(updates, ratio.unbind())
        torch._foreach_add_(params, updates, alpha=-group['lr'])


def _norms(tensors: list[Tensor]) -> Tensor:
    """Return the norms of all tensors, stacked."""
    return torch.stack(torch._foreach_norm(tensors))
