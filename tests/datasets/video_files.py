"""Tiny real video files."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def coded_frames(count, height=48, width=64):
    """Grey frames whose level tells their number, bright enough apart to survive compression."""
    levels = (np.arange(count) * 37 % 200 + 30).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def write_video(path, frames, fps=25, codec='mpeg4', pts=None, gop=12, options=None):
    """Write (count, height, width, 3) uint8 RGB frames; ``pts`` in 1/1000 s make the rate vary."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w', options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = 'yuv420p'
        stream.bit_rate = 2_000_000
        stream.gop_size = gop
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
