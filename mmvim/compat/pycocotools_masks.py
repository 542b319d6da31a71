"""Errors, instead of crashes of the interpreter, for damaged segmentations in COCO files.

Why: pycocotools draws polygons and expands run lengths in C without checking them. Coordinates
that are infinite or enormous, and runs that do not add up to the picture, end the process with a
segmentation fault or leave uninitialised memory in the mask.

How: ``pycocotools.mask.frPyObjects`` and ``decode``, through which mmdet and COCO's own evaluation
make every mask, check their input first.

Obsolete with: a pycocotools that checks its input.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ._import_hook import replaces, when_imported

# pycocotools scales polygons up by five and counts the pixels of their outline in 32 bits.
_FARTHEST = 2**20
_MOST_PIXELS = 2**30


def install() -> None:
    """Act when pycocotools is imported."""
    when_imported('pycocotools.mask', _patch)


def _patch(mask: ModuleType) -> None:
    @replaces(mask, 'frPyObjects')
    def encode(original: Callable, pyobj: Any, h: Any, w: Any) -> Any:
        _check_size([h, w])
        _check_objects(pyobj)
        return original(pyobj, h, w)

    @replaces(mask, 'decode')
    def decode(original: Callable, rleObjs: Any) -> Any:
        for rle in rleObjs if isinstance(rleObjs, list) else [rleObjs]:
            _check_size(rle.get('size') if isinstance(rle, dict) else None)
        return original(rleObjs)


def _check_size(size: Any) -> None:
    if isinstance(size, list | tuple) and len(size) == 2:
        integers = [int(x) for x in size if isinstance(x, int) or hasattr(x, '__index__')]
        if len(integers) == 2 and min(integers) >= 0 and math.prod(integers) <= _MOST_PIXELS:
            return
    raise ValueError(f'segmentation: the size of a mask must be [height, width], got {size!r}')


def _check_objects(objects: Any) -> None:
    if isinstance(objects, dict):
        _check_runs(objects)
    elif isinstance(objects, list) and objects and isinstance(objects[0], int | float):
        _check_numbers(objects)  # one polygon or box
    elif isinstance(objects, list):
        for item in objects:
            if isinstance(item, dict):
                _check_runs(item)
            elif hasattr(item, '__len__'):
                _check_numbers(item)


def _check_runs(rle: dict) -> None:
    _check_size(rle.get('size'))
    counts = rle.get('counts')
    if not isinstance(counts, list):
        return
    wrong = [n for n in counts if isinstance(n, bool) or not isinstance(n, int) or n < 0]
    if wrong:
        raise ValueError(f'segmentation: a run length must be 0 or more, got {wrong[0]!r}')
    height, width = rle['size']
    if sum(counts) != height * width:
        raise ValueError(
            f'segmentation: the run lengths of a mask of {height} x {width} pixels add up to '
            f'{sum(counts)}'
        )


def _check_numbers(polygon: Any) -> None:
    for value in polygon:
        try:
            fits = abs(float(value)) <= _FARTHEST
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise ValueError(
                f'segmentation: a coordinate must be a number up to {_FARTHEST}, got {value!r}'
            )
