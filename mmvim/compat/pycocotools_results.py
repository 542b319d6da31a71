"""An average precision of 0 for a detector that detects nothing, and no lines on reading a file.

Why: pycocotools' ``COCO.loadRes`` fails for an empty list, and mmdet's ``CocoMetric`` then reports
no metric at all. Whatever waits for one (``save_best``, ``ReduceOnPlateauLR``) ends the run,
although the detector of a first epoch often detects nothing.

It also prints four lines for each file that it reads, before the summary of a run.

How: ``loadRes`` takes an empty list as results without boxes; ``print`` does nothing in
``pycocotools.coco``.

Obsolete with: a pycocotools whose ``loadRes`` takes an empty list.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from ._import_hook import replaces, when_imported


def install() -> None:
    """Act when pycocotools is imported."""
    when_imported('pycocotools.coco', _load_nothing)


def _load_nothing(module: ModuleType) -> None:
    @replaces(module.COCO, 'loadRes')
    def load_res(original: Callable, self: Any, results: Any) -> Any:
        if not isinstance(results, list) or results:
            return original(self, results)
        loaded = type(self)()
        shared = {key: self.dataset[key] for key in ('images', 'categories') if key in self.dataset}
        loaded.dataset = {**shared, 'annotations': []}
        loaded.createIndex()
        return loaded

    module.print = lambda *args, **kwargs: None
