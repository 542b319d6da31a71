"""Averages of weights with few kernels per step."""

import weakref
from typing import Any

import torch
from mmengine.model import BaseTTAModel
from mmengine.model import ExponentialMovingAverage as MMEngineExponentialMovingAverage
from torch import nn

from mmvim.registry import MODELS


@MODELS.register_module()
class ExponentialMovingAverage(MMEngineExponentialMovingAverage):
    """mmengine's ``ExponentialMovingAverage``, updated by a few kernels for all tensors together.

    Arguments and state are mmengine's, and so are the numbers without warm-up. The launcher uses it
    wherever a config says ``ExponentialMovingAverage``, the default of ``EMAHook``. An average on a
    device other than the model's is updated tensor by tensor.

    An average of a model that is wrapped for test-time augmentation reads the state of one that is
    not.

    Args:
        model: The model to average.
        *args: Arguments of :class:`mmengine.model.ExponentialMovingAverage`.
        warmup: Whether update n has the momentum max(momentum, 9 / (10 + n)), as TensorFlow's
            ``ExponentialMovingAverage(num_updates=n)``, so that the weights from before training
            are soon forgotten. Defaults to None: :class:`mmvim.AverageWarmupHook`, which the
            launcher adds, decides by the length of the run; without it there is none.
        **kwargs: Further such arguments.
    """

    def __init__(
        self, model: nn.Module, *args: Any, warmup: bool | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, *args, **kwargs)
        self.warmup = warmup
        if isinstance(model, BaseTTAModel):
            self.register_load_state_dict_pre_hook(_wrap_keys)

    def avg_func(
        self, averaged_param: torch.Tensor, source_param: torch.Tensor, steps: int
    ) -> None:
        """Move an average towards the current value."""
        averaged_param.lerp_(source_param, self._momentum())

    def _momentum(self) -> float:
        """Momentum of the current update."""
        updates = int(self.steps) // self.interval
        return max(self.momentum, 9 / (10 + updates)) if self.warmup else self.momentum

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average with the current weights of ``model``."""
        if self.steps == 0 or type(self).avg_func is not ExponentialMovingAverage.avg_func:
            super().update_parameters(model)
            return
        averages, sources, copies, originals = self._pairs(model)
        if any(a.device != b.device for a, b in zip(averages, sources, strict=True)):
            super().update_parameters(model)
            return
        if averages and self.steps % self.interval == 0:
            torch._foreach_lerp_(averages, sources, self._momentum())
        if copies:
            torch._foreach_copy_(copies, originals)
        self.steps += 1

    def _pairs(self, model: nn.Module) -> tuple[list, list, list, list]:
        """Return what is averaged and copied, each with the tensors of ``model`` for it."""
        # Walking through the modules takes longer than averaging: like an optimizer, this keeps
        # the parameters and modules that the model has at first. Buffers may be replaced.
        source, averages, sources, *places = _FOUND.get(self, (lambda: None, [], [], [], []))
        if source() is not model or self.update_buffers:
            new = model.state_dict() if self.update_buffers else dict(model.named_parameters())
            names = [name for name, x in self.avg_parameters.items() if x.dtype.is_floating_point]
            averages, sources = [self.avg_parameters[n] for n in names], [new[n] for n in names]
            places = [_buffers(m) if not self.update_buffers else [] for m in (self.module, model)]
            _FOUND[self] = (weakref.ref(model), averages, sources, *places)
        copies, originals = ([b for d in part for b in d.values()] for part in places)
        pairs = [p for p in zip(copies, originals, strict=True) if p[0] is not None]
        return averages, sources, [a for a, _ in pairs], [b for _, b in pairs]


def _buffers(model: nn.Module) -> list[dict]:
    return [module._buffers for module in model.modules() if module._buffers]


# Not in the modules themselves, so that copies of an average look for themselves.
_FOUND: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _wrap_keys(average: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    for key in list(state):
        if key.startswith('module.') and not key.startswith('module.module.'):
            state[f'module.{key}'] = state.pop(key)
