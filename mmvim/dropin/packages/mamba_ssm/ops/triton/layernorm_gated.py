"""RMS and layer norms with a gate, of mamba_ssm 2."""

import torch
from torch import Tensor, nn

from mmvim.dropin.norms import gated_norm
from mmvim.dropin.placeholders import attributes_of

__all__ = ['LayerNorm', 'RMSNorm', 'layernorm_fn', 'rmsnorm_fn']
__getattr__ = attributes_of(__name__)


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Normalise and gate; see :func:`mmvim.dropin.norms.gated_norm`."""
    return gated_norm(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """:func:`layernorm_fn` with an RMS norm."""
    return gated_norm(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, with a gate.

    Args:
        hidden_size: Size of the last axis.
        eps: Added to the variance.
        group_size: Channels that are normalised together; None for all.
        norm_before_gate: Whether the norm comes before the gate.
        device, dtype: Of weight and bias.
    """

    _is_rms_norm = False

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        bias = None if self._is_rms_norm else torch.zeros_like(self.weight)
        self.register_parameter('bias', None if bias is None else nn.Parameter(bias))

    def reset_parameters(self) -> None:
        """Set the weight to one and the bias to zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise and gate; see :func:`mmvim.dropin.norms.gated_norm`."""
        return gated_norm(
            x,
            self.weight,
            self.bias,
            z,
            self.eps,
            self.group_size,
            self.norm_before_gate,
            self._is_rms_norm,
        )


class RMSNorm(LayerNorm):
    """:class:`LayerNorm` with an RMS norm, without bias."""

    _is_rms_norm = True
