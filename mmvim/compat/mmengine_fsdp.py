"""Resuming with mmengine's ``FSDPStrategy``.

Why: mmengine 0.10 calls ``FullyShardedDataParallel.optim_state_dict_to_load(state, model, optim)``.
Since torch 2.1 the order is ``(model, optim, state)``, so resuming, and building the optimizer
before the model is sharded, fail with "unhashable type: 'dict'".

How: the name ``FSDP`` in mmengine's module becomes a class with the former argument order.

Obsolete with: an mmengine that uses the current order.
"""

from types import ModuleType
from typing import Any

from ._import_hook import when_imported


def install() -> None:
    """Act when ``mmengine._strategy.fsdp`` is imported."""
    when_imported('mmengine._strategy.fsdp', _patch)


def _patch(module: ModuleType) -> None:
    sharded = getattr(module, 'FSDP', None)
    if sharded is None or getattr(sharded, 'takes_any_order', False):
        return

    class FSDP(sharded):
        takes_any_order = True

        @staticmethod
        def optim_state_dict_to_load(*args: Any, **kwargs: Any) -> dict:
            if args and isinstance(args[0], dict):
                names = ('optim_state_dict', 'model', 'optim')
                kwargs.update(zip(names, args, strict=False))
                args = ()
            return sharded.optim_state_dict_to_load(*args, **kwargs)

    module.FSDP = FSDP
