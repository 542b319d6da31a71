"""Mixed precision on a CPU."""

from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from torch import nn

from mmvim.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """An optimizer wrapper that computes the loss under CPU autocast to bfloat16.

    mmengine's ``AmpOptimWrapper`` refuses to work without an accelerator. bfloat16 has the exponent
    range of float32, so that no loss scaling is needed. The launcher uses this wrapper for
    ``--amp`` where there is no GPU. Arguments are those of ``OptimWrapper``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Enter autocast, and what ``OptimWrapper`` needs for gradient accumulation."""
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield
