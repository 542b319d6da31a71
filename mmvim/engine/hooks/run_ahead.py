"""Asynchronous iterations: a host that does not wait for the GPU in each one."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseDataPreprocessor
from mmengine.optim import OptimWrapperDict
from torch import Tensor

from mmvim.registry import HOOKS

# Unread values are fetched once there are so many of one name.
_MOST_PENDING = 1000


@HOOKS.register_module()
class RunAheadHook(Hook):
    """Let the host prepare the next iterations while the GPU still computes this one.

    mmengine waits for the GPU several times in an iteration: for the copy of the batch, for the
    norm of the gradients, and for each loss, to record it. With this hook batches are copied
    asynchronously (which requires ``pin_memory``), and losses and norms are fetched when they are
    read: by the logger at its interval, a checkpoint, a hook. Their values do not change, nor do
    checkpoints.

    At the end of an iteration the host waits for the one ``ahead`` iterations earlier, so that
    times in the log are those of the GPU and few batches are in flight.

    ``tools/train.py`` adds this hook; other launchers get it from
    ``custom_hooks=[dict(type='mmvim.RunAheadHook')]``.

    Args:
        ahead (int): Number of iterations the host may be ahead, at least 1. Defaults to 2.

    Raises:
        ValueError: If ``ahead`` is not positive.
    """

    # Before the hooks that record losses.
    priority = 'VERY_HIGH'

    def __init__(self, ahead: int = 2) -> None:
        if isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1:
            raise ValueError(f'RunAheadHook: ahead must be at least 1, not {ahead!r}')
        self.ahead = ahead
        self._ends: deque[torch.cuda.Event] = deque()

    def before_train(self, runner: Any) -> None:
        """Defer the operations that would wait."""
        hub = runner.message_hub
        if type(hub) is MessageHub:
            # Other objects already hold this instance.
            hub.__class__ = _DeferredMessageHub
        for module in runner.model.modules():
            if isinstance(module, BaseDataPreprocessor):
                module._non_blocking = True
        wrapper = runner.optim_wrapper
        for part in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
            if getattr(part, 'clip_func', None) is not None:
                part.clip_func = _deferred_norm(part.clip_func, hub, f'train/{part.grad_name}')

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Wait for the iteration ``ahead`` iterations earlier."""
        if not torch.cuda.is_available():
            return
        end = torch.cuda.Event()
        end.record()
        self._ends.append(end)
        if len(self._ends) > self.ahead:
            self._ends.popleft().synchronize()


def _deferred_norm(clip: Callable, hub: MessageHub, name: str) -> Callable:
    """Make a clipping function record the norm itself, for which its caller would wait."""
    if hasattr(clip, 'deferred'):
        return clip

    def clip_func(parameters: Any, **kwargs: Any) -> None:
        norm = clip(parameters, **kwargs)
        if norm is not None:
            hub.update_scalar(name, norm)

    clip_func.deferred = clip
    return clip_func


class _DeferredMessageHub(MessageHub):
    """A message hub that fetches values from a GPU when they are read."""

    def update_scalar(self, key: str, value: Any, count: int = 1, resumed: bool = True) -> None:
        """Record a value, as :meth:`mmengine.logging.MessageHub.update_scalar` does."""
        history = self._log_scalars.get(key)
        if history is not None and type(history) not in (HistoryBuffer, _DeferredHistory):
            super().update_scalar(key, value, count, resumed)
            return
        self._set_resumed_keys(key, resumed)
        if not isinstance(count, int):
            raise TypeError(f'count of {key!r} must be int, not {type(count).__name__}')
        if isinstance(value, Tensor) and value.is_cuda and value.numel() == 1:
            # A tensor that is not the result of a computation may be changed in place by its owner.
            value = value.detach() if value.requires_grad else value.clone()
        else:
            value = self._get_valid_value(value)
        if type(history) is not _DeferredHistory:
            history = self._log_scalars[key] = _DeferredHistory(history)
        history.update(value, count)


class _DeferredHistory(HistoryBuffer):
    """A history whose last values may still be on a GPU; copies and files are mmengine's.

    It grows by many values at once, where mmengine copies the whole history for each.
    """

    def __init__(self, history: HistoryBuffer | None = None) -> None:
        self._pending: list[tuple[Any, int]] = []
        if history is None:
            super().__init__()
        else:
            super().__init__(*history.data, history.max_length)

    def update(self, log_val: Any, count: int = 1) -> None:
        """Append a number, or a tensor with one element."""
        self._pending.append((log_val, count))
        if len(self._pending) >= _MOST_PENDING:
            self._fetch()

    def current(self) -> Any:
        """Return the last value."""
        if self._pending and not isinstance(self._pending[-1][0], Tensor):
            return self._pending[-1][0]
        return super().current()

    @property
    def _log_history(self) -> np.ndarray:
        self._fetch()
        return self._values

    @_log_history.setter
    def _log_history(self, values: np.ndarray) -> None:
        self._values = values

    @property
    def _count_history(self) -> np.ndarray:
        self._fetch()
        return self._counts

    @_count_history.setter
    def _count_history(self, counts: np.ndarray) -> None:
        self._counts = counts

    def _fetch(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        values = _numbers([value for value, _ in pending])
        self._values = np.append(self._values, values)[-self.max_length :]
        self._counts = np.append(self._counts, [c for _, c in pending])[-self.max_length :]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return HistoryBuffer, (*self.data, self.max_length)


def _numbers(values: list[Any]) -> list[float]:
    """Fetch the tensors among ``values``, those of one kind together."""
    kinds: dict[tuple, list[int]] = {}
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            kinds.setdefault((value.device, value.dtype), []).append(i)
    values = list(values)
    for places in kinds.values():
        fetched = torch.stack([values[i].reshape(()) for i in places]).tolist()
        for i, number in zip(places, fetched, strict=True):
            values[i] = number
    return values
