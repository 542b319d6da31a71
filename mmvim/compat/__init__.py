"""Shims for third-party packages: one module each, with its reason and its expiry.

:func:`install` puts all of them in place. It imports none of the packages: a shim acts when its
package is imported, and only where it is needed.
"""

import importlib
from types import ModuleType

__all__ = ['install', 'require']

_SHIMS = (
    'mmcv_ops',
    'mmdet_bfloat16',
    'mmdet_voc_pool',
    'mmengine_checkpoints',
    'mmengine_configs',
    'mmengine_fsdp',
    'mmengine_hub',
    'mmengine_messages',
    'mmengine_packages',
    'mmpretrain_models',
    'mmpretrain_transformers',
    'pycocotools_masks',
    'pycocotools_results',
    'waiting_batches',
)
_INSTALL_COMMAND = "pip install 'mmvim[onedl]'"


def install() -> None:
    """Put every shim in place. Cheap, and harmless when called again."""
    for shim in _SHIMS:
        importlib.import_module(f'{__name__}.{shim}').install()


def require(module: str, purpose: str) -> ModuleType:
    """Import a task library, or say in one line what is missing, for what, and how to get it.

    Args:
        module: Import name, such as ``'mmdet'``.
        purpose: What needs it, as in "mmdet is needed for <purpose>".

    Raises:
        ImportError: The module, or something that it imports, is missing or fails to import.
    """
    install()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = getattr(error, 'name', None)
        if isinstance(error, ModuleNotFoundError) and missing == module.partition('.')[0]:
            reason = 'is not installed'
        else:
            reason = f'cannot be imported ({error})'
        raise ImportError(
            f'{module} is needed for {purpose} and {reason}. '
            f'Install the task libraries with: {_INSTALL_COMMAND}',
            name=missing,
        ) from error
