"""What a model costs and how a training run went."""

import importlib

_EXPORTS = {
    'count': 'flops',
    'count_config': 'flops',
    'Run': 'curves',
    'draw_runs': 'curves',
    'read_run': 'curves',
}
__all__ = ['Run', 'count', 'count_config', 'draw_runs', 'read_run']


def __getattr__(name: str) -> object:
    """Import what is used: plots need matplotlib, counting does not."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(f'{__name__}.{_EXPORTS[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
