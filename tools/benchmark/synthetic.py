"""Batches that cost nothing, and a clock for training: what scaling.py puts into a config."""

import functools
import json
import time
from pathlib import Path

import torch
from mmengine.dist import all_reduce, barrier, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, FUNCTIONS, HOOKS
from torch.utils.data import Dataset


@DATASETS.register_module(force=True)
class BenchmarkIndices(Dataset):
    """``length`` numbers, for a sampler to distribute."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return int(index)


@FUNCTIONS.register_module(force=True)
def benchmark_batch(indices: list[int], shape: list[int], classes: int) -> dict:
    """A batch of as many samples, always the same, in memory that a GPU copies from at once."""
    return _batch(len(indices), tuple(shape), classes)


@functools.cache
def _batch(size: int, shape: tuple[int, ...], classes: int) -> dict:
    from mmpretrain.structures import DataSample

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(256, (size, *shape), generator=generator, dtype=torch.uint8)
    if torch.cuda.is_available():
        inputs = inputs.pin_memory()
    samples = [DataSample().set_gt_label(i % classes) for i in range(size)]
    return {'inputs': inputs, 'data_samples': samples}


@HOOKS.register_module(force=True)
class BenchmarkClock(Hook):
    """Time the iterations after ``warm_up`` ones, and end the training after ``iterations`` more.

    The clock starts when all processes and their devices have come so far, and stops when the last
    one has. Rank 0 writes the number of processes and the seconds into ``out``, as JSON.
    """

    def __init__(self, warm_up: int, iterations: int, out: str) -> None:
        self.first = warm_up
        self.last = warm_up + iterations
        self.out = out
        self.start = 0.0

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Look at the clock."""
        done = runner.iter + 1
        if done == self.first:
            self._wait()
            barrier()
            self.start = time.perf_counter()
        elif done == self.last:
            self._wait()
            seconds = torch.tensor(time.perf_counter() - self.start, dtype=torch.float64)
            all_reduce(seconds, 'max')
            if is_main_process():
                result = {'processes': get_world_size(), 'seconds': seconds.item()}
                Path(self.out).write_text(json.dumps(result))
            runner.train_loop.stop_training = True

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
