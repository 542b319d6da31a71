"""Layer norm without conversions around it (Ba et al., https://arxiv.org/abs/1607.06450).

Autocast runs torch's layer norm in float32, with a float32 result that the next layer converts. On
CUDA the kernels here read what there is, compute in float32 and round once; elsewhere, and under
compilers and exporters, which fuse the conversion, torch's layer norm is called.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import extension
from ._autocast import autocast_dtype
from ._library import define_compiled
from .backend import get_backend, is_exporting

_MOST_COLUMNS = 1024


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    keep_float32: bool = False,
    with_input: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dimension.

    Args:
        x: (..., d).
        weight: Scale (d,).
        bias: Shift (d,).
        eps: Added to the variance.
        keep_float32: Whether the result under autocast is as torch's, on a GPU float32.
        with_input: Whether to return x as well, for a residual connection around the norm. The
            backward pass then adds the connection's gradient where it makes that of the norm.

    Returns:
        (..., d); under autocast in its dtype or float32, otherwise as
        ``torch.nn.functional.layer_norm``. With ``with_input`` a tuple of this and ``x``.
    """
    dtype = autocast_dtype(x)
    if dtype is not None and _is_covered(x, weight, bias, dtype):
        wanted = torch.float32 if keep_float32 else dtype
        return _LayerNorm.apply(x, weight, bias, eps, wanted, with_input)
    out = F.layer_norm(x, weight.shape, weight, bias, eps)
    if dtype is not None and not keep_float32:
        out = out.to(dtype)
    return (out, x) if with_input else out


def _is_covered(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    return (
        x.is_cuda
        and bias is not None
        and dtype in (torch.bfloat16, torch.float16)
        and x.dtype in (torch.float32, dtype)
        and weight.dtype == bias.dtype == torch.float32
        and x.shape[-1] % 4 == 0
        and x.shape[-1] <= _MOST_COLUMNS
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_exporting())
        and get_backend() != 'torch'
        and extension.supports('layer_norm', 'cuda', dtype)
    )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype, with_input):
        keep = any(ctx.needs_input_grad[:3])
        out, statistics = torch.ops.mmvim.layer_norm(x, weight, bias, eps, dtype, keep)
        ctx.save_for_backward(x, weight, statistics)
        ctx.set_materialize_grads(False)
        return (out, x) if with_input else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_input=None):
        x, weight, statistics = ctx.saved_tensors
        if grad is None:
            return grad_input, None, None, None, None, None
        grads = torch.ops.mmvim.layer_norm_backward(grad, x, weight, statistics, grad_input)
        return *grads, None, None, None


def _fake(x, weight, bias, eps, dtype, keep_statistics):
    rows = x.numel() // x.shape[-1] if keep_statistics else 0
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((rows, 2), dtype=torch.float32)


def _backward_fake(grad, x, weight, statistics, grad_input):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


define_compiled(
    'layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype, '
    'bool keep_statistics) -> (Tensor out, Tensor statistics)',
    _fake,
)
define_compiled(
    'layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor statistics, '
    'Tensor? grad_input) -> (Tensor dx, Tensor dweight, Tensor dbias)',
    _backward_fake,
)
