"""Training that continues, if the config says so, when some images cannot be read."""

import logging
import multiprocessing
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log

from mmvim.registry import DATASETS


@DATASETS.register_module()
class SkipFailures:
    """A data set that replaces samples that cannot be loaded.

    Without it, a file that is missing or damaged ends the run with an error that names it. With it,
    each failure is logged with its file and the number of failures so far, in all workers; more
    than ``max_failures`` still end the run. The replacement is chosen at random; where samples have
    seeds, as in resumable training, it is always the same.

    For training only: a test that omits samples reports wrong metrics.

    Args:
        dataset (dict | BaseDataset): The data set.
        max_failures (int): Number of failures allowed in a run, counting every attempt to load a
            sample. Defaults to 100.

    Raises:
        ValueError: If ``max_failures`` is not positive.

    Example:
        >>> train_dataloader = dict(dataset=dict(
        ...     type='mmvim.SkipFailures', max_failures=20,
        ...     dataset=dict(type='ImageNet', data_root='data/imagenet', pipeline=train_pipeline)))
    """

    def __init__(self, dataset: dict | BaseDataset, max_failures: int = 100) -> None:
        if not isinstance(max_failures, int) or max_failures < 1:
            raise ValueError(f'SkipFailures: max_failures must be at least 1, not {max_failures!r}')
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.max_failures = max_failures
        self._count = multiprocessing.Value('q', 0)

    @property
    def failures(self) -> int:
        """Number of samples that could not be loaded so far, in all workers."""
        return self._count.value

    @property
    def metainfo(self) -> dict:
        """The meta information of the data set."""
        return self.dataset.metainfo

    def full_init(self) -> None:
        """Read the annotations."""
        self.dataset.full_init()

    def get_data_info(self, index: int) -> dict:
        """The annotation of a sample."""
        return self.dataset.get_data_info(index)

    def get_cat_ids(self, index: int) -> list[int]:
        """The classes of a sample."""
        return self.dataset.get_cat_ids(index)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        from mmvim.errors import SampleError

        while True:
            try:
                return self.dataset[index]
            except (SampleError, OSError) as error:
                with self._count.get_lock():
                    self._count.value += 1
                    number = self._count.value
                if number > self.max_failures:
                    raise SampleError(
                        f'{error}; more than max_failures={self.max_failures} samples failed'
                    ) from error
                print_log(
                    f'{error}: another sample takes its place ({number} of at most '
                    f'{self.max_failures} failures)',
                    logger='current',
                    level=logging.WARNING,
                )
                index = int(np.random.randint(len(self.dataset)))
