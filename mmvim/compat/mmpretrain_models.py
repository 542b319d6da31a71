"""The classifiers of mmvim in ``mmpretrain.get_model`` and ``mmpretrain.list_models``.

Why: mmpretrain knows only the models of its own model index.

How: when mmpretrain registers its own models, at the first look-up, those of mmvim are added.
Names that are already taken are left alone.

Obsolete with: nothing; this is mmpretrain's own way of registering models, at the right moment.
"""

from collections.abc import Callable
from types import ModuleType

from ._import_hook import replaces, when_imported
from .mmengine_configs import root

#: Training data of models that are not classifiers.
_OTHERS = ('COCO', 'ADE20K')


def install() -> None:
    """Act when mmpretrain's model hub is imported."""
    when_imported('mmpretrain.apis.model', _patch)


def _patch(module: ModuleType) -> None:
    @replaces(module.ModelHub, '_register_mmpretrain_models')
    def register(original: Callable, cls: type) -> None:
        original(cls)
        if not getattr(cls, '_has_mmvim_models', False):
            cls._has_mmvim_models = True
            _add_models(cls)


def _add_models(hub: type) -> None:
    from modelindex.load_model_index import load

    try:
        base = root()
    except FileNotFoundError:
        return  # built without configs
    index = load(str(base / 'model-index.yml'))
    index.build_models_with_collections()
    for model in index.models:
        data = model.metadata.training_data if model.metadata else None
        if data in _OTHERS or model.name.lower() in hub._models_dict:
            continue
        model.config = str(base / model.config)
        hub._models_dict[model.name.lower()] = model
