"""Modules with a fused path that bypasses their submodules."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mmvim.ops.backend import is_exporting, is_intercepted

_CALL = nn.Module.__call__
_PLAIN_TENSORS = (nn.Parameter, Tensor, type(None))

Parts = tuple[tuple[str, type[nn.Module], Callable], ...]


def parts(**kinds: type[nn.Module]) -> Parts:
    """The submodules that a fused function replaces: name, class and the forward of the class."""
    return tuple((name, kind, kind.forward) for name, kind in kinds.items())


class Fusable(nn.Module):
    """Base of modules with a fused path.

    A fused function reads the parameters of submodules and does not call them, so whatever is put
    on or around one would be lost: hooks, also global ones, another ``forward``, adapters,
    quantisers, sharding, pruning, tensors that are more than tensors. Where there is any, where
    ops are intercepted, and for tracers and exporters, which want the names of modules, submodules
    are called one by one.

    Attributes:
        fused (bool): Whether the fused path may be taken; False always calls the submodules.
            Defaults to True.
    """

    fused: bool = True
    _fused_parts: Parts = ()

    def _may_fuse(self, x: Tensor) -> bool:
        """Whether a fused function of ops may run instead of the submodules."""
        if is_intercepted() or torch.jit.is_tracing() or is_exporting():
            return False
        # Without a gradient a compiler fuses more than the function does.
        if torch.compiler.is_compiling() and not self._wants_gradient(x):
            return False
        return self._is_plain()

    def _is_plain(self) -> bool:
        """Whether reading the submodules instead of calling them loses nothing."""
        if not self.fused or _has_any_global_hook() or nn.Module.__call__ is not _CALL:
            return False
        modules = self._modules
        return all(_is_plain(modules.get(name), *kind) for name, *kind in self._fused_parts)

    def _wants_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )


def _is_plain(module: nn.Module | None, kind: type[nn.Module], forward: Callable) -> bool:
    """Whether a module does what its class does and nothing else."""
    return (
        type(module) is kind
        and getattr(module.forward, '__func__', None) is forward
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
        and all(type(p) in _PLAIN_TENSORS for p in module._parameters.values())
    )
