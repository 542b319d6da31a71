"""Autocast in the public functions: activations are cast, parameters are not."""

import torch
from torch import Tensor

from ._library import autocast_enabled, compute_dtype


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The autocast dtype of ``x``'s device, or None if autocast is off or x is float64."""
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or not x.is_floating_point():
        return None
    device_type = x.device.type
    if not autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def to_activation(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Cast floating-point tensors (not float64) to the autocast dtype."""
    return [_cast(x, dtype) for x in tensors]


def to_parameter(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Cast low-precision parameters to the parameter dtype of activations of ``dtype``."""
    return [_cast(x, compute_dtype(dtype)) for x in tensors]


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(dtype)
    return x
