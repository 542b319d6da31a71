"""Batches from any position on are those of the undisturbed run."""

import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import DataLoader

from mmvim.engine.batches import Batches, _PlacedBatches

PASS = 4  # batches


def taken(kind, skip: int, count: int) -> list[list[int]]:
    dataset = list(range(2 * PASS))
    loader = DataLoader(dataset, batch_size=2, sampler=kind(dataset, shuffle=True, seed=0))
    stream = Batches(loader, seed=0, rank=0).endless(skip)
    return [next(stream).tolist() for _ in range(count)]


@pytest.mark.parametrize('kind', [DefaultSampler, InfiniteSampler])
def test_a_resume_is_in_the_pass_that_it_belongs_to(kind):
    whole = taken(kind, 0, 3 * PASS + 1)
    passes = [whole[i : i + PASS] for i in range(0, 3 * PASS, PASS)]
    for batches in passes:
        assert sorted(index for batch in batches for index in batch) == list(range(2 * PASS))
    assert passes[0] != passes[1] != passes[2]
    for skip in range(len(whole)):
        assert taken(kind, skip, len(whole) - skip) == whole[skip:], skip


def test_passes_of_epochs_begin_where_they_are_told():
    loader = DataLoader(torch.arange(8), batch_size=2, sampler=DefaultSampler(range(8), seed=0))
    batches = Batches(loader, seed=0, rank=0)
    loader.sampler.set_epoch(3)
    whole = [batch.tolist() for batch in batches.epoch(3)]
    assert len(whole) == PASS
    for skip in range(PASS):
        assert [batch.tolist() for batch in batches.epoch(3, skip)] == whole[skip:]


def test_every_sample_of_a_run_has_random_numbers_of_its_own():
    def seeds(epoch: int, skip: int = 0) -> list[int]:
        batches = _PlacedBatches([[5, 6, 7], [8, 9, 5], [6]], (0, 1), placed=True)
        batches.begin(epoch, skip)
        with batches.in_training():
            return [index.seed for batch in batches for index in batch]

    first, second = seeds(0), seeds(1)
    assert len({*first, *second}) == 14
    assert seeds(0, skip=1) == first[3:]
