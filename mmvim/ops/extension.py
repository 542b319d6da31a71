"""Finds the compiled kernels. None exist yet: every op runs on its PyTorch implementation."""

import torch


def load() -> bool:
    """Load the compiled library if there is one, and tell whether it is loaded."""
    return False


def loaded() -> bool:
    """Whether the compiled library is loaded."""
    return False


def supports(op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether a compiled kernel of ``op`` exists for this device type and dtype."""
    return False


def why_not() -> str:
    """Why there are no compiled kernels, and what to do about it."""
    return 'this version of mmvim has no compiled kernels'


def backend_info() -> dict:
    """What is compiled, for which devices, and why not when not."""
    return {'loaded': False, 'reason': why_not()}


def build() -> bool:
    """Compile the kernels now."""
    raise RuntimeError(why_not())
