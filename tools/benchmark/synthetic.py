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
def benchmark_batch(indices: list[int], shape: list[int], classes: int, task: str) -> dict:
    """A batch of as many samples, in memory that a GPU copies from at once.

    Images are always the same, labels too; samples are new each time, as a pipeline's are.
    """
    inputs = _inputs(len(indices), tuple(shape))
    samples = _samples(len(indices), tuple(shape), classes, task)
    # A classifier's preprocessor writes into them.
    samples = samples.pop() if task == 'mmpretrain' else samples[0]
    return {'inputs': inputs if task == 'mmpretrain' else list(inputs), 'data_samples': samples}


@functools.cache
def _inputs(size: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(256, (size, *shape), generator=generator, dtype=torch.uint8)
    return inputs.pin_memory() if torch.cuda.is_available() else inputs


_ready: list[list] = []


def _samples(size: int, shape: tuple[int, ...], classes: int, task: str) -> list[list]:
    """Lists of samples that are ready: making them is a data pipeline's work."""
    if not _ready:
        make = {'mmpretrain': _label, 'mmdet': _instances, 'mmseg': _label_map}[task]
        count = 300 if task == 'mmpretrain' else 1
        _ready.extend([make(i, shape, classes) for i in range(size)] for _ in range(count))
    return _ready


def _label(index: int, shape: tuple[int, ...], classes: int) -> object:
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(index % classes)


def _instances(index: int, shape: tuple[int, ...], classes: int) -> object:
    """Ten instances with masks: ellipses in boxes of all sizes."""
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    height, width = shape[-2:]
    random = np.random.default_rng(index)
    sides = np.exp(random.uniform(np.log(0.05), np.log(0.6), (10, 2))) * (width, height)
    corners = random.uniform(0, 1, (10, 2)) * ((width, height) - sides)
    boxes = np.concatenate([corners, corners + sides], 1)
    y, x = np.ogrid[:height, :width]
    masks = [
        _square(x, left, right) + _square(y, top, bottom) <= 1 for left, top, right, bottom in boxes
    ]
    sample = DetDataSample(metainfo={
        'img_shape': (height, width), 'ori_shape': (height, width), 'scale_factor': (1.0, 1.0),
        'img_id': index,
    })  # fmt: skip
    sample.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(torch.from_numpy(boxes).float()),
        labels=torch.from_numpy(random.integers(0, classes, 10)),
        masks=BitmapMasks(np.stack(masks).astype(np.uint8), height, width),
    )
    sample.ignored_instances = InstanceData(
        bboxes=HorizontalBoxes(torch.zeros(0, 4)), labels=torch.zeros(0, dtype=torch.long)
    )
    return sample


def _square(x: object, low: float, high: float) -> object:
    return ((2 * x - low - high) / (high - low)) ** 2


def _label_map(index: int, shape: tuple[int, ...], classes: int) -> object:
    """Squares of 32 pixels."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    height, width = shape[-2:]
    generator = torch.Generator().manual_seed(index)
    coarse = torch.randint(classes, (1, -(-height // 32), -(-width // 32)), generator=generator)
    labels = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :height, :width]
    sample = SegDataSample(metainfo={'img_shape': (height, width), 'ori_shape': (height, width)})
    sample.gt_sem_seg = PixelData(data=labels.contiguous())
    return sample


def _held() -> int:
    """Bytes that CUDA graphs hold in pools of their own, which count as free between replays."""
    return sum(
        segment['total_size'] - segment['allocated_size']
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment['segment_pool_id']) != (0, 0)
    )


@HOOKS.register_module(force=True)
class BenchmarkClock(Hook):
    """Time the iterations after ``warm_up`` ones, and end the training after ``iterations`` more.

    The clock starts when all processes and their devices have come so far, and stops when the last
    one has. Rank 0 writes the number of processes, the seconds and the peak GiB into ``out``, as
    JSON; and if ``profiled`` iterations after that are asked for, the number of each kernel in one
    of them and the milliseconds that it took.
    """

    priority = 'LOWEST'

    def __init__(self, warm_up: int, iterations: int, out: str, profiled: int = 0) -> None:
        self.first = warm_up
        self.last = warm_up + iterations
        self.out = out
        self.profiled = profiled
        self.start = 0.0
        self.result: dict = {}
        self.profiler = None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Look at the clock."""
        done = runner.iter + 1
        if done == self.first:
            self._wait()
            barrier()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter()
        elif done == self.last:
            self._wait()
            seconds = torch.tensor(time.perf_counter() - self.start, dtype=torch.float64)
            all_reduce(seconds, 'max')
            self.result = {'processes': get_world_size(), 'seconds': seconds.item()}
            if torch.cuda.is_available():
                self.result['gib'] = (torch.cuda.max_memory_allocated() + _held()) / 2**30
                if self.profiled:
                    self.profiler = torch.profiler.profile(
                        activities=[torch.profiler.ProfilerActivity.CUDA]
                    )
                    self.profiler.start()
                    return
            self._end(runner)
        elif self.profiler is not None and done == self.last + self.profiled:
            self._wait()
            self.profiler.stop()
            self.result['kernels'] = {
                event.key: (
                    event.count / self.profiled,
                    event.self_device_time_total / self.profiled / 1e3,
                )
                for event in self.profiler.key_averages()
                if event.self_device_time_total > 0 and not event.key.startswith('Mem')
            }
            self._end(runner)

    def _end(self, runner) -> None:
        if is_main_process():
            Path(self.out).write_text(json.dumps(self.result))
        runner.train_loop.stop_training = True

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
