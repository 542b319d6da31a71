"""The public names of mmvim and the modules that define them.

``mmvim.<name>``, the packages under :mod:`mmvim.models`, ``type='mmvim.<name>'`` and the plain
names of configs all read these tables, and import a module when its name is first used. A new
model needs a file and a row here.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType

# Models that need only mmengine.
MODELS = {
    'MambaVision': 'mmvim.models.backbones.mambavision',
    'VMamba': 'mmvim.models.backbones.vmamba',
    'VideoMamba': 'mmvim.models.backbones.videomamba',
    'Vim': 'mmvim.models.backbones.vim',
    'VisionMamba': 'mmvim.models.backbones.vim',
    'SimpleFPN': 'mmvim.models.necks.simple_fpn',
    'StreamingVideoMamba': 'mmvim.models.streaming.model',
    'VideoDataPreprocessor': 'mmvim.models.video.data_preprocessor',
}
# Models derived from mmpretrain's: ``import *`` omits them.
CLASSIFIERS = {
    'MesaClassifier': 'mmvim.models.classifiers.mesa',
    'SelfDistillClassifier': 'mmvim.models.classifiers.self_distill',
    'VideoClassifier': 'mmvim.models.video.classifier',
}
# Names that no config uses.
OTHERS = {
    'GraphedStream': 'mmvim.models.streaming.graph',
    'build_videomamba': 'mmvim.models.streaming.encoder',
    'get_model': 'mmvim.apis.model_zoo',
    'list_models': 'mmvim.apis.model_zoo',
}
NAMES = {**MODELS, **CLASSIFIERS, **OTHERS}
# Parts of other libraries' models, which configs may name without a scope.
PLAIN_NAMES = tuple(
    name for name, module in MODELS.items() if module.split('.')[2] in ('backbones', 'necks')
)


def load(name: str, table: Mapping[str, str] = NAMES) -> object:
    """Import the object that a table calls ``name``."""
    return getattr(importlib.import_module(table[name]), name)


def lazily(
    package: str, others: Mapping[str, str] = MappingProxyType({})
) -> tuple[Callable, Callable, list[str]]:
    """Make ``__getattr__``, ``__dir__`` and ``__all__`` of a package that imports lazily.

    Args:
        package: The ``__name__`` of the package, whose public submodules are also attributes.
        others: The defining module of each name that is not in :data:`NAMES`.
    """
    own = {n: m for n, m in NAMES.items() if m.startswith(f'{package}.')} | dict(others)

    def get(name: str) -> object:
        if name in own:
            return load(name, own)
        if not name.startswith('_') and importlib.util.find_spec(f'{package}.{name}'):
            return importlib.import_module(f'{package}.{name}')
        raise AttributeError(f'module {package!r} has no attribute {name!r}')

    def names() -> list[str]:
        import pkgutil

        known = vars(sys.modules[package])
        submodules = {module.name for module in pkgutil.iter_modules(known['__path__'])}
        return sorted({*known, *own, *(name for name in submodules if not name.startswith('_'))})

    return get, names, [name for name in own if name not in CLASSIFIERS]
