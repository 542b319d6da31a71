"""One step of a stream as an ONNX file: states go in and come out."""

import os
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmvim.layers import MambaState
from mmvim.models.streaming import StreamingVideoMamba, VideoState

from .formats import TOLERANCES, ExportError, open_exported, write_onnx

OUTPUTS = ('tokens', 'pooled', 'next_step', 'next_conv', 'next_ssm', 'next_mean')


class StreamStep(nn.Module):
    """A :class:`mmvim.StreamingVideoMamba` as a function of a chunk and its states.

    Args:
        model: A model in mode 'causal' or 'block'.
        first: Whether the chunk is the first of its stream, which begins with the class token.

    Raises:
        ValueError: The model is in another mode.
    """

    def __init__(self, model: StreamingVideoMamba, first: bool) -> None:
        super().__init__()
        if model.stream_mode not in ('causal', 'block'):
            raise ValueError(
                f"stream_mode={model.stream_mode!r}: only 'causal' and 'block' have states of a "
                'constant size'
            )
        self.model = model
        self.first = first
        self.register_buffer('table', model._temporal(0, model.max_steps).detach().squeeze(0))

    def forward(
        self, frames: Tensor, step: Tensor, conv: Tensor, ssm: Tensor, mean: Tensor
    ) -> tuple[Tensor, ...]:
        """Process a chunk.

        Args:
            frames: (batch, channels, frames, height, width).
            step: (1,) int64, time steps (frames / tubelet size) before this chunk.
            conv: (batch, layers, d_inner, d_conv - 1), states of the convolutions.
            ssm: (batch, layers, d_inner, d_state), states of the scans.
            mean: (batch, channels), mean of all tokens so far.

        Returns:
            Tokens (batch, steps, patches, channels), pooled features (batch, channels), and step,
            conv, ssm and mean for the next chunk. All of them are 0 before the first one.
        """
        model = self.model
        steps = frames.shape[2] // model.tubelet_size
        place = step + torch.arange(steps)
        if model.beyond == 'clamp':
            place = place.clamp(max=model.max_steps - 1)
        layers = map(MambaState, conv.unbind(1), ssm.unbind(1))
        before = 0 if self.first else model.block_steps or 1
        state = VideoState(tuple(layers), before, mean, before, None, None, model._signature)
        share = steps / (step + steps).to(mean.dtype)
        tokens, pooled, state = model._chunk(frames, state, self.table[place][None], share)
        conv, ssm = (torch.stack(states, 1) for states in zip(*state.layers, strict=True))
        return tokens, pooled, step + steps, conv, ssm, state.mean


def export_stream(
    model: StreamingVideoMamba,
    out: str | Path,
    chunk_shape: Sequence[int],
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    tolerance: float = TOLERANCES['float32'],
    opset: int | None = None,
    custom_ops: bool = False,
) -> dict[Path, float]:
    """Export a streaming model to two ONNX files, for the first chunk and for all others.

    Their inputs and outputs are those of :meth:`StreamStep.forward`, the outputs named
    :data:`OUTPUTS`. The batch is variable.

    Args:
        model: A model in mode 'causal' or 'block', whose chunks are then whole blocks.
        out: File for all chunks but the first; that one's gets the ending ``_first.onnx``.
        chunk_shape: (batch, channels, frames, height, width) of a chunk.
        metadata: Stored in the files. Defaults to None.
        overwrite: Whether the files may exist. Defaults to False.
        tolerance: Largest difference, relative to outputs above 1, over four chunks.
        opset: Version of the ONNX operators, 18 or later. Defaults to None: 18.
        custom_ops: As for :func:`mmvim.export.formats.export_model`. Defaults to False.

    Returns:
        The largest difference of each file.

    Raises:
        ValueError: An argument is invalid.
        FileExistsError: A file exists.
        ExportError: The model cannot be exported, or the files' outputs differ; no file remains.
    """
    out = Path(out)
    if out.suffix != '.onnx':
        raise ValueError(f'{str(out)!r} must end with .onnx')
    if len(chunk_shape) != 5 or any(side < 1 for side in chunk_shape):
        raise ValueError(
            'chunk_shape must be (batch, channels, frames, height, width), '
            f'got {tuple(chunk_shape)}'
        )
    files = {True: out.with_name(f'{out.stem}_first.onnx'), False: out}
    for file in files.values():
        if file.exists() and not overwrite:
            raise FileExistsError(f'{str(file)!r} exists; it is not overwritten unless you say so')
    model = model.cpu().float().eval().requires_grad_(False)
    batch = max(chunk_shape[0], 2)
    frames = torch.rand(batch, *chunk_shape[1:])
    inputs = {'frames': frames, **start_of_stream(model, batch)}
    temporary = {first: out.with_name(f'.{uuid.uuid4().hex[:8]}.onnx') for first in files}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for first, path in temporary.items():
                about = {**(metadata or {}), 'first_chunk': first, 'chunk': list(chunk_shape[1:])}
                step = StreamStep(model, first)
                write_onnx(step, inputs, OUTPUTS, 'batch', about, path, opset, custom_ops)
        differences = _compare(model, temporary, (batch + 1, *chunk_shape[1:]))
        if not max(differences.values()) <= tolerance:
            raise ExportError(f'the exported files differ from the model: {differences}')
        for first, path in temporary.items():
            os.replace(path, files[first])
    except (ExportError, ImportError, ValueError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ['']
        raise ExportError(f'cannot be exported: {type(error).__name__}: {lines[0]}') from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return {files[first]: difference for first, difference in differences.items()}


def start_of_stream(model: StreamingVideoMamba, batch: int) -> dict[str, Tensor]:
    """The states before the first chunk."""
    state = model.init_state(batch)
    conv, ssm = (torch.stack(states, 1) for states in zip(*state.layers, strict=True))
    return {
        'step': torch.zeros(1, dtype=torch.int64),
        'conv': conv,
        'ssm': ssm,
        'mean': state.mean,
    }


def _compare(
    model: StreamingVideoMamba, files: Mapping[bool, Path], shape: Sequence[int]
) -> dict[bool, float]:
    """The largest difference of each file over four chunks, or as many as the model allows."""
    generator = torch.Generator().manual_seed(0)
    runs = {first: open_exported(path) for first, path in files.items()}
    states = {name: x.numpy() for name, x in start_of_stream(model, shape[0]).items()}
    state, differences = model.init_state(shape[0]), dict.fromkeys(files, 0.0)
    count = min(4, max(model.max_steps * model.tubelet_size // shape[2], 1))
    for i in range(4 if model.beyond == 'clamp' else count):
        frames = torch.randn(shape, generator=generator)
        with torch.no_grad():
            *expected, state = model(frames, state=state)
        tokens, pooled, *rest = runs[i == 0]({'frames': frames.numpy(), **states})
        states = dict(zip(states, rest, strict=True))
        for given, right in zip((tokens, pooled), expected, strict=True):
            right = right.numpy()
            error = np.max(np.abs(given - right) / np.maximum(1, np.abs(right)))
            differences[i == 0] = max(differences[i == 0], float(error))
    return differences
