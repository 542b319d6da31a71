"""Images that cannot be read and data loader workers that die: reported, counted, and survived
only where the config says so.
"""

import contextlib
import itertools
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import DataLoader, RandomSampler

pytest.importorskip('mmpretrain')

from runs import Runs, write_config, write_images

from mmvim.datasets import SkipFailures
from mmvim.engine.batches import Batches
from mmvim.errors import SampleError

SKIP = """
train_dataloader['dataset'] = dict(
    type='mmvim.SkipFailures', max_failures={most}, dataset=train_dataloader['dataset'])
"""
KILL = """
custom_hooks.append(dict(type='KillWorker', at={at}))
train_cfg['max_worker_restarts'] = {restarts}
"""


class Damaged:
    """Every third sample cannot be loaded."""

    metainfo: ClassVar = {'classes': ('a',)}

    def __len__(self):
        return 9

    def __getitem__(self, index):
        if index % 3 == 0:
            raise SampleError(f'cannot load image {index}')
        return index


def test_skip_failures(count):
    np.random.seed(0)
    data = SkipFailures(Damaged(), max_failures=20)
    assert len(data) == 9
    assert data.metainfo == Damaged.metainfo
    loader = DataLoader(data, batch_size=3, num_workers=2)
    taken = torch.cat(list(loader)).tolist()
    assert len(taken) == 9
    assert all(index % 3 for index in taken)
    assert [taken[i] for i in (1, 2, 4, 5, 7, 8)] == [1, 2, 4, 5, 7, 8]
    assert data.failures >= 3
    count('faults', data.failures)
    data = SkipFailures(Damaged(), max_failures=1)
    assert data[0] in range(9)
    while data.failures <= 1:
        with contextlib.suppress(SampleError):
            data[0]
    with pytest.raises(SampleError, match=r'more than max_failures=1 samples failed'):
        data[0]
    with pytest.raises(ValueError, match='max_failures'):
        SkipFailures(Damaged(), max_failures=0)


class Fragile:
    """Numbers; the ``n``-th that is asked for is lost once, as if a worker had died."""

    def __init__(self, n: int | None = None):
        self.left = n

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise RuntimeError('DataLoader worker (pid(s) 7) exited unexpectedly')
        return index


@pytest.mark.parametrize('sampler', [InfiniteSampler, DefaultSampler, RandomSampler])
def test_what_a_dead_worker_had_is_drawn_again(sampler, count):
    """Also from a sampler that cannot begin anew, or would begin with other numbers."""

    def taken(n: int | None, skip: int) -> list[int]:
        torch.manual_seed(0)
        data = Fragile(n)
        seed = {} if sampler is RandomSampler else {'seed': 0}
        loader = DataLoader(data, batch_size=2, sampler=sampler(data, **seed))
        batches = Batches(loader, seed=0, rank=0, max_restarts=1)
        found = torch.cat(list(itertools.islice(batches.endless(skip), 12)))
        assert batches.restarts == (n is not None)
        return found.tolist()

    whole = taken(None, 0)
    for n in (1, 2, 9, 14):
        assert taken(n, 0) == whole
    assert taken(3, 4)[:16] == whole[8:]
    count('faults', 5)


@pytest.fixture
def broken(tmp_path) -> Path:
    """Images of which two are damaged."""
    root = tmp_path / 'images'
    write_images(root)
    for name in ('a/0.png', 'b/1.png'):
        path = root / 'train' / name
        path.write_bytes(path.read_bytes()[:40])
    return root


def go(runs: Runs, path: Path, images: Path, variant: str, extra: str = '') -> tuple[int, str]:
    path.mkdir()
    write_config(path / 'config.py', images, variant)
    with (path / 'config.py').open('a') as file:
        file.write(extra)
    pid = runs.start(path, 'config.py', '--work-dir', 'work', '--no-validate')
    return runs.wait(pid), (path / 'log').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['epochs', 'epochs, saved by iteration'])
def test_damaged_images(runs, broken, tmp_path, variant, count):
    code, log = go(runs, tmp_path / 'strict', broken, variant)
    assert code == 2
    assert re.search(r'error: .*cannot load image .*(a/0|b/1)\.png', log)

    code, log = go(runs, tmp_path / 'lenient', broken, variant, SKIP.format(most=50))
    assert code == 0, log[-3000:]
    # Four epochs, in each of which each of the two is asked for once, or again as a replacement.
    numbers = [int(n) for n in re.findall(r'takes its place \((\d+) of at most 50 failures', log)]
    assert sorted(set(numbers)) == list(range(1, len(set(numbers)) + 1))
    assert len(set(numbers)) >= 8
    assert {'a/0.png', 'b/1.png'} == set(re.findall(r'image \'\S*/(\w/\d+\.png)\'', log))

    code, log = go(runs, tmp_path / 'limited', broken, variant, SKIP.format(most=3))
    assert code == 2
    assert 'more than max_failures=3 samples failed' in log
    count('faults', 3)


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['epochs', 'iterations'])
def test_dead_workers(runs, tmp_path, variant, count):
    images = tmp_path / 'images'
    write_images(images)
    code, log = go(runs, tmp_path / 'strict', images, variant, KILL.format(at=(8,), restarts=0))
    assert code == 2, log[-3000:]
    line = next(line for line in log.splitlines() if line.startswith('error: '))
    assert 'a data loader worker' in line
    assert 'num_workers' in line

    extra = KILL.format(at=(8, 15), restarts=2)
    code, log = go(runs, tmp_path / 'lenient', images, variant, extra)
    assert code == 0, log[-3000:]
    assert 'the workers are started again, without loss of data (2 of at most 2 times)' in log
    code, log = go(runs, tmp_path / 'whole', images, variant)
    assert code == 0
    ours, theirs = (tmp_path / name for name in ('lenient', 'whole'))
    assert (ours / 'batches').read_text() == (theirs / 'batches').read_text()
    last = [weights(p) for p in (ours, theirs)]
    for name, value in last[0].items():
        assert torch.equal(value, last[1][name])
    count('kills', 3)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint of a run."""
    name = Path((path / 'work' / 'last_checkpoint').read_text()).name
    return torch.load(path / 'work' / name, weights_only=False)['state_dict']
