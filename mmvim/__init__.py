"""mmvim: Mamba vision backbones for OpenMMLab.

``mmvim.ops`` and ``mmvim.layers`` need torch alone; ``mmvim.models`` needs mmengine.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from . import layers, models, ops
    from .apis import get_model, list_models
    from .models import MambaVision, SimpleFPN, VideoMamba, Vim

_SUBMODULES = (
    'analysis',
    'apis',
    'compat',
    'datasets',
    'engine',
    'export',
    'layers',
    'models',
    'ops',
    'registry',
    'utils',
)
_MODELS = (
    'MambaVision',
    'SimpleFPN',
    'StreamingVideoMamba',
    'VideoMamba',
    'Vim',
    'VisionMamba',
    'build_videomamba',
)
_APIS = ('get_model', 'list_models')

__all__ = [
    'MambaVision',
    'SimpleFPN',
    'VideoMamba',
    'Vim',
    '__version__',
    'get_model',
    'layers',
    'list_models',
    'models',
    'ops',
]


def __getattr__(name: str) -> object:
    """Import submodules and models when they are first used: ``import mmvim`` stays quick."""
    if name in _SUBMODULES:
        return importlib.import_module(f'{__name__}.{name}')
    if name in _MODELS:
        return getattr(importlib.import_module(f'{__name__}.models'), name)
    if name in _APIS:
        return getattr(importlib.import_module(f'{__name__}.apis'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    """List the lazily imported names too."""
    return sorted({*globals(), *_SUBMODULES, *_MODELS, *_APIS})


if importlib.util.find_spec('mmengine') is not None:
    from .compat import install
    from .registry import register_plain_names

    install()
    register_plain_names()
    del install, register_plain_names
