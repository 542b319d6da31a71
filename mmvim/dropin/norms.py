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
    prenorm = check.as_flag('prenorm', prenorm)
    residual_in_fp32 = check.as_flag('residual_in_fp32', residual_in_fp32)
    out, total = _add_norm(x, weight, bias, residual, eps, residual_in_fp32, is_rms_norm)
    return (out, total) if prenorm else out


@without_autocast
def _add_norm(x, weight, bias, residual, eps, residual_in_fp32, is_rms_norm):
    wide = compute_dtype(x.dtype)
    if residual is not None:
        check.check_tensor('residual', residual)
        check.check_shape('residual', residual, '... d', x.shape)
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


def gated_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    is_rms_norm: bool,
) -> Tensor:
    """``norm(x) * silu(z)``, or ``norm(x * silu(z))`` unless norm_before_gate.

    Args:
        x: (..., d).
        weight, bias: (d,); bias may be None.
        z: Shape of x, or None for no gate.
        eps: Added to the mean square or the variance.
        group_size: Channels that are normalised together, a divisor of d; None for all.
        norm_before_gate: Whether the norm comes before the gate.
        is_rms_norm: RMS norm, else layer norm.

    Returns:
        Shape and dtype of x.
    """
    check.check_tensor('x', x)
    check.check_tensor('weight', weight)
    norm_before_gate = check.as_flag('norm_before_gate', norm_before_gate)
    d = x.shape[-1]
    for name, value, shape in (('weight', weight, (d,)), ('bias', bias, (d,)), ('z', z, x.shape)):
        if value is not None:
            check.check_tensor(name, value)
            check.check_shape(name, value, '... d' if name == 'z' else 'd', shape)
    size = d if group_size is None else group_size
    if size < 1 or d % size:
        raise ValueError(f'group_size must divide d = {d}, got {group_size}')
    return _gated_norm(x, weight, bias, z, eps, size, norm_before_gate, is_rms_norm)


@without_autocast
def _gated_norm(x, weight, bias, z, eps, size, norm_before_gate, is_rms_norm):
    wide = compute_dtype(x.dtype)
    gate = None if z is None else F.silu(z.to(wide))
    out = x.to(wide)
    if gate is not None and not norm_before_gate:
        out = out * gate
    groups = out.unflatten(-1, (-1, size))
    norm = F.rms_norm if is_rms_norm else F.layer_norm
    out = norm(groups, (size,), eps=eps).flatten(-2) * weight.to(wide)
    if bias is not None:
        out = out + bias.to(wide)
    if gate is not None and norm_before_gate:
        out = out * gate
    return out.to(x.dtype)
