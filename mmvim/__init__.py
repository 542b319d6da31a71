"""mmvim: Mamba vision backbones for OpenMMLab.

``mmvim.ops`` and ``mmvim.layers`` need only torch; ``mmvim.models`` needs mmengine.
"""

import importlib.util

from . import _names
from .version import __version__

__getattr__, __dir__, __all__ = _names.lazily(__name__)
__all__ += ['__version__', 'layers', 'models', 'ops']

if importlib.util.find_spec('mmengine') is not None:
    from . import compat, registry  # noqa: F401

    compat.install()
