"""Messages of the libraries that frighten for nothing.

Why: mmengine's own hooks and metrics warn of classes that they use themselves (``FileClient``), the
task libraries print messages of level DEBUG because ``print_log`` ignores the level where there is
no logger, mmdet says that "metrics will not be computed" where an optional, faster metric is
not installed that nobody asked for, mmseg that its hook for pictures, which is off, is off, and
that two classes might also have one output, and mmcv that it does not use what mmpretrain's colour
transforms always pass. In distributed runs every process repeats that mmengine has set the number
of threads, that it gives DDP an argument by its old name, and that the gradient of a single token
has other strides than its bucket, where they mean nothing.

How: ``print_log`` takes such messages for DEBUG, and heeds the level without a logger; warnings of
Python are filtered by their text.

Obsolete with: libraries without them.
"""

import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ._import_hook import replaces, when_imported

_MESSAGES = (
    'Could not import OneDL',
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    'The prefix is not set in metric class',
)
_WARNINGS = (
    'faster_coco_eval is not installed',
    'The draw is False, it means that the hook for visualization will not take effect',
    'Default ``avg_non_ignore`` is False',
    'For binary segmentation, we suggest using',
    "Only use 'alpha' for pillow backend",
    'The shape of value will convert from',
    'Setting (MKL|OMP)_NUM_THREADS environment variable',
    '`broadcast_buffers` is deprecated',
    'Grad strides do not match bucket view strides',
)


def install() -> None:
    """Act when ``mmengine.logging.logger`` is imported."""
    when_imported('mmengine.logging.logger', _patch)
    for message in _WARNINGS:
        warnings.filterwarnings('ignore', message=message)


def _patch(module: ModuleType) -> None:
    import logging

    given = module.print_log

    @replaces(module, 'print_log')
    def print_log(
        original: Callable, msg: Any, logger: Any = None, level: int = logging.INFO
    ) -> None:
        text = str(msg)
        # Collate functions are mmengine's, in whichever scope a config names them.
        if text.startswith(_MESSAGES) or 'in the "function" registry tree' in text:
            level = logging.DEBUG
        if logger is not None or level >= logging.INFO:
            original(msg, logger=logger, level=level)

    for importer in list(sys.modules.values()):
        if getattr(importer, '__dict__', {}).get('print_log') is given:
            importer.print_log = module.print_log
