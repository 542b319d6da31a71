"""Thousands of iterations at changing sizes: memory stays flat and no cache grows."""

import gc
import os
import random

import pytest
import torch

pytest.importorskip('mmengine')

from narrow import narrow_mambavision

import mmvim
from mmvim import ops

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
BUILD = {
    'vim': lambda: mmvim.Vim(
        arch=dict(embed_dims=24, depth=2, d_state=4), img_size=32, patch_size=8
    ),
    'videomamba': lambda: mmvim.VideoMamba(
        arch=dict(embed_dims=24, depth=2), img_size=32, patch_size=8
    ),
    'mambavision': narrow_mambavision,
}


def used(device: str) -> int:
    """Bytes: allocated on the GPU, or resident in memory."""
    gc.collect()
    if device == 'cuda':
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def cache_sizes() -> dict[str, int]:
    """Entries of every ``functools`` cache of the package."""
    import sys

    sizes = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith('mmvim'):
            for name, value in list(vars(module).items()):
                if hasattr(value, 'cache_info'):
                    sizes[f'{module_name}.{name}'] = value.cache_info().currsize
    return sizes


def run(family: str, steps: int, train: bool, device: str) -> None:
    """Run with images of 32 to 160 pixels; what is used after a tenth must do until the end."""
    torch.manual_seed(0)
    rng = random.Random(0)
    model = BUILD[family]().to(device).train(train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    sizes = [(32 * rng.randint(1, 3), 32 * rng.randint(1, 3)) for _ in range(12)]

    def step(height: int, width: int) -> None:
        images = torch.randn(rng.randint(1, 2), 3, height, width, device=device)
        with torch.set_grad_enabled(train):
            out = model(images)[-1]
        if train:
            out.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    warm = max(steps // 10, 2 * len(sizes))
    measured, caches = [], {}
    for i in range(steps):
        step(*sizes[i % len(sizes)])
        if i + 1 == warm:
            caches = cache_sizes()
        if i + 1 >= warm and (i + 1 - warm) % max((steps - warm) // 8, 1) == 0:
            measured.append(used(device))
    growth = max(measured[-3:]) - max(measured[:2])
    allowed = 1 << 20 if device == 'cuda' else 24 << 20
    assert growth < allowed, f'{growth / 2**20:.1f} MiB more: {[m >> 20 for m in measured]} MiB'
    assert cache_sizes() == caches


@pytest.mark.parametrize('device', DEVICES)
def test_a_few_iterations_have_flat_memory(device, count):
    run('vim', 60, True, device)
    count('iterations', 60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(
    ('family', 'steps'), [('vim', 2000), ('videomamba', 1500), ('mambavision', 1500)]
)
def test_training_has_flat_memory(family, steps, device, count):
    """5,000 iterations in total."""
    run(family, steps, True, device)
    count('iterations', steps)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(
    ('family', 'steps'), [('vim', 8000), ('videomamba', 6000), ('mambavision', 6000)]
)
def test_inference_has_flat_memory(family, steps, device, count):
    """20,000 inferences in total."""
    run(family, steps, False, device)
    count('inferences', steps)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize('device', DEVICES)
def test_compiled_code_does_not_grow_with_sizes(device, count):
    """With ``dynamic=True``, many lengths need few compilations."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()

    @torch.compile(dynamic=True, backend='aot_eager')
    def scan(u, delta, A, B, C):
        return ops.selective_scan(u, delta, A, B, C, delta_softplus=True)

    A = -torch.rand(4, 4, device=device)
    rng = random.Random(0)
    seen = []
    for i in range(400):
        b, length = rng.randint(2, 5), rng.randint(2, 200)
        u, delta = torch.randn(2, b, length, 4, device=device)
        B, C = torch.randn(2, b, length, 4, device=device)
        scan(u, delta, A, B, C)
        if i >= 20:
            seen.append(counters['stats']['unique_graphs'])
    assert seen[0] == seen[-1] <= 3
    count('iterations', 400)
