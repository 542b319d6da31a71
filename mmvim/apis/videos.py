"""Input and output of video files."""

import glob
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from mmvim.datasets.video import VideoSampleError
from mmvim.datasets.video.frames import holds_frames
from mmvim.datasets.video.reader import require_av

SUFFIXES = ('.mp4', '.mkv', '.webm', '.avi', '.mov', '.m4v', '.mpg', '.mpeg', '.ts', '.gif')


def find_videos(inputs: str | Path | Sequence[str | Path]) -> list[str]:
    """List videos: a file, a folder, a pattern, or several of these.

    Of a folder these are its video files, sorted; without any, the folder itself if it holds a
    video's frames as pictures, else its subfolders that do.

    Raises:
        VideoSampleError: There is no such file, no video in the folder, or no match.
    """
    if not isinstance(inputs, str | Path):
        return [video for part in inputs for video in find_videos(part)]
    name = str(inputs)
    if os.path.isdir(name):
        found = sorted(
            e.path for e in os.scandir(name) if e.name.lower().endswith(SUFFIXES) and e.is_file()
        )
        if not found and holds_frames(name):
            return [name]
        found = found or sorted(e.path for e in os.scandir(name) if holds_frames(e.path))
        if not found:
            raise VideoSampleError(f'no video in the folder {name!r} (of {", ".join(SUFFIXES)})')
        return found
    if not os.path.exists(name) and glob.has_magic(name):
        found = sorted(
            p for p in glob.glob(name, recursive=True) if os.path.isfile(p) or holds_frames(p)
        )
        if not found:
            raise VideoSampleError(f'no file matches {name!r}')
        return found
    if not os.path.exists(name):
        raise VideoSampleError(f'the video {name!r} does not exist')
    return [name]


class VideoWriter:
    """Writer of frames to an H.264 file (MPEG-4 if the encoder is missing).

    Args:
        path: File to write; its suffix determines the container.
        rate: Frames per second.

    Raises:
        ImportError: PyAV is not installed.
    """

    def __init__(self, path: str | Path, rate: float) -> None:
        self._av = require_av()
        self._container = self._av.open(str(path), 'w')
        codec = 'libx264' if 'libx264' in self._av.codecs_available else 'mpeg4'
        self._stream = self._container.add_stream(
            codec, rate=Fraction(rate).limit_denominator(1001)
        )
        self._size: tuple[int, int] | None = None

    def write(self, picture: np.ndarray) -> None:
        """Append an RGB picture (height, width, 3); all are resized to the first one."""
        if self._size is None:
            # The encoders require even sizes.
            height, width = (side + side % 2 for side in picture.shape[:2])
            self._size = height, width
            self._stream.height, self._stream.width = height, width
            self._stream.pix_fmt = 'yuv420p'
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format='rgb24')
        frame = frame.reformat(width=self._size[1], height=self._size[0])
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file."""
        if self._size is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def __enter__(self) -> 'VideoWriter':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
