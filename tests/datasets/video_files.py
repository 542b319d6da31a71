"""Tiny real video files."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def coded_frames(count, height=48, width=64):
    """Grey frames whose level tells their number, bright enough apart to survive compression."""
    levels = (np.arange(count) * 37 % 200 + 30).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def write_video(
    path, frames, fps=25, codec='mpeg4', pts=None, gop=12, options=None, pixel_aspect=None
):
    """Write (count, height, width, 3) uint8 RGB frames; ``pts`` in 1/1000 s make the rate vary."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w', options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = 'yuv420p'
        stream.bit_rate = 2_000_000
        stream.gop_size = gop
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format='rgb24')
            if pts is not None:
                frame.time_base = Fraction(1, 1000)
                frame.pts = int(pts[i])
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def set_display_matrix(path, a, b, c, d):
    """Write a display matrix, in whole numbers, into the track header of an MP4 file."""
    content = bytearray(path.read_bytes())
    start = content.index(b'tkhd') + 4
    # ISO/IEC 14496-12, 8.3.2: version and flags, times and lengths, then 16 bytes, then the matrix.
    start += 4 + (32 if content[start] else 20) + 16
    values = (a, b, 0, c, d, 0, 0, 0, 1)
    scales = (16, 16, 30) * 3
    fixed = (value << scale for value, scale in zip(values, scales, strict=True))
    content[start : start + 36] = struct.pack('>9i', *fixed)
    path.write_bytes(content)
    return path
