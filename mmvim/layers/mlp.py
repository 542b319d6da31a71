"""The two linear layers of a transformer block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvim._checks import check_flags, check_positive
from mmvim.ops._autocast import autocast_dtype
from mmvim.ops.branch import Body
from mmvim.ops.mixer import serves

from .fusion import Fusable, parts

# Whether a branch that wants no gradient makes the GELU in its first matrix product, of 16 bits on
# GPUs. cuBLAS has the tanh formula, which is off by at most 5e-4, but applies it to sums that are
# not rounded: the result is nearer to the exact one.
GELU_IN_PRODUCT = True


class Mlp(Fusable):
    """Two linear layers with a GELU between them.

    In training the GELU is recomputed in the backward pass instead of being kept, which saves about
    a quarter of a block's memory.

    Args:
        dim (int): Channels of input and output.
        hidden (int): Channels between the layers.
        recompute (bool, optional): Whether the first layer is recomputed, too. None means on GPUs.
            Defaults to False.
    """

    _fused_parts = parts(fc1=nn.Linear, act=nn.GELU, fc2=nn.Linear)

    def __init__(self, dim: int, hidden: int, recompute: bool | None = False) -> None:
        super().__init__()
        check_positive(dim=dim, hidden=hidden)
        if recompute is not None:
            check_flags(recompute=recompute)
        self.recompute = recompute
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., dim)."""
        if torch.is_grad_enabled() and self._may_fuse(x):
            tensors = x, *(p for m in (self.fc1, self.fc2) for p in (m.weight, m.bias))
            if any(t.requires_grad for t in tensors):
                again = x.is_cuda if self.recompute is None else self.recompute
                return _Mlp.apply(*tensors, again)
        return self.fc2(self.act(self.fc1(x)))

    def _body(self, x: Tensor) -> Body | None:
        if not self._may_fuse(x) or not serves(None, x):
            return None
        one, two = (self._modules[name]._parameters for name in ('fc1', 'fc2'))
        parameters = one['weight'], one['bias'], two['weight'], two['bias']
        return Body('mlp', parameters, recompute=self.recompute, gelu_in_product=GELU_IN_PRODUCT)

    def _is_plain(self, *names: str) -> bool:
        modules = self._modules
        return (
            super()._is_plain(*names)
            and modules['act'].approximate == 'none'
            and modules['fc1']._parameters['bias'] is not None
            and modules['fc2']._parameters['bias'] is not None
        )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, recompute):
        ctx.dtypes = [t.dtype for t in (x, weight1, bias1, weight2, bias2)]
        dtype = autocast_dtype(x) or x.dtype
        x, bias1, bias2 = (t.to(dtype) for t in (x, bias1, bias2))
        hidden = F.linear(x, weight1.to(dtype), bias1)
        ctx.save_for_backward(x, None if recompute else hidden, weight1, bias1, weight2)
        return F.linear(F.gelu(hidden), weight2.to(dtype), bias2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, hidden, weight1, bias1, weight2 = ctx.saved_tensors
        if hidden is None:
            hidden = F.linear(x, weight1.to(x.dtype), bias1)
        needed = ctx.needs_input_grad
        dy = dy.to(x.dtype)
        rows = _rows(dy)
        dweight1 = dbias1 = dweight2 = dbias2 = dx = None
        if needed[3]:
            dweight2 = rows.t() @ _rows(F.gelu(hidden))
        if needed[4]:
            dbias2 = rows.sum(0)
        dhidden = torch.ops.aten.gelu_backward(dy @ weight2.to(dy.dtype), hidden)
        rows = _rows(dhidden)
        if needed[1]:
            dweight1 = rows.t() @ _rows(x)
        if needed[2]:
            dbias1 = rows.sum(0)
        if needed[0]:
            dx = dhidden @ weight1.to(dy.dtype)
        grads = dx, dweight1, dbias1, dweight2, dbias2
        return *(
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ), None
