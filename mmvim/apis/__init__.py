"""What people call: the model zoo, checkpoints and inference."""

import importlib

_EXPORTS = {
    'ModelInfo': 'model_zoo',
    'build_model': 'model_zoo',
    'get_model': 'model_zoo',
    'list_models': 'model_zoo',
    'load_config': 'model_zoo',
    'model_info': 'model_zoo',
    'LoadReport': 'checkpoints',
    'load_weights': 'checkpoints',
    'read_checkpoint': 'checkpoints',
}
__all__ = [
    'LoadReport',
    'ModelInfo',
    'build_model',
    'get_model',
    'list_models',
    'load_config',
    'load_weights',
    'model_info',
    'read_checkpoint',
]


def __getattr__(name: str) -> object:
    """Import what is used, so that ``import mmvim`` stays quick."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(f'{__name__}.{_EXPORTS[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
