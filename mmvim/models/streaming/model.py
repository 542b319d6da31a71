"""VideoMamba that reads a video chunk by chunk."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmvim._checks import check_choice, check_flags, check_positive
from mmvim.layers import MambaState

from ..backbones.videomamba import VideoMamba
from .mixing import mix_blocks, mix_part
from .state import VideoState

STREAM_MODES = ('causal', 'block', 'lookahead')
_BACKWARD_KEYS = r'layers\.\d+\.mixer\.(conv1d_b\.|x_proj_b\.|dt_proj_b\.|A_b_log$|D_b$)'

Mix = Callable[[int, Tensor], Tensor]


class StreamingVideoMamba(VideoMamba):
    """VideoMamba for streams of any length, with a state of constant size between chunks.

    A backward scan needs the future, so the bidirectional VideoMamba itself cannot be computed on
    a stream. ``stream_mode`` chooses what is computed instead:

    - 'causal': one direction only. Chunks of any size give exactly the result of the whole video.
    - 'block': the forward direction runs through; the backward one (convolution and scan) restarts
      at the end of each block of ``block_frames``. On chunks that are whole blocks this is exactly
      what :meth:`forward` computes on the whole video. It is not the full bidirectional model.
    - 'lookahead': a frame is output once ``lookahead_frames`` more frames have arrived, and the
      backward direction begins at the last of them. This approximates the full bidirectional model,
      better with a longer look-ahead, and equals it where this reaches the end of the video.

    ``forward(x)`` without a state processes a whole video and is used for training: 'causal' and
    'block' as above, 'lookahead' fully bidirectional. ``forward(x, state=…)`` processes the next
    chunk. The class token is the first token of a stream; it is never output and cannot be pooled.

    Temporal positions are absolute: the position embedding is resized once, to ``max_frames``, and
    does not depend on where a chunk ends.

    Args:
        arch (str | dict): As in :class:`mmvim.VideoMamba`.
        num_frames (int): As in :class:`mmvim.VideoMamba`. Defaults to 8.
        stream_mode (str): 'causal', 'block' or 'lookahead'. Defaults to 'causal'.
        block_frames (int, optional): Frames of a block; 'block' needs it.
        lookahead_frames (int, optional): Frames of look-ahead, 0 or more; 'lookahead' needs it.
        max_frames (int, optional): Frames that the temporal position embedding spans. Defaults to
            None: ``num_frames``.
        beyond (str): Treatment of frames after ``max_frames``: 'error', or 'clamp' to give them the
            last position. Defaults to 'error'.
        pool (str): 'avg', the mean of all tokens so far, or 'last', the mean of the last time
            step's tokens. Defaults to 'avg'.
        bimamba (str, optional): 'v2' or 'none'. Defaults to None: 'none' for 'causal', else 'v2'.
        drop_backward (bool): Whether a 'causal' model takes the weights of a bidirectional one
            without its backward branch, which results in a different model, to be fine-tuned.
            Defaults to False.
        **kwargs: Arguments of :class:`mmvim.VideoMamba`, other than out_type, out_indices, out_norm
            and keep_temporal.

    Raises:
        ValueError: If arguments contradict each other, as in a bidirectional causal model.

    Example:
        >>> model = StreamingVideoMamba(arch='tiny', num_frames=8, max_frames=3000).eval()
        >>> state = model.init_state(batch_size=1)
        >>> for chunk in torch.randn(3, 1, 3, 4, 224, 224):
        ...     tokens, pooled, state = model(chunk, state=state)
        >>> tokens.shape, pooled.shape
        (torch.Size([1, 4, 196, 192]), torch.Size([1, 192]))
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        *,
        num_frames: int = 8,
        stream_mode: str = 'causal',
        block_frames: int | None = None,
        lookahead_frames: int | None = None,
        max_frames: int | None = None,
        beyond: str = 'error',
        pool: str = 'avg',
        bimamba: str | None = None,
        drop_backward: bool = False,
        **kwargs: object,
    ) -> None:
        check_choice('stream_mode', stream_mode, STREAM_MODES)
        check_choice('beyond', beyond, ('error', 'clamp'))
        check_choice('bimamba', bimamba, (None, 'v2', 'none'))
        check_flags(drop_backward=drop_backward)
        if pool not in ('avg', 'last'):
            raise ValueError(
                f"pool={pool!r}: a stream's class token is its first token and sees nothing of "
                "what follows; allowed: 'avg', 'last'"
            )
        for name in ('out_type', 'out_indices', 'out_norm', 'keep_temporal'):
            if name in kwargs:
                raise ValueError(f'{name} is no argument of a streaming model')
        causal = stream_mode == 'causal'
        if bimamba is None:
            bimamba = 'none' if causal else 'v2'
        if drop_backward and not causal:
            raise ValueError(f'drop_backward=True has no effect with stream_mode={stream_mode!r}')
        if causal and bimamba == 'v2' and not drop_backward:
            raise ValueError(
                "stream_mode='causal' cannot compute bimamba='v2': its backward direction needs "
                "the future. Use 'block' or 'lookahead', or drop_backward=True to leave that "
                'direction out'
            )
        if not causal and bimamba != 'v2':
            raise ValueError(f"stream_mode={stream_mode!r} needs bimamba='v2', not {bimamba!r}")
        super().__init__(
            arch,
            num_frames=num_frames,
            bimamba='none' if causal else bimamba,
            pool='avg',
            **kwargs,
        )
        self.stream_mode = stream_mode
        self.stream_pool = pool
        self.drop_backward = drop_backward
        self.beyond = beyond
        self.max_steps = self._steps_of(
            'max_frames', num_frames if max_frames is None else max_frames
        )
        for name, value, mode in (
            ('block_frames', block_frames, 'block'),
            ('lookahead_frames', lookahead_frames, 'lookahead'),
        ):
            if (value is None) is (stream_mode == mode):
                raise ValueError(
                    f'{name}={value!r} with stream_mode={stream_mode!r}: {mode!r} needs it and '
                    'no other mode takes it'
                )
        self.block_steps = (
            None if block_frames is None else self._steps_of('block_frames', block_frames)
        )
        self.lookahead_steps = (
            self._steps_of('lookahead_frames', lookahead_frames) if lookahead_frames else 0
        )

    def _steps_of(self, name: str, frames: int) -> int:
        check_positive(**{name: frames})
        if frames % self.tubelet_size:
            raise ValueError(f'{name}={frames} is no multiple of tubelet_size={self.tubelet_size}')
        return frames // self.tubelet_size

    def _translate(self, state_dict: MutableMapping, prefix: str) -> None:
        super()._translate(state_dict, prefix)
        if self.drop_backward:
            dropped = [k for k in state_dict if re.match(re.escape(prefix) + _BACKWARD_KEYS, k)]
            for key in dropped:
                del state_dict[key]
            if dropped:
                self._log(
                    f'left out {len(dropped)} tensors of the backward direction; the model is '
                    'another one than the checkpoint is of',
                    logging.WARNING,
                )

    @property
    def _signature(self) -> str:
        mixer = self.layers[0].mixer
        return (
            f'{self.stream_mode}, {self.num_layers} layers, {mixer.d_inner} channels, '
            f'{mixer.d_state} states, {mixer.discretization}'
        )

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> VideoState:
        """Return the state before the first frame.

        Args:
            batch_size (int): Number of streams.
            device (torch.device, optional): The device. Defaults to the parameters' device.
            dtype (torch.dtype, optional): Dtype of the chunks. Defaults to the parameters' dtype.
        """
        check_positive(batch_size=batch_size)
        layers = tuple(layer.mixer._zero_state(batch_size, device, dtype) for layer in self.layers)
        mean = layers[0].ssm.new_zeros(batch_size, self.embed_dims)
        return VideoState(layers, 0, mean, 0, None, None, self._signature)

    def _check_state(self, state: VideoState, x: Tensor | None = None) -> None:
        if not isinstance(state, VideoState):
            raise TypeError(f'state must be a VideoState of init_state, got {type(state).__name__}')
        if state.model != self._signature:
            raise ValueError(
                f'the state is of a model of {state.model}; this one is of {self._signature}'
            )
        if x is None:
            return
        if self.block_steps is not None and state.steps % self.block_steps:
            raise ValueError(
                f'the chunk before ended inside a block, after {state.steps} steps of blocks of '
                f'{self.block_steps}; only the last chunk of a stream may'
            )
        conv = state.layers[0].conv
        if x.dim() == 5 and x.shape[0] != state.batch_size:
            raise ValueError(
                f'the chunk is of {x.shape[0]} streams and the state of {state.batch_size}'
            )
        if x.dtype != conv.dtype:
            raise ValueError(f'the chunk is {x.dtype} and the state {conv.dtype}')
        if x.device != conv.device:
            raise ValueError(f'the chunk is on {x.device} and the state on {conv.device}')

    def _temporal(self, start: int, steps: int) -> Tensor:
        """Temporal position embedding (1, steps, channels) of the steps from ``start`` on."""
        if start + steps > self.max_steps and self.beyond == 'error':
            raise ValueError(
                f'frames {start * self.tubelet_size} .. {(start + steps) * self.tubelet_size - 1} '
                f'go beyond max_frames={self.max_steps * self.tubelet_size}; give a larger '
                "max_frames, or beyond='clamp'"
            )
        table = self.temporal_pos_embedding
        index = torch.arange(start, start + steps, device=table.device).clamp(
            max=self.max_steps - 1
        )
        if self.max_steps == self.num_steps:
            return table[:, index]
        # Linear interpolation with half-pixel centres, as resize_temporal_pos_embed.
        place = (index.double() + 0.5) * (self.num_steps / self.max_steps) - 0.5
        place = place.clamp(0, self.num_steps - 1)
        low = place.floor().long()
        high = (low + 1).clamp(max=self.num_steps - 1)
        weight = (place - low).to(table.dtype)[:, None]
        return torch.lerp(table[:, low], table[:, high], weight)

    def _embed_part(
        self,
        x: Tensor,
        start: int,
        positions_in_time: bool = True,
        temporal: Tensor | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """Embed the frames from step ``start`` on; the class token goes before step 0."""
        patches, grid = self.patch_embed(x)
        if positions_in_time and temporal is None:
            temporal = self._temporal(start, patches.shape[1])
        return self._with_positions(patches, grid, temporal, with_token=start == 0), grid

    def _run(self, hidden: Tensor, mix: Mix, recompute: bool = False) -> Tensor:
        """Run all layers with ``mix(index, normed)`` in place of their mixers, and the norm."""
        residual = None
        for i, layer in enumerate(self.layers):
            hidden, residual = layer.norm(hidden, residual, return_residual=True)
            if recompute:
                hidden = checkpoint(mix, i, hidden, use_reentrant=False)
            else:
                hidden = mix(i, hidden)
            hidden = self._drop_path_after(i)(hidden)
        return self._stream(self.num_layers - 1, hidden, residual)

    def _whole(self, i: int, hidden: Tensor, blocks: list[int] | None) -> Tensor:
        mixer = self.layers[i].mixer
        return mixer(hidden) if blocks is None else mix_blocks(mixer, hidden, blocks)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Process a whole video, as ``forward(x)`` does.

        Args:
            x (Tensor): (batch, in_channels, frames, height, width).

        Returns:
            Tensor: (batch, steps, rows * columns, channels), normed, without the class token.
        """
        hidden, grid = self._embed_part(x, 0)
        per_step = math.prod(grid)
        blocks = None
        if self.stream_mode == 'block':
            steps = (hidden.shape[1] - self.num_extra_tokens) // per_step
            blocks = [
                min(self.block_steps, steps - start) * per_step
                for start in range(0, steps, self.block_steps)
            ]
            blocks[0] += self.num_extra_tokens
        recompute = self.with_cp and self.training
        tokens = self._run(hidden, partial(self._whole, blocks=blocks), recompute)
        return tokens[:, self.num_extra_tokens :].unflatten(1, (-1, per_step))

    def forward(
        self, x: Tensor, state: VideoState | None = None
    ) -> tuple[Tensor, ...] | tuple[Tensor, Tensor, VideoState]:
        """Process a whole video, or the next chunk of a stream.

        Args:
            x (Tensor): (batch, in_channels, frames, height, width); the frames are a multiple of
                ``tubelet_size``, and in mode 'block' of ``block_frames`` (except in the last chunk
                of a stream).
            state (VideoState, optional): From :meth:`init_state` or the previous chunk; not
                modified. Defaults to None: ``x`` is a whole video.

        Returns:
            tuple: Without a state, as other backbones: one tensor (batch, channels), pooled. With
            a state: the tokens of the steps output by this call (batch, steps, rows * columns,
            channels), normed; the pooled features (batch, channels); the new state. In mode
            'lookahead' there may be fewer steps than in the input, or none.

        Raises:
            TypeError: If the state is not a VideoState.
            ValueError: If shapes, dtypes, sizes or frames do not fit the state.
        """
        if state is None:
            tokens = self.forward_tokens(x)
            return (tokens.mean((1, 2)) if self.stream_pool == 'avg' else tokens[:, -1].mean(1),)
        return self._chunk(x, state)

    def _chunk(
        self,
        x: Tensor,
        state: VideoState,
        temporal: Tensor | None = None,
        share: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, VideoState]:
        """Process the next chunk.

        Everything that depends on the number of steps so far can be passed in: the chunk's
        ``temporal`` embedding (1, steps, channels), and the ``share`` () of the output steps in the
        running mean.
        """
        self._check_state(state, x)
        waiting = 0 if state.pending is None else self._pending_steps(state)
        hidden, grid = self._embed_part(x, state.steps + waiting, temporal=temporal)
        if state.grid not in (None, grid):
            raise ValueError(f'the chunk has {grid} patches and the chunks before had {state.grid}')
        state = replace(state, grid=grid)
        if state.pending is not None:
            hidden = torch.cat((state.pending, hidden), dim=1)
            state = replace(state, pending=None)
        steps = waiting + x.shape[2] // self.tubelet_size
        if self.stream_mode == 'causal':
            return self._advance(hidden, state, steps, share)
        if self.stream_mode == 'block' and steps > self.block_steps:
            return self._advance_blocks(hidden, state, steps)
        if self.stream_mode == 'block':
            return self._advance(hidden, state, steps, share)
        return self._advance(hidden, state, steps - self.lookahead_steps, share)

    def flush(self, state: VideoState) -> tuple[Tensor, Tensor, VideoState]:
        """Output the frames that still wait for their look-ahead, at the end of a stream.

        Args:
            state (VideoState): The state; not modified.

        Returns:
            tuple: As :meth:`forward` with a state; without steps if none were waiting.
        """
        self._check_state(state)
        if state.pending is None:
            return self._nothing(state)
        hidden, steps = state.pending, self._pending_steps(state)
        return self._advance(hidden, replace(state, pending=None), steps)

    def _pending_steps(self, state: VideoState) -> int:
        tokens = state.pending.shape[1] - (self.num_extra_tokens if state.steps == 0 else 0)
        return tokens // math.prod(state.grid)

    def _nothing(self, state: VideoState) -> tuple[Tensor, Tensor, VideoState]:
        conv = state.layers[0].conv
        patches = 0 if state.grid is None else math.prod(state.grid)
        tokens = conv.new_empty(state.batch_size, 0, patches, self.embed_dims)
        return tokens, state.mean.to(conv.dtype), state

    def _advance_blocks(
        self, hidden: Tensor, state: VideoState, steps: int
    ) -> tuple[Tensor, Tensor, VideoState]:
        per_step, done, outputs = math.prod(state.grid), 0, []
        while done < steps:
            size = min(self.block_steps, steps - done)
            tokens = size * per_step + (self.num_extra_tokens if state.steps == 0 else 0)
            part, hidden = hidden[:, :tokens], hidden[:, tokens:]
            out, pooled, state = self._advance(part, state, size)
            outputs.append(out)
            done += size
        return torch.cat(outputs, dim=1), pooled, state

    def _advance(
        self, hidden: Tensor, state: VideoState, steps: int, share: Tensor | None = None
    ) -> tuple[Tensor, Tensor, VideoState]:
        """Output ``steps`` steps of ``hidden``; the rest waits."""
        if steps <= 0:
            return self._nothing(replace(state, pending=hidden))
        per_step = math.prod(state.grid)
        start = self.num_extra_tokens if state.steps == 0 else 0
        keep = start + steps * per_step
        layers: list[MambaState] = []

        def mix(i: int, x: Tensor) -> Tensor:
            mixer = self.layers[i].mixer
            if self.stream_mode == 'causal':
                out, new = mixer(x, state.layers[i], return_state=True)
            else:
                out, new = mix_part(mixer, x, state.layers[i], keep)
            layers.append(new)
            return out

        tokens = self._run(hidden, mix)[:, start:keep].unflatten(1, (steps, per_step))
        count = state.count + steps
        news = tokens.to(state.mean.dtype).mean((1, 2)) - state.mean
        mean = state.mean + news * (steps / count if share is None else share)
        pending = hidden[:, keep:] if keep < hidden.shape[1] else None
        new = replace(
            state,
            layers=tuple(layers),
            steps=state.steps + steps,
            mean=mean,
            count=count,
            pending=pending,
        )
        pooled = mean.to(tokens.dtype) if self.stream_pool == 'avg' else tokens[:, -1].mean(1)
        return tokens, pooled, new
