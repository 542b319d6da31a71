"""RMS and layer norms, with the arguments of mamba_ssm 1."""

from torch import Tensor

from mmvim.dropin.norms import add_norm
from mmvim.dropin.placeholders import attributes_of

from .layer_norm import RMSNorm

__all__ = ['RMSNorm', 'layer_norm_fn', 'rms_norm_fn']
__getattr__ = attributes_of(__name__)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise ``x + residual``; see :func:`mmvim.dropin.norms.add_norm`."""
    return add_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`layer_norm_fn` with an RMS norm."""
    return add_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)
