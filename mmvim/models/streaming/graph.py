"""Steps of a stream as one CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmvim._cuda_graphs import without_garbage_collection
from mmvim.layers import MambaState

from .model import StreamingVideoMamba
from .state import VideoState

_WARM_UPS = 2


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    tokens: Tensor
    pooled: Tensor
    state: VideoState


class GraphedStream:
    """Call a :class:`mmvim.StreamingVideoMamba` chunk by chunk through a CUDA graph.

    A chunk of one frame takes hundreds of small kernels, which the host launches more slowly than
    the GPU runs them. This class records them once, for the first chunk of a shape in a running
    stream, and replays them; earlier chunks (the first, and those that fill a look-ahead) run
    normally. Results are those of the model, in new tensors; states can be kept, reordered and
    reused.

    Parameters are read in place: they may change in place, but not move to another device or dtype.
    Autocast is part of the recording.

    Args:
        model (StreamingVideoMamba): The model, in evaluation mode, on a CUDA device. In mode
            'block' a chunk must be one block.

    Raises:
        TypeError: If the model is of another class.
        ValueError: If it is on another device or in training mode, or a chunk has several blocks.

    Example:
        >>> step = GraphedStream(model.cuda().eval())
        >>> state = model.init_state(batch_size=1)
        >>> for frame in frames:  # (1, 3, 1, 224, 224) each
        ...     tokens, pooled, state = step(frame, state)
    """

    def __init__(self, model: StreamingVideoMamba) -> None:
        if not isinstance(model, StreamingVideoMamba):
            raise TypeError(f'model must be a StreamingVideoMamba, got {type(model).__name__}')
        device = model.pos_embed.device
        if device.type != 'cuda':
            raise ValueError(f'a CUDA graph needs a model on a CUDA device; this is on {device}')
        if model.training:
            raise ValueError('the model is in training mode; call model.eval() first')
        self.model = model
        self._recordings: dict[tuple, _Recording] = {}
        self._table: Tensor | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, state: VideoState) -> tuple[Tensor, Tensor, VideoState]:
        """Process the next chunk, as ``model(x, state=state)`` does without gradients."""
        model = self.model
        model._check_state(state, x)
        steps = x.shape[2] // model.tubelet_size
        if model.block_steps is not None and steps > model.block_steps:
            raise ValueError(
                f'a chunk of {steps} steps is more than a block of {model.block_steps}; give a '
                'GraphedStream one block at a time'
            )
        waiting = 0
        if state.pending is not None and state.steps:
            waiting = model._pending_steps(state)
        if state.steps == 0 or waiting != model.lookahead_steps or x.requires_grad:
            return model(x, state=state)
        start = state.steps + waiting
        share = steps / (state.count + steps)
        key = _key(x, state)
        if key not in self._recordings:
            self._recordings[key] = self._record(x, state, start, share)
        recording = self._recordings[key]
        torch._foreach_copy_(
            recording.inputs[1:], [self._temporal(start, steps), x, *_tensors(state)]
        )
        recording.inputs[0].fill_(share)
        recording.graph.replay()
        return _copied(recording, state, steps)

    def _temporal(self, start: int, steps: int) -> Tensor:
        if start + steps > self.model.max_steps:
            return self.model._temporal(start, steps)
        if self._table is None:
            self._table = self.model._temporal(0, self.model.max_steps)
        return self._table[:, start : start + steps]

    def _record(self, x: Tensor, state: VideoState, start: int, share: float) -> _Recording:
        steps = x.shape[2] // self.model.tubelet_size
        state = state._map(torch.clone)
        inputs = [
            torch.full((), share, dtype=state.mean.dtype, device=x.device),
            self._temporal(start, steps).clone(),
            x.clone(),
            *_tensors(state),
        ]

        def step() -> tuple[Tensor, Tensor, VideoState]:
            share, temporal, chunk = inputs[:3]
            return self.model._chunk(chunk, state, temporal, share)

        device = x.device
        # Weights that autocast has cast outside must not be captured in the graph.
        enabled, dtype = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
        with torch.autocast('cuda', dtype, enabled, cache_enabled=False), torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with without_garbage_collection(), torch.cuda.graph(graph):
                outputs = step()
        return _Recording(graph, inputs, *outputs)


def _tensors(state: VideoState) -> list[Tensor]:
    tensors = [state.mean, *(x for layer in state.layers for x in layer)]
    return tensors if state.pending is None else [*tensors, state.pending]


def _key(x: Tensor, state: VideoState) -> tuple:
    """Conditions under which a recording is valid: shapes, dtypes, autocast, inference mode."""
    tensors = [x, *_tensors(state)]
    shapes = tuple((tuple(t.shape), t.dtype) for t in tensors)
    autocast = torch.is_autocast_enabled('cuda') and torch.get_autocast_dtype('cuda')
    return shapes, state.grid, autocast, torch.is_inference_mode_enabled()


def _copied(
    recording: _Recording, before: VideoState, steps: int
) -> tuple[Tensor, Tensor, VideoState]:
    """The results, copied to new tensors."""
    results = [recording.tokens, recording.pooled, *_tensors(recording.state)]
    copies = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in results]
    torch._foreach_copy_(copies, results)
    tokens, pooled, mean, *rest = copies
    pending = rest.pop() if recording.state.pending is not None else None
    layers = tuple(MambaState(*rest[i : i + 2]) for i in range(0, len(rest), 2))
    state = replace(
        before,
        layers=layers,
        mean=mean,
        pending=pending,
        steps=before.steps + steps,
        count=before.count + steps,
    )
    return tokens, pooled, state
