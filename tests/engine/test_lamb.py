"""LAMB on tensor lists against mmpretrain's, parameter by parameter."""

import pytest
import torch
from torch import nn

from mmvim import compat
from mmvim.engine import Lamb

# mmpretrain sums the global norm in float32, whatever the parameters are.
CLOSE = {'rtol': 1e-5, 'atol': 1e-8}
OPTIONS = {
    'defaults': {},
    'clipped': {'max_grad_norm': 0.01},
    'no correction, no averaging': {'bias_correction': False, 'grad_averaging': False},
    'always, clipped trust': {'always_adapt': True, 'trust_clip': True},
}


def reference_class():
    compat.install()
    return pytest.importorskip('mmpretrain.engine').Lamb


def make(kind, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)).double()
    with torch.no_grad():
        model[1].bias.zero_()  # whose trust ratio is that of a zero norm
    groups = [
        {'params': [p for p in model.parameters() if p.dim() > 1], 'weight_decay': 0.1},
        {'params': [p for p in model.parameters() if p.dim() == 1], 'weight_decay': 0.0},
    ]
    return model, kind(groups, lr=0.05, betas=(0.8, 0.9), **options)


def step(model, optimizer, index, skip=False):
    generator = torch.Generator().manual_seed(index)
    optimizer.zero_grad()
    model(torch.randn(4, 7, generator=generator).double()).square().sum().backward()
    if skip:
        model[2].weight.grad = None
    optimizer.step()


@pytest.mark.parametrize('case', OPTIONS)
def test_against_mmpretrain(case):
    pairs = [make(kind, **OPTIONS[case]) for kind in (reference_class(), Lamb)]
    for index in range(6):
        for model, optimizer in pairs:
            step(model, optimizer, index, skip=index == 2)
        for a, b in zip(*(model.parameters() for model, _ in pairs), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize('direction', [0, 1])
def test_either_continues_from_the_other(direction):
    kinds = [reference_class(), Lamb]
    first, second = kinds[direction], kinds[1 - direction]
    whole = make(first)
    for index in range(6):
        step(*whole, index)
    half = make(first)
    for index in range(3):
        step(*half, index)
    model, optimizer = make(second)
    model.load_state_dict(half[0].state_dict())
    optimizer.load_state_dict(half[1].state_dict())
    for index in range(3, 6):
        step(model, optimizer, index)
    assert [group['step'] for group in optimizer.param_groups] == [6, 6]
    for a, b in zip(whole[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_closure_and_sparse_gradients():
    p = nn.Parameter(torch.ones(3))
    optimizer = Lamb([p])
    optimizer.step()  # without a gradient nothing happens
    assert torch.equal(p, torch.ones(3))

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match='sparse'):
        optimizer.step()
