"""Two faults of earlier code, to show what they do to a ranking of methods.

The CUDA kernels that accompany the VisionMambaUpgrades documents trained each method with the
gradients of `zoh`, and their `zoh` scaled A by log2(e) twice in the forward pass and once in the
backward pass. :class:`EarlierCode` brings one of them back for a run; nothing in mmvim imports it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor

from mmvim.ops import intercept_ops

FAULTS = ('zoh-gradients', 'scaled-twice')


@HOOKS.register_module()
class EarlierCode(Hook):
    """A run whose scans have one of the faults, in training and validation.

    Args:
        fault (str): 'zoh-gradients' (the forward pass of the model's method, the gradients of zoh)
            or 'scaled-twice' (the forward pass with 1.4427 A, the gradients at A).
    """

    def __init__(self, fault: str) -> None:
        if fault not in FAULTS:
            raise ValueError(f'fault must be one of {FAULTS}, got {fault!r}')
        scan = faulty_scan(fault)
        self._scope = intercept_ops(selective_scan=scan, bidirectional_scan=scan)

    def before_run(self, runner) -> None:
        """Put the faulty scan in the place of the right one."""
        self._scope.__enter__()

    def after_run(self, runner) -> None:
        """Take it away again."""
        self._scope.__exit__(None, None, None)


def faulty_scan(fault: str) -> Callable[..., Any]:
    """A function for :func:`mmvim.ops.intercept_ops` with one of :data:`FAULTS`."""

    def scan(op: Callable, *args: Any) -> Any:
        names = [argument.name for argument in op.default._schema.arguments]
        right = dict(zip(names, args, strict=True))
        shown, differentiated = dict(right), dict(right)
        if fault == 'zoh-gradients':
            differentiated['discretization'] = 'zoh'
        else:
            for name in ('A', 'A_f', 'A_b'):
                if name in shown:
                    shown[name] = shown[name] * math.log2(math.e)
        out, *others = op(*differentiated.values())
        with torch.no_grad():
            value, *_ = op(*shown.values())
        return with_gradients_of(value, out), *others

    return scan


def with_gradients_of(value: Tensor, other: Tensor) -> Tensor:
    """The value of one tensor with the gradients of another of its shape."""
    # In float32, so that the sum rounds back to the value.
    shift = value.float() - other.detach().float()
    return (other.float() + shift).to(value.dtype)
