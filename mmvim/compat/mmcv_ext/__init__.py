"""The functions of ``mmcv._ext`` that detection and segmentation models call.

Each has the signature that ``mmcv.ops`` calls: results are written into the output tensors that the
caller allocated. They run on every device of PyTorch and torchvision; half-precision input is
computed in float32 and rounded once.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

from . import bbox, deform_attention, deform_conv, focal_loss, info, nms, roi_align, roi_pool

_MODULES = (bbox, deform_attention, deform_conv, focal_loss, info, nms, roi_align, roi_pool)


def functions() -> dict[str, Callable]:
    """The supplied functions by their name in ``mmcv._ext``."""
    return {name: getattr(module, name) for module in _MODULES for name in module.__all__}


def populate(module: ModuleType) -> None:
    """Fill ``module`` with the supplied functions and make every other name raise when called."""
    module.__doc__ = __doc__
    vars(module).update(functions(), __getattr__=_missing)


def _missing(name: str) -> Callable[..., NoReturn]:
    if name.startswith('_'):
        raise AttributeError(f"module 'mmcv._ext' has no attribute {name!r}")

    def unsupported(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"mmcv op '{name}': the installed mmcv has no compiled ops, and mmvim's replacement on "
            'torchvision does not have this one. Install an mmcv with compiled ops: a binary wheel '
            "for your torch and CUDA, or from source with 'MMCV_WITH_OPS=1 pip install "
            "--no-build-isolation --no-cache-dir --no-deps --force-reinstall onedl-mmcv'"
        )

    unsupported.__name__ = unsupported.__qualname__ = name
    return unsupported
