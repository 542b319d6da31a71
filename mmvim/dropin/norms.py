"""The norms of mamba_ssm: a residual addition and an RMS or layer norm in one call."""

import torch.nn.functional as F
from torch import Tensor

from mmvim import ops
from mmvim.ops import _validation as check
from mmvim.ops._library import compute_dtype, without_autocast


def add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    prenorm: bool,
    residual_in_fp32: bool,
    is_rms_norm: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise x + residual over the last axis.

    Args:
        x: (..., d).
        weight, bias: (d,); bias may be None.
        residual: Shape of x, or None.
        eps: Added to the mean square or the variance.
        prenorm: Also return the sum, in the dtype of residual if given, else in float32 with
            residual_in_fp32, else in the dtype of x.
        residual_in_fp32: See prenorm.
        is_rms_norm: RMS norm, else layer norm.

    Returns:
        The norm, in the dtype of x, and with prenorm the sum.
    """
    check.check_tensor('x', x)
    check.check_tensor('weight', weight)
    for name, value in (('prenorm', prenorm), ('residual_in_fp32', residual_in_fp32)):
        check.check_flag(name, value)
    out, total = _add_norm(x, weight, bias, residual, eps, residual_in_fp32, is_rms_norm)
    return (out, total) if prenorm else out


@without_autocast
def _add_norm(x, weight, bias, residual, eps, residual_in_fp32, is_rms_norm):
    wide = compute_dtype(x.dtype)
    if residual is not None:
        check.check_tensor('residual', residual)
        check.check_shape('residual', residual, 'shape of x', x.shape)
        kept = residual.dtype
    else:
        kept = wide if residual_in_fp32 else x.dtype
    if is_rms_norm and bias is None and kept in (x.dtype, wide):
        fitting = weight if weight.dtype in (x.dtype, wide) else weight.to(wide)
        return ops.add_rms_norm(x, fitting, residual, eps=float(eps), residual_in_fp32=kept == wide)
    total = x.to(wide) if residual is None else x.to(wide) + residual
    scale, shift = weight.to(wide), None if bias is None else bias.to(wide)
    if is_rms_norm:
        out = F.rms_norm(total, total.shape[-1:], scale, eps)
        out = out if shift is None else out + shift
    else:
        out = F.layer_norm(total, total.shape[-1:], scale, shift, eps)
    return out.to(x.dtype), total.to(kept)
