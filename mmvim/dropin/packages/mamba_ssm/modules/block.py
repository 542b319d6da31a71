"""The residual block of mamba_ssm 2."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmvim.dropin.placeholders import attributes_of
from mmvim.ops._library import as_compute_dtype

from ..ops.triton.layer_norm import RMSNorm, layer_norm_fn
from ..utils.generation import InferenceParams

__all__ = ['Block']
__getattr__ = attributes_of(__name__)


class Block(nn.Module):
    """Add the residual, normalise, mix; and the same with an MLP.

    Args:
        dim: Channels.
        mixer_cls: Makes the mixer from ``dim``.
        mlp_cls: Makes the MLP from ``dim``; ``nn.Identity`` for none.
        norm_cls: Makes a norm from ``dim``.
        fused_add_norm: Whether to add and to normalise in one call.
        residual_in_fp32: Whether the residual stream is kept in float32.

    Raises:
        ValueError: With ``fused_add_norm``, if the norm is neither RMSNorm nor LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.mixer = mixer_cls(dim)
        self.norm = norm_cls(dim)
        self.mlp = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            raise ValueError(
                f'norm_cls={type(self.norm).__name__} does not go with fused_add_norm=True; '
                'allowed: RMSNorm, LayerNorm'
            )

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        **mixer_kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Return the output of the last layer and the new residual, both (b, l, dim)."""
        hidden_states, residual = self._add_norm(hidden_states, residual, self.norm)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._add_norm(hidden_states, residual, self.norm2)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_norm(
        self, hidden_states: Tensor, residual: Tensor | None, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            return layer_norm_fn(
                hidden_states,
                norm.weight,
                norm.bias,
                residual=residual,
                eps=norm.eps,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
                is_rms_norm=isinstance(norm, RMSNorm),
            )
        residual = hidden_states if residual is None else hidden_states + residual
        hidden_states = norm(residual.to(norm.weight.dtype))
        return hidden_states, as_compute_dtype(residual) if self.residual_in_fp32 else residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """States of the mixer before the first step."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
