"""The initialisation that vision models take from mamba_ssm's language models."""

import math

import torch
from torch import nn

from mmvim.dropin.placeholders import attributes_of

__all__ = ['_init_weights']
__getattr__ = attributes_of(__name__)


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Initialise a module, for ``model.apply``.

    Biases of linear layers become 0 unless marked ``_no_reinit``, embeddings normal with the
    deviation ``initializer_range``, and ``out_proj.weight`` and ``fc2.weight`` torch's default for
    linear layers divided by the root of the number of residual additions.
    """
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, '_no_reinit', False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if not rescale_prenorm_residual:
        return
    for name, weight in module.named_parameters():
        if name in ('out_proj.weight', 'fc2.weight'):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            with torch.no_grad():
                weight /= math.sqrt(n_residuals_per_layer * n_layer)
