"""Residual addition and RMSNorm (Zhang and Sennrich, arXiv 1910.07467) in one op."""

import torch
from torch import Tensor

from . import _validation as check
from ._autocast import autocast_dtype, to_activation, to_parameter
from ._library import compute_dtype, define
from .backend import resolve


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual_in_fp32: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a residual and normalise: r = x + residual, out = r / sqrt(mean(r²) + eps) * weight.

    Arithmetic is in float32 (float64 for float64); the mean is over the last axis.

    Args:
        x: (..., d): float32, bfloat16, float16 or float64.
        weight: (d,), dtype of x, or float32 (float64 if x is float64).
        residual: Shape of x; dtype of x or float32. None adds nothing.
        eps: Added to the mean square, not negative.
        residual_in_fp32: Return r in float32 (float64 if x is float64), else in the dtype of
            residual if given, else of x.
        backend: See :func:`mmvim.ops.selective_scan`.

    Returns:
        out, in the dtype of x, and r, for the next addition; both have the shape of x.

    Raises:
        TypeError: For a wrong type or dtype.
        ValueError: For a wrong shape, device or eps.
        RuntimeError: If compiled kernels are demanded and there are none.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        (x,) = to_activation(dtype, x)
        (weight,) = to_parameter(dtype, weight)
        if isinstance(residual, Tensor) and residual.dtype != dtype:
            (residual,) = to_parameter(dtype, residual)
    check.check_tensor('x', x)
    check.check_activation('x', x, ' '.join('.' * x.dim()))
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f'x must have a last axis of at least 1, got shape {tuple(x.shape)}')
    why = f'x is {x.dtype}'
    check.check_tensor('weight', weight)
    check.check_shape('weight', weight, 'd', x.shape[-1:])
    check.check_dtype('weight', weight, x.dtype, compute_dtype(x.dtype), why=why)
    check.check_device('weight', weight, 'x', x.device)
    if residual is not None:
        check.check_tensor('residual', residual)
        check.check_shape('residual', residual, 'shape of x', x.shape)
        check.check_dtype('residual', residual, x.dtype, compute_dtype(x.dtype), why=why)
        check.check_device('residual', residual, 'x', x.device)
    check.check_number('eps', eps, least=0)
    check.check_flag('residual_in_fp32', residual_in_fp32)
    ops = resolve(backend, 'add_rms_norm', x)
    out, residual_out, _ = ops.add_rms_norm(x, residual, weight, float(eps), residual_in_fp32)
    return out, residual_out


def _residual_dtype(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    if residual_in_fp32:
        return compute_dtype(x.dtype)
    return x.dtype if residual is None else residual.dtype


def _forward(x, residual, weight, eps, residual_in_fp32):
    dtype = compute_dtype(x.dtype)
    total = torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
    if residual is not None:
        total.add_(residual)
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True).add_(eps))
    out = (total * rstd).mul_(weight)
    residual_out = total.to(_residual_dtype(x, residual, residual_in_fp32))
    return out.to(x.dtype), residual_out, rstd.squeeze(-1)


def _forward_fake(x, residual, weight, eps, residual_in_fp32):
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=_residual_dtype(x, residual, residual_in_fp32)),
        x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype)),
    )


def _backward(
    grad_out, grad_residual_out, residual_out, weight, rstd, has_residual, x_dtype, residual_dtype
):
    dtype = rstd.dtype
    scale = rstd.unsqueeze(-1)
    normed = residual_out.to(dtype) * scale
    grad = grad_out.to(dtype)
    dweight = (grad * normed).reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)
    grad = grad * weight
    mean = (grad * normed).mean(-1, keepdim=True)
    grad = grad.sub_(normed.mul_(mean)).mul_(scale)
    if grad_residual_out is not None:
        grad.add_(grad_residual_out)
    grad = grad.contiguous()
    dx = grad.to(x_dtype)
    if not has_residual:
        return dx, grad.new_empty(0), dweight
    return dx, grad.to(residual_dtype, copy=dx is grad), dweight


def _backward_fake(
    grad_out, grad_residual_out, residual_out, weight, rstd, has_residual, x_dtype, residual_dtype
):
    shape = residual_out.shape
    dresidual = (
        residual_out.new_empty(shape, dtype=residual_dtype) if has_residual else rstd.new_empty(0)
    )
    return residual_out.new_empty(shape, dtype=x_dtype), dresidual, weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    x, residual, weight, _, _ = inputs
    _, residual_out, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(residual_out, weight, rstd)
    ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)


def _autograd(ops, ctx, grad_out, grad_residual_out, _):
    if grad_out is None and grad_residual_out is None:
        return (None,) * 5
    residual_out, weight, rstd = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.dtypes
    if grad_out is None:
        grad_out = torch.zeros_like(residual_out, dtype=x_dtype)
    # Where both have the same dtype their gradients are equal, and one tensor suffices.
    separate = residual_dtype is not None and residual_dtype != x_dtype
    dx, dresidual, dweight = ops.add_rms_norm_backward(
        grad_out,
        grad_residual_out,
        residual_out,
        weight,
        rstd,
        separate,
        x_dtype,
        residual_dtype or x_dtype,
    )
    if residual_dtype is not None and not separate:
        dresidual = dx
    needed = ctx.needs_input_grad
    return (
        dx if needed[0] else None,
        dresidual if needed[1] else None,
        dweight if needed[2] else None,
        None,
        None,
    )


define(
    'add_rms_norm_backward(Tensor grad_out, Tensor? grad_residual_out, Tensor residual_out, '
    'Tensor weight, Tensor rstd, bool has_residual, ScalarType x_dtype, '
    'ScalarType residual_dtype) -> (Tensor dx, Tensor dresidual, Tensor dweight)',
    _backward,
    _backward_fake,
)
define(
    'add_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, bool residual_in_fp32) '
    '-> (Tensor out, Tensor residual_out, Tensor rstd)',
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
