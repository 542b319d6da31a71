"""State of a streaming model between chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from mmvim.layers import MambaState


@dataclass(frozen=True)
class VideoState:
    """State of a :class:`mmvim.StreamingVideoMamba`. Immutable: each call returns a new one.

    Attributes:
        layers (tuple[MambaState]): For each layer ``conv`` (batch, d_inner, d_conv - 1) and
            ``ssm`` (batch, d_inner, d_state), the latter float32 (float64 for float64).
        steps (int): Time steps (frames / tubelet_size) that the layer states cover.
        mean (Tensor): (batch, channels) float32 (float64 for float64), the mean of all tokens
            output so far.
        count (int): Time steps output so far.
        grid (tuple, optional): Rows and columns of patches; None before the first chunk.
        pending (Tensor, optional): (batch, tokens, channels), embedded steps waiting for later
            frames ('lookahead' only).
        model (str): Kind of model that the state belongs to.
    """

    layers: tuple[MambaState, ...]
    steps: int
    mean: Tensor
    count: int
    grid: tuple[int, int] | None
    pending: Tensor | None
    model: str

    @property
    def batch_size(self) -> int:
        """Number of streams."""
        return self.mean.shape[0]

    def _map(self, function: Callable[[Tensor], Tensor]) -> VideoState:
        return replace(
            self,
            layers=tuple(MambaState(*map(function, layer)) for layer in self.layers),
            mean=function(self.mean),
            pending=None if self.pending is None else function(self.pending),
        )

    def detach(self) -> VideoState:
        """Return the state detached from its history, so that gradients stop here."""
        return self._map(lambda x: x.detach())

    def reorder(self, index: Tensor) -> VideoState:
        """Return the state of other streams: stream ``i`` is now what stream ``index[i]`` was.

        Args:
            index (Tensor): (new batch,) int64, on the state's device; may repeat and omit
                streams.
        """
        return self._map(lambda x: x.index_select(0, index))

    def nbytes(self) -> int:
        """Memory of all tensors in bytes."""
        tensors = [x for layer in self.layers for x in layer]
        tensors += [self.mean] if self.pending is None else [self.mean, self.pending]
        return sum(x.numel() * x.element_size() for x in tensors)
