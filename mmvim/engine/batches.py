"""Batches of a DataLoader from any position on, as if all earlier ones had been taken."""

import atexit
import functools
import logging
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmvim.errors import UserError

from . import random_state

# Seconds for which a worker outlives a SIGTERM to the whole job.
_GRACE = 25.0


def check_length(loader: Any, name: str) -> None:
    """Refuse a DataLoader without a batch, with which nothing would be trained or evaluated.

    Args:
        loader: The DataLoader.
        name: Its name in the config.

    Raises:
        UserError: ``drop_last`` drops all that there is.
    """
    endless = 'Infinite' in type(getattr(loader, 'sampler', None)).__name__
    if endless or not hasattr(loader.dataset, '__len__') or not len(loader.dataset) or len(loader):
        return
    processes = f' in each of {get_world_size()} processes' if get_world_size() > 1 else ''
    raise UserError(
        f'{name} has no batch: it has {len(loader.dataset)} samples, batch_size is '
        f'{loader.batch_sampler.batch_size}{processes}, and drop_last=True drops what fills none. '
        'Lower batch_size, or set drop_last=False'
    )


class _PlacedIndex(int):
    """The index of a sample, with the seed of its position in the training."""

    seed: int

    def __new__(cls, index: int, seed: int) -> '_PlacedIndex':
        placed = super().__new__(cls, index)
        placed.seed = seed
        return placed

    def __reduce__(self) -> tuple:
        return _PlacedIndex, (int(self), self.seed)


class _PlacedBatches:
    """A batch sampler that starts anywhere, numbers its samples, and can go back.

    Batches that were drawn but not trained on are kept for replacement workers: a sampler need not
    repeat itself, and mmengine's ``InfiniteSampler`` cannot start over.
    """

    def __init__(self, batch_sampler: Any, seed: tuple[int, ...], placed: bool) -> None:
        self.batch_sampler = batch_sampler
        self._seed = seed
        self._placed = placed
        self._epoch = 0
        self._stream: Iterator[list] | None = None
        self._kept: deque[list] = deque()
        self._in_training = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__['batch_sampler'], name)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def begin(self, epoch: int, skip: int) -> None:
        """Make training take pass ``epoch``, without its first ``skip`` batches."""
        self._epoch = epoch
        self._stream = self._batches(epoch, skip)
        self._kept.clear()

    def done(self) -> None:
        """Forget the oldest drawn batch, which has been trained on."""
        self._kept.popleft()

    @contextmanager
    def in_training(self) -> Iterator[None]:
        """Mark iteration in this block as training; any other gets batches of its own."""
        self._in_training = True
        try:
            yield
        finally:
            self._in_training = False

    def __iter__(self) -> Iterator[list]:
        # Not in the generator, which starts with the first batch. A DataLoader with workers
        # requests two iterators and uses the second.
        if self._in_training and self._stream is not None:
            return self._deliver(self._stream, tuple(self._kept))
        return self._batches(self._epoch, 0)

    def _deliver(self, stream: Iterator[list], kept: tuple[list, ...]) -> Iterator[list]:
        yield from kept
        for batch in stream:
            self._kept.append(batch)
            yield batch

    def _batches(self, epoch: int, skip: int) -> Iterator[list]:
        number = 0
        for i, batch in enumerate(self.batch_sampler):
            if i >= skip:
                yield self._place(batch, epoch, number) if self._placed else batch
            number += len(batch)

    def _place(self, batch: list, epoch: int, number: int) -> list:
        return [
            _PlacedIndex(index, random_state.mix(*self._seed, epoch, number + i))
            if isinstance(index, int)
            else index
            for i, index in enumerate(batch)
        ]


class Batches:
    """The batches of a training DataLoader, from any position on.

    - Batches before the position are not loaded: only the sampler is advanced.
    - In workers, each sample's random numbers (Python's, NumPy's and torch's) are seeded with the
      run's seed, the rank, and the position of the sample in the training. So augmentation after
      a resume equals that of the uninterrupted run, whatever the number of workers. Without workers
      the process's own generators are used.
    - Starting the iterator draws no number from the process's generator.
    - Workers outlive a SIGTERM to the whole job for 25 seconds, so that the training process can
      save.

    Args:
        loader: The DataLoader, changed in place. A loader of an ``IterableDataset``, or without
            batches, starts at the beginning whatever the position.
        seed: Seed of the run.
        rank: Rank of the process.
        max_restarts: How often all workers may be restarted after one has died.

    Attributes:
        restarts: Number of restarts so far.
    """

    def __init__(
        self, loader: DataLoader, seed: int | None, rank: int, max_restarts: int = 0
    ) -> None:
        self.loader = loader
        self.max_restarts = max_restarts
        self.restarts = 0
        self._placed: _PlacedBatches | None = None
        seeds = (seed or 0, rank)
        isolate(loader, seeds)
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            return
        if loader.num_workers > 0:
            _outlive_sigterm(loader, _seed_each_sample)
        self._placed = _PlacedBatches(loader.batch_sampler, seeds, loader.num_workers > 0)
        # A DataLoader refuses to change this attribute, but the reason does not apply here: the
        # new sampler yields the same batches.
        loader.__dict__['batch_sampler'] = self._placed
        if getattr(loader, '_iterator', None) is not None:
            loader._iterator = None

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        """Iterate over pass ``number``, without its first ``skip`` batches.

        Raises:
            RuntimeError: A worker has died, once more than ``max_restarts`` allows.
        """
        if self._placed is not None:
            self._placed.begin(number, skip)
        while True:
            try:
                for batch in self._start():
                    if self._placed is not None:
                        self._placed.done()
                    yield batch
                return
            except RuntimeError as error:
                # Not an error that a dataset raised in a worker, which keeps its own type.
                if not re.search(r'DataLoader worker \(pid', str(error)):
                    raise
                if self.restarts >= self.max_restarts or self._placed is None:
                    raise
                self.restarts += 1
                print_log(
                    f'{" ".join(str(error).split())}: the workers are started again, without loss '
                    f'of data ({self.restarts} of at most {self.max_restarts} times)',
                    logger='current',
                    level=logging.WARNING,
                )
                self.loader._iterator = None

    def _start(self) -> Iterator[Any]:
        with self._placed.in_training() if self._placed is not None else nullcontext():
            iterator = iter(self.loader)
        if self.max_restarts and self.loader.num_workers > 0:
            # torch would raise at any moment, even in the middle of a step. Without its handler a
            # death is noticed while waiting for the next batch.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return iterator

    def endless(self, skip: int = 0) -> Iterator[Any]:
        """Iterate without end, over as many passes as it takes, after skipping ``skip`` batches."""
        number = 0
        sampler = getattr(self.loader, 'sampler', None)
        if not hasattr(sampler, 'set_epoch'):
            sampler = getattr(self.loader.batch_sampler, 'sampler', None)
        if self._placed is not None and _is_finite(sampler):
            number, skip = divmod(skip, len(self.loader))
        while True:
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(number)
            yield from self.epoch(number, skip)
            number, skip = number + 1, 0


def _is_finite(sampler: Any) -> bool:
    """Whether a sampler ends after as many samples as its length says."""
    return 'Infinite' not in type(sampler).__name__ and type(sampler).__name__ not in (
        'MultiSourceSampler',
        'GroupMultiSourceSampler',
    )


def isolate_validation(loader: DataLoader) -> None:
    """Isolate validation from the process's random numbers, and its workers from a SIGTERM."""
    isolate(loader)
    if loader.num_workers > 0:
        _outlive_sigterm(loader)


def isolate(loader: DataLoader, seeds: tuple[int, ...] = (0,)) -> None:
    """Give a DataLoader a generator of its own.

    Otherwise each start of its iterator draws from the process's generator, and the random numbers
    of training would depend on how often that happened.
    """
    if getattr(loader, 'generator', None) is None:
        seed = random_state.mix(*seeds)
        loader.generator = torch.Generator().manual_seed(seed & 0x7FFFFFFFFFFFFFFF)


def _outlive_sigterm(loader: DataLoader, prepare: Callable[[], None] | None = None) -> None:
    """Let workers outlive a SIGTERM to the whole job, but not the end of their parent."""
    # At its end the parent sends SIGTERM as well, after what is registered here has run. Without a
    # lock, which a worker that is killed could hold.
    ending = (loader.multiprocessing_context or multiprocessing).RawValue('b', 0)
    atexit.register(setattr, ending, 'value', 1)
    loader.worker_init_fn = functools.partial(
        _prepare_worker, inner=loader.worker_init_fn, prepare=prepare, ending=ending
    )


def _prepare_worker(
    worker_id: int,
    inner: Callable[[int], None] | None,
    prepare: Callable[[], None] | None,
    ending: Any,
) -> None:
    if inner is not None:
        inner(worker_id)
    signal.signal(signal.SIGTERM, functools.partial(_leave, ending))
    if prepare is not None:
        prepare()


def _leave(ending: Any, signum: int, frame: object) -> None:
    if ending.value:
        os._exit(0)
    timer = threading.Timer(_GRACE, os._exit, (128 + signum,))
    timer.daemon = True
    timer.start()


def _seed_each_sample() -> None:
    """Seed each sample that this worker loads."""
    dataset = get_worker_info().dataset
    kind = type(dataset)
    if kind in (list, tuple):
        return  # Samples that are ready: nothing in them is random.

    def getitem(self: Any, index: Any) -> Any:
        if isinstance(index, _PlacedIndex):
            random_state.seed_all(index.seed)
            index = int(index)
        return kind.__getitem__(self, index)

    members = {'__module__': kind.__module__, '__getitem__': getitem, '__getitems__': None}
    try:
        dataset.__class__ = type(kind.__name__, (kind,), members)
    except TypeError:
        print_log(
            f'The samples of a {kind.__name__} cannot be seeded one by one: after a resume, '
            'augmentation takes other random numbers',
            logger='current',
            level=logging.WARNING,
        )
