"""Normalisation layers that can add the residual stream in the same pass."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvim import ops
from mmvim._checks import check_choice, check_flags, check_number, check_positive
from mmvim.ops._library import as_compute_dtype
from mmvim.ops.backend import BACKENDS
from mmvim.ops.layer_norm import layer_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with an optional residual addition.

    ``r = x + residual``; ``out = r / sqrt(mean(r**2) + eps) * weight`` (Zhang and Sennrich,
    https://arxiv.org/abs/1910.07467). The sum and the mean are taken in float32.

    Args:
        dim (int): Size of the last dimension.
        eps (float): Added to the mean square. Defaults to 1e-5.
        residual_in_fp32 (bool): Whether the residual stream is kept in float32. Defaults to True.
        ops_backend (str): 'auto', 'compiled' or 'torch'. Defaults to 'auto'.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        residual_in_fp32: bool = True,
        ops_backend: str = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim)
        check_number('eps', eps, 0)
        check_flags(residual_in_fp32=residual_in_fp32)
        self.dim = dim
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        check_choice('ops_backend', ops_backend, BACKENDS)
        self.ops_backend = ops_backend
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, return_residual: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise ``x + residual``.

        Args:
            x (Tensor): (..., dim).
            residual (Tensor, optional): The stream to which ``x`` is added, of the same shape.
            return_residual (bool): Whether to return the sum as well. Defaults to False.

        Returns:
            Tensor or tuple: The norm in ``x.dtype``, and with ``return_residual`` the sum (in
            float32 if ``residual_in_fp32``).
        """
        out, residual = ops.add_rms_norm(
            x,
            self.weight,
            residual,
            eps=self.eps,
            residual_in_fp32=self.residual_in_fp32,
            backend=self.ops_backend,
        )
        return (out, residual) if return_residual else out

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f'{self.dim}, eps={self.eps}, residual_in_fp32={self.residual_in_fp32}'


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension with the interface of :class:`RMSNorm`.

    Args:
        dim (int): Size of the last dimension.
        eps (float): Added to the variance. Defaults to 1e-5.
        residual_in_fp32 (bool): Whether the residual stream is kept in float32. Defaults to True.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        residual_in_fp32: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(dim=dim)
        check_number('eps', eps, 0)
        check_flags(residual_in_fp32=residual_in_fp32)
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.residual_in_fp32 = residual_in_fp32

    def forward(
        self, x: Tensor, residual: Tensor | None = None, return_residual: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise ``x + residual``; arguments and results as in :meth:`RMSNorm.forward`."""
        total = as_compute_dtype(x)
        if residual is not None:
            total = total + residual
        weight, bias = as_compute_dtype(self.weight), as_compute_dtype(self.bias)
        out = F.layer_norm(total, self.normalized_shape, weight, bias, self.eps).to(x.dtype)
        if not return_residual:
            return out
        if not self.residual_in_fp32:
            total = total.to(x.dtype if residual is None else residual.dtype)
        return out, total


class AutocastLayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension whose result, under autocast, has autocast's dtype.

    That of :class:`torch.nn.LayerNorm` is float32, which the linear layer behind it converts.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., dim)."""
        return layer_norm(x, self.weight, self.bias, self.eps)


class StreamLayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension whose result begins a residual stream.

    It is that of :class:`torch.nn.LayerNorm`, also under autocast: on a GPU float32. The input is
    read there as it is, without a conversion.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., dim)."""
        return layer_norm(x, self.weight, self.bias, self.eps, keep_float32=True)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (batch, channels, height, width) maps.

    The dtype of its result is that of :class:`torch.nn.LayerNorm`: under autocast on a GPU float32.
    """

    _keep_float32 = True

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position of ``x`` (batch, channels, height, width) over its channels."""
        x = x.permute(0, 2, 3, 1)
        if self.weight is None:
            x = super().forward(x)
        else:
            x = layer_norm(x, self.weight, self.bias, self.eps, keep_float32=self._keep_float32)
        return x.permute(0, 3, 1, 2)


class AutocastLayerNorm2d(LayerNorm2d):
    """:class:`LayerNorm2d` whose result, under autocast, has autocast's dtype."""

    _keep_float32 = False


def build_norm(
    name: str,
    dim: int,
    eps: float = 1e-5,
    residual_in_fp32: bool = True,
    ops_backend: str = 'auto',
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> RMSNorm | LayerNorm:
    """Build the norm named ``name``: 'RMSNorm' or 'LayerNorm'.

    Raises:
        ValueError: If there is no norm of that name.
    """
    check_choice('norm', name, ('RMSNorm', 'LayerNorm'))
    if name == 'RMSNorm':
        return RMSNorm(dim, eps, residual_in_fp32, ops_backend, device=device, dtype=dtype)
    return LayerNorm(dim, eps, residual_in_fp32, device=device, dtype=dtype)
