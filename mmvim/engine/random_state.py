"""The state of the random number generators of a process, as tensors and numbers.

Checkpoints contain it and are loaded with ``weights_only``: hence no objects of other types.
"""

import random
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators (CPU and current GPU)."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        'python': (version, torch.tensor(internal), gauss),
        'numpy': (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Restore a state that :func:`capture` returned."""
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = state['numpy']
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def mix(*numbers: int) -> int:
    """Return 64 bits that depend on every one of ``numbers`` (finalizer of splitmix64)."""
    mask = (1 << 64) - 1
    mixed = 0
    for number in numbers:
        mixed = (mixed + (number & mask) + 0x9E3779B97F4A7C15) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        mixed ^= mixed >> 31
    return mixed


def seed_all(seed: int) -> None:
    """Seed the CPU generators; cheap enough to be called for every sample."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # torch.manual_seed would also queue a call for each accelerator every time.
    torch.default_generator.manual_seed(seed)
