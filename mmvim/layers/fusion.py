"""Modules with a fused path that bypasses their submodules."""

import itertools
import operator
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mmvim.ops.backend import is_exporting, is_intercepted
from mmvim.ops.branch import Body

_CALL = nn.Module.__call__
PLAIN_TENSORS = (nn.Parameter, Tensor, type(None))

Parts = dict[str, tuple[type[nn.Module], Callable]]


def parts(**kinds: type[nn.Module]) -> Parts:
    """The submodules that a fused function replaces: their classes, and the forward of each."""
    return {name: (kind, kind.forward) for name, kind in kinds.items()}


def calls_are_watched() -> bool:
    """Whether a call of any module means more than its forward pass."""
    return _has_any_global_hook() or nn.Module.__call__ is not _CALL


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module itself means more than its forward pass."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
        or type(module).__call__ is not _CALL
    )


class Snapshot:
    """The state of modules at one time, and whether it is still theirs.

    It is whatever their attributes hold: options, modes, a ``forward`` of their own, and which
    tensors and submodules they have, but not the values of tensors. Modules with hooks have none.
    A comparison takes a tenth of the time that looking at everything takes.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = tuple(modules)
        kinds = {type(module) for module in self._modules}
        self._forwards = [(kind, kind.forward) for kind in kinds]
        self._attributes = [vars(module) for module in self._modules]
        self._before = [dict(attributes) for attributes in self._attributes]
        self._hooks = [
            hooks
            for module in self._modules
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        ]
        self._parts = [
            parts for module in self._modules for parts in (module._parameters, module._modules)
        ]
        self._parts_before = self._now()
        tensors = (t for module in self._modules for t in module._parameters.values())
        self._members = (*self._modules, *tensors)
        self._kinds = list(map(type, self._members))

    def _now(self) -> list[Tensor | nn.Module | None]:
        return list(itertools.chain.from_iterable(map(dict.values, self._parts)))

    def holds(self) -> bool:
        """Whether nothing has changed."""
        now, before = self._now(), self._parts_before
        return (
            len(now) == len(before)
            and all(map(operator.is_, now, before))
            and self._same_attributes()
            and not any(self._hooks)
            and list(map(type, self._members)) == self._kinds
            and all(
                kind.forward is forward and kind.__call__ is _CALL
                for kind, forward in self._forwards
            )
        )

    def _same_attributes(self) -> bool:
        try:
            return self._attributes == self._before
        except Exception:
            # Equality of others, such as tensors, is no bool; what is the same is not compared.
            return False


class Fusable(nn.Module):
    """Base of modules with a fused path.

    A fused function reads the parameters of submodules and does not call them, so anything attached
    to or wrapped around them would be lost: hooks, including global ones, another ``forward``,
    adapters, quantisers, sharding, pruning, tensor subclasses. In these cases, where ops are
    intercepted, and for tracers and exporters, which need the names of modules, submodules are
    called one by one.

    Attributes:
        fused (bool): Whether the fused path may be taken; False always calls the submodules.
            Defaults to True.
    """

    fused: bool = True
    _fused_parts: Parts = {}  # noqa: RUF012

    def _may_fuse(self, x: Tensor) -> bool:
        """Whether a fused function of ops may replace the submodules."""
        if is_intercepted() or torch.jit.is_tracing() or is_exporting():
            return False
        # Without a gradient a compiler fuses more than the function does.
        if torch.compiler.is_compiling() and not self._wants_gradient(x):
            return False
        return self._is_plain()

    def _is_plain(self, *names: str) -> bool:
        """Whether reading submodules (by default all) instead of calling them loses nothing.

        Subclasses add the options of submodules that their fused function takes for granted.
        """
        if not self.fused or calls_are_watched():
            return False
        # A loop over dictionaries: this runs in every layer and step, and attributes of modules
        # are slow.
        for name in names or self._fused_parts:
            module, (kind, forward) = self._modules.get(name), self._fused_parts[name]
            if type(module) is not kind or kind.forward is not forward or is_hooked(module):
                return False
            own = module.__dict__
            if 'forward' in own or 'weight' in own or 'bias' in own:
                return False
            for parameter in module._parameters.values():
                if type(parameter) not in PLAIN_TENSORS:
                    return False
        return True

    def _body(self, x: Tensor) -> Body | None:
        """The module as the body of a residual branch that is one op; None if it cannot be."""
        return None

    def _wants_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
