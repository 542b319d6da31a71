"""What people call: the model zoo, checkpoints and inference."""

from mmvim import _names

_NAMES = {
    'LoadReport': 'mmvim.apis.checkpoints',
    'load_weights': 'mmvim.apis.checkpoints',
    'read_checkpoint': 'mmvim.apis.checkpoints',
    'ModelInfo': 'mmvim.apis.model_zoo',
    'build_model': 'mmvim.apis.model_zoo',
    'load_config': 'mmvim.apis.model_zoo',
    'model_info': 'mmvim.apis.model_zoo',
}
__getattr__, __dir__, __all__ = _names.lazily(__name__, {**_names.NAMES, **_NAMES})
