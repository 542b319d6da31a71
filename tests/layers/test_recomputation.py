"""Activation checkpointing whose random numbers another mechanism provides."""

import contextlib

import torch
from torch import nn

from mmvim.layers.recomputation import recomputed, recomputing_within


class Seeds:
    """Draws the numbers of each block, in both passes, from a seed of its own."""

    def __init__(self):
        self.blocks, self.seeds = 0, []

    def __call__(self):
        self.blocks += 1
        return self.drawing(self.blocks), self.drawing(self.blocks)

    @contextlib.contextmanager
    def drawing(self, seed):
        self.seeds.append(seed)
        torch.manual_seed(seed)
        yield


def test_gradients_are_those_of_the_numbers_provided():
    blocks = [nn.Dropout(0.5) for _ in range(3)]
    seeds, x = Seeds(), torch.ones(8, 64, requires_grad=True)
    with recomputing_within(seeds):
        y = x
        for block in blocks[:2]:
            y = recomputed(block, y)
    assert seeds.blocks == 2
    torch.manual_seed(9)
    y.sum().backward()
    # Twice kept is four times the input.
    assert torch.equal(x.grad, y)
    assert sorted(set(y.flatten().tolist())) == [0.0, 4.0]
    assert seeds.seeds == [1, 2, 2, 1]
    recomputed(blocks[2], x)
    assert seeds.blocks == 2


def test_statistics_count_each_batch_once():
    block, seeds = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)), Seeds()
    twin = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4))
    x = torch.randn(8, 4, requires_grad=True)
    with recomputing_within(seeds):
        recomputed(block, x).square().sum().backward()
    torch.manual_seed(1)
    twin(x)
    for name, value in twin.state_dict().items():
        assert torch.equal(block.state_dict()[name], value), name
