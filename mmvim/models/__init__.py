"""Models, registered in :data:`mmvim.registry.MODELS`."""

from mmvim import _names
from mmvim.registry import MODELS  # noqa: F401

__getattr__, __dir__, __all__ = _names.lazily(__name__)
