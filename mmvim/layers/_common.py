"""Small helpers shared by the layers."""

import torch
from torch import Tensor

_BACKENDS = ('auto', 'compiled', 'torch')


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """Raise ValueError, naming the argument and what is allowed, unless ``value`` is allowed."""
    if value not in allowed:
        options = ', '.join(repr(a) for a in allowed)
        raise ValueError(f'{name}={value!r} is unknown; allowed: {options}')


def check_positive(**sizes: int) -> None:
    """Raise ValueError for the first size that is not a positive integer."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f'{name}={value!r} must be a positive integer')


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
