"""Average precisions of VOCMetric without new processes.

Why: mmdet's ``eval_map`` forks for each evaluation. By then a training has threads, of data
loaders, progress bars and collectives; a child in which one of them held a lock may wait for ever,
and the training with it.

How: ``Pool`` of its module is a pool of threads.

Obsolete with: an ``eval_map`` that does not fork.
"""

from types import ModuleType

from ._import_hook import when_imported


def install() -> None:
    """Act when mmdet's average precision is imported."""
    when_imported('mmdet.evaluation.functional.mean_ap', _use_threads)


def _use_threads(module: ModuleType) -> None:
    from multiprocessing.pool import ThreadPool

    module.Pool = ThreadPool
