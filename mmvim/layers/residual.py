"""Blocks that add branches to their input, each with a norm of its own."""

import torch
from torch import Tensor

from mmvim.ops._autocast import autocast_dtype
from mmvim.ops.backend import is_intercepted
from mmvim.ops.branch import Body, branch
from mmvim.ops.layer_norm import layer_norm

from .drop import add_dropped, is_plain_drop_path
from .fusion import PLAIN_TENSORS, Fusable
from .norm import AutocastLayerNorm

# Devices on which branches may be one op.
DEVICES = ('cpu', 'cuda')


class ResidualBlock(Fusable):
    """Base of blocks of branches ``x + drop_path(gamma * body(norm(x)))``.

    A branch is one op where norm and body may be fused (see
    :class:`mmvim.layers.fusion.Fusable`). Compilers, dispatch modes and tensor subclasses meet the
    modules one by one.
    """

    def _add_branch(self, x: Tensor, norm: str, body: str, gamma: Tensor | None = None) -> Tensor:
        """Add the branch of the submodules of these names to ``x`` (batch, ..., channels)."""
        modules = self._modules
        before, inner, drop_path = modules[norm], modules[body], modules['drop_path']
        fused = self._fused_body(x, norm, body, gamma) if is_plain_drop_path(drop_path) else None
        if fused is None:
            normed, x = self._normed(x, norm)
            out = inner(normed)
            return add_dropped(drop_path, x, out if gamma is None else out * gamma)
        dtype = autocast_dtype(x) or x.dtype
        wide = dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)
        affine = before._parameters
        keep = drop_path.factors(x, wide)
        return branch(x, affine['weight'], affine['bias'], before.eps, fused, dtype, gamma, keep)

    def _normed(self, x: Tensor, norm: str) -> tuple[Tensor, Tensor]:
        """The result of a norm, and ``x`` for the residual connection around it."""
        module = self._modules[norm]
        if type(module) is AutocastLayerNorm and self._is_plain(norm) and not is_intercepted():
            own = module._parameters
            return layer_norm(x, own['weight'], own['bias'], module.eps, with_input=True)
        return module(x), x

    def _fused_body(self, x: Tensor, norm: str, body: str, gamma: Tensor | None) -> Body | None:
        modules = self._modules
        if (
            type(x) in PLAIN_TENSORS
            and x.device.type in DEVICES
            and type(gamma) in PLAIN_TENSORS
            and not torch.compiler.is_compiling()
            and not torch._C._len_torch_dispatch_stack()
            and self._is_plain(norm, body)
            and modules[norm]._parameters['bias'] is not None
            and modules[norm].normalized_shape == x.shape[-1:]
        ):
            return modules[body]._body(x)
        return None
