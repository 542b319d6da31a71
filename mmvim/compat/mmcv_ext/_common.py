"""Common parts of the replacement ops: torchvision's operators and the computing precision."""

from types import SimpleNamespace

import torch
from torch import Tensor


def torchvision_ops() -> SimpleNamespace:
    """torchvision's operators, imported at the first call of an op that needs them.

    Raises:
        ImportError: torchvision is missing, or its operators do not fit the installed torch.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        # torchvision fails with RuntimeError when its library was built for another torch.
        raise ImportError(
            "mmcv has no compiled ops and mmvim's replacement for them needs torchvision, which "
            f'cannot be imported ({error}). Install the torchvision that belongs to torch '
            f"{torch.__version__}: pip install torchvision (from torch's own index)"
        ) from error
    return torch.ops.torchvision


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32: never half precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
