"""RMS and layer norms, with the arguments of mamba_ssm 2."""

import torch
from torch import Tensor, nn

from mmvim.dropin.norms import add_norm
from mmvim.dropin.placeholders import attributes_of

__all__ = ['RMSNorm', 'layer_norm_fn', 'rms_norm_fn']
__getattr__ = attributes_of(__name__)


def _refuse(**unsupported: object) -> None:
    for name, value in unsupported.items():
        if value is not None and not (isinstance(value, (bool, int, float)) and value == 0):
            raise NotImplementedError(
                f'{name} is not supported by mmvim.dropin: apply it outside of the norm, and '
                'leave the argument out'
            )


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: None = None,
    weight1: None = None,
    bias1: None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise ``x + residual``; see :func:`mmvim.dropin.norms.add_norm`.

    ``x1``, ``weight1``, ``bias1``, ``dropout_p``, ``rowscale`` and ``return_dropout_mask`` are
    refused unless they are left at their defaults.
    """
    _refuse(x1=x1, weight1=weight1, bias1=bias1, dropout_p=dropout_p, rowscale=rowscale)
    _refuse(return_dropout_mask=return_dropout_mask)
    return add_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: None = None,
    weight1: None = None,
    bias1: None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`layer_norm_fn` with an RMS norm."""
    inputs = x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale
    return layer_norm_fn(*inputs, prenorm, residual_in_fp32, True, return_dropout_mask)


class RMSNorm(nn.Module):
    """RMS norm over the last axis, with an optional residual.

    Args:
        hidden_size: Size of the last axis.
        eps: Added to the mean square.
        dropout_p: Must be 0.
        device, dtype: Of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _refuse(dropout_p=dropout_p)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter('bias', None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise ``x + residual``; see :func:`mmvim.dropin.norms.add_norm`."""
        return add_norm(
            x, self.weight, self.bias, residual, self.eps, prenorm, residual_in_fp32, True
        )
