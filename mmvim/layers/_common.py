"""Small helpers shared by the layers."""

import torch
from torch import Tensor

from mmvim._checks import check_choice

_BACKENDS = ('auto', 'compiled', 'torch')


def resolve_backend(ops_backend: str) -> str | None:
    """Turn a layer's ``ops_backend`` into an op's ``backend`` argument.

    A layer's ``'auto'`` means "not given", so that :func:`mmvim.ops.use_backend`,
    :func:`mmvim.ops.set_backend` and ``MMVIM_BACKEND`` still decide.
    """
    check_choice('ops_backend', ops_backend, _BACKENDS)
    return None if ops_backend == 'auto' else ops_backend


def as_param_dtype(x: Tensor) -> Tensor:
    """Cast scan parameters to the dtype in which the ops want them: float64 stays, else float32."""
    return x if x.dtype == torch.float64 else x.float()
