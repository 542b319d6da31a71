"""What a model costs, how a training run went, and what a model looks at."""

import importlib

_EXPORTS = {
    'count': 'flops',
    'count_config': 'flops',
    'Run': 'curves',
    'draw_runs': 'curves',
    'read_run': 'curves',
    'class_activation_map': 'saliency',
    'effective_receptive_field': 'saliency',
    'Scan': 'scans',
    'hidden_attention': 'scans',
    'record_scans': 'scans',
    'state_norms': 'scans',
}
__all__ = [
    'Run',
    'Scan',
    'class_activation_map',
    'count',
    'count_config',
    'draw_runs',
    'effective_receptive_field',
    'hidden_attention',
    'read_run',
    'record_scans',
    'state_norms',
]


def __getattr__(name: str) -> object:
    """Import what is used: plots need matplotlib, counting does not."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(f'{__name__}.{_EXPORTS[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
