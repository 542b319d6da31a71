"""Interfaces for users: the model zoo and inference."""

from mmvim import _names

_NAMES = {
    'LoadReport': 'mmvim.checkpoints.loading',
    'compare_weights': 'mmvim.checkpoints.loading',
    'load_weights': 'mmvim.checkpoints.loading',
    'read_checkpoint': 'mmvim.checkpoints.files',
    'ModelInfo': 'mmvim.apis.model_zoo',
    'build_model': 'mmvim.apis.model_zoo',
    'load_config': 'mmvim.apis.model_zoo',
    'model_info': 'mmvim.apis.model_zoo',
}
__getattr__, __dir__, __all__ = _names.lazily(__name__, _NAMES)
