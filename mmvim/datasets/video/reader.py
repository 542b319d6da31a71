"""Random access to the frames of a video file, through PyAV."""

from __future__ import annotations

import bisect
import errno
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import VideoSampleError

# FFmpeg goes by content: a file named .mp4 may be a playlist or a script that opens files or URLs
# of its choice. The formats below contain everything they show.
_CONTAINERS = (
    '3gp,aac,apng,asf,av1,avi,dv,flac,flv,gif,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mp3,mp4,mpeg,'
    'mpegts,mpegvideo,mxf,nut,obu,ogg,rm,vc1,vvc,wav,webm,wtv,yuv4mpegpipe'
)


def require_av() -> ModuleType:
    """Import PyAV.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "video files need PyAV, which is not installed: pip install 'mmvim[video]'"
        ) from error
    return av


def _as_shown(frame: Any, size: tuple[int, int]) -> np.ndarray:
    """A decoded frame as (height, width, 3) RGB of ``size``, then rotated as its header says.

    The display matrix (ISO/IEC 14496-12, 8.3.2) maps the position (x, y) of a pixel to
    (a x + c y, b x + d y); it is stored as a, b, 0, c, d, 0, ...
    """
    width, height = size
    picture = frame.to_ndarray(format='rgb24', width=width, height=height)
    for item in frame.side_data:
        if getattr(item.type, 'name', None) == 'DISPLAYMATRIX':
            a, b, _, c, d = np.frombuffer(bytes(item), np.int32, count=5).tolist()
            if abs(b) + abs(c) > abs(a) + abs(d):
                picture, a, d = picture.transpose(1, 0, 2), c, b
            picture = picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(picture)


class Frames:
    """Frames of a video by number: the common part of files and folders."""

    path: str

    def __len__(self) -> int:
        raise NotImplementedError

    def _pictures(self, wanted: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames of ascending numbers, (height, width, 3) uint8 RGB, of the size of the first."""
        raise NotImplementedError

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Read frames.

        Args:
            indices (Sequence[int]): Numbers of frames from 0, in any order, possibly repeated.

        Returns:
            Tensor: (len(indices), 3, height, width) uint8, RGB; all have the size of the first.

        Raises:
            IndexError: A number is negative or not below the number of frames.
            VideoSampleError: A frame cannot be read.
        """
        wanted = sorted({int(i) for i in indices})
        if not wanted:
            raise ValueError('no frames were requested')
        if wanted[0] < 0 or wanted[-1] >= len(self):
            raise IndexError(
                f'frames {wanted[0]} .. {wanted[-1]} of {self.path!r}, which has {len(self)}'
            )
        found = dict(zip(wanted, map(torch.from_numpy, self._pictures(wanted)), strict=True))
        return torch.stack([found[int(i)] for i in indices]).permute(0, 3, 1, 2)

    def close(self) -> None:
        """Release what reading needs."""

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VideoReader(Frames):
    """Frames of the first video stream of a file, by number.

    Opening reads the file's packets once without decoding them, which yields the number of frames
    and their display times. Frames are counted as they are stored, even where their rate varies.
    :meth:`frames` then decodes from the nearest keyframe before each requested frame.

    Frames appear as in a player: rotated and mirrored by the header's display matrix (phones write
    one; other angles are rounded to quarter turns), and stretched horizontally to square pixels.
    Interlaced frames stay interlaced.

    Args:
        path (str | os.PathLike): A regular file.
        num_threads (int): Decoding threads. Defaults to 1, which suits data-loading workers.

    Raises:
        ImportError: PyAV is not installed.
        VideoSampleError: The file is missing, not a regular file, empty, damaged, has no video, or
            is a playlist or another kind of file that refers to others.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int = 1) -> None:
        av = require_av()
        self.path = os.fspath(path)
        self._error = av.error.FFmpegError
        if not os.path.exists(self.path):
            raise VideoSampleError(f'the video {self.path!r} does not exist')
        # Opening a pipe would wait for a writer.
        if not os.path.isfile(self.path):
            raise VideoSampleError(f'the video {self.path!r} is no regular file')
        if os.path.getsize(self.path) == 0:
            raise VideoSampleError(f'the video {self.path!r} is empty (0 bytes)')
        options: dict = {'options': {'format_whitelist': _CONTAINERS, 'protocol_whitelist': 'file'}}
        if int(av.__version__.partition('.')[0]) < 19:
            # Titles that are not UTF-8 are no error: later versions always ignore them.
            options['metadata_errors'] = 'ignore'
        try:
            # FFmpeg would take the relative path http:/a/b.mp4 for a URL.
            self._container = av.open(os.path.abspath(self.path), **options)
        except (self._error, ValueError) as error:
            if getattr(error, 'errno', None) == errno.EINVAL:
                reason = 'a playlist, or of a kind that is not read'
            else:
                reason = getattr(error, 'strerror', None) or error
            raise VideoSampleError(f'cannot open the video {self.path!r}: {reason}') from error
        try:
            if not self._container.streams.video:
                raise VideoSampleError(f'{self.path!r} has no video stream')
            self._stream = self._container.streams.video[0]
            if self._stream.codec_context is None:
                raise VideoSampleError(
                    f'the video {self.path!r} is damaged, or coded in a way that PyAV does not know'
                )
            self._stream.codec_context.thread_count = num_threads
            self._index()
        except BaseException:
            self.close()
            raise

    def _index(self) -> None:
        pts, keys, packets, end = [], [], 0, 0
        try:
            for packet in self._container.demux(self._stream):
                if packet.size == 0:
                    continue
                packets += 1
                end = max(end, (packet.pts or 0) + (packet.duration or 0))
                if packet.is_discard:
                    continue
                pts.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
        except self._error as error:
            raise VideoSampleError(
                f'the video {self.path!r} is truncated or damaged: {error}'
            ) from error
        if not pts:
            raise VideoSampleError(f'the video {self.path!r} has no frames')
        # One figure alone is also wrong where an edit list hides a part of the file.
        stream = self._stream
        whole = (stream.start_time or 0) + (stream.duration or 0)
        if packets < stream.frames and end < 0.95 * whole:
            raise VideoSampleError(
                f'the video {self.path!r} is truncated: its header tells of {stream.frames} '
                f'frames and {packets} are there'
            )
        # Files without display times, or with the same one twice, are decoded from their start.
        self._seekable = None not in pts and len(set(pts)) == len(pts) and bool(keys)
        if self._seekable:
            self._pts, self._keys = sorted(pts), sorted(keys)
            self._count = len(pts)
        else:
            self._count = sum(1 for _ in self._decode_from(None))
            if not self._count:
                raise VideoSampleError(f'no frame of the video {self.path!r} can be decoded')

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[np.ndarray]:
        """All frames in order, (height, width, 3) uint8 RGB, one at a time.

        Raises:
            VideoSampleError: A frame cannot be decoded.
        """
        return self._shown(self._decode_from(None))

    def _shown(self, frames: Iterator) -> Iterator[np.ndarray]:
        size = None
        for frame in frames:
            # A stream may change its size; all frames get the size of the first.
            size = size or self._square_size(frame)
            yield _as_shown(frame, size)

    @property
    def timestamps(self) -> np.ndarray:
        """(frames,) float64 seconds at which each frame is shown, the first at 0."""
        if not self._seekable:
            return np.arange(self._count) / float(self._stream.average_rate or 1)
        return (np.array(self._pts) - self._pts[0]) * float(self._stream.time_base)

    def _decode_from(self, pts: int | None) -> Iterator:
        """Decoded frames from the keyframe at or before ``pts``; None is the start."""
        try:
            if pts is None:
                self._container.seek(0, backward=True)
            else:
                self._container.seek(pts, stream=self._stream, backward=True)
            yield from self._container.decode(self._stream)
        except self._error as error:
            raise VideoSampleError(f'the video {self.path!r} cannot be decoded: {error}') from error

    def _pictures(self, wanted: Sequence[int]) -> Iterator[np.ndarray]:
        return self._shown(self._by_time(wanted) if self._seekable else self._by_order(wanted))

    def _square_size(self, frame: Any) -> tuple[int, int]:
        """Width and height of a stored frame after stretching to square pixels."""
        ratio = self._stream.sample_aspect_ratio or 1
        return max(round(frame.width * ratio), 1), frame.height

    def _by_order(self, wanted: Sequence[int]) -> Iterator:
        remaining = iter(wanted)
        target = next(remaining)
        for index, frame in enumerate(self._decode_from(None)):
            if index == target:
                yield frame
                target = next(remaining, None)
                if target is None:
                    return
        raise VideoSampleError(f'frame {target} of the video {self.path!r} cannot be decoded')

    def _by_time(self, wanted: Sequence[int]) -> Iterator:
        source, before, current = iter(()), None, None
        for index in wanted:
            target = self._pts[index]
            key = self._keys[max(bisect.bisect_right(self._keys, target) - 1, 0)]
            if current is None or key > current.pts:
                source, before = self._decode_from(key), None
                current = self._next(source)
                if current is None or current.pts > target:  # the seek went too far
                    source = self._decode_from(None)
                    current = self._next(source)
            while current is not None and current.pts < target:
                before, current = current, self._next(source)
            if current is None:
                raise VideoSampleError(
                    f'the video {self.path!r} ends before frame {index} of {self._count}: '
                    'it is truncated or damaged'
                )
            # A packet may hold no frame to show: then the previous one stays visible.
            yield before if current.pts > target and before is not None else current

    @staticmethod
    def _next(source: Iterator):
        """The next frame whose time is known; None at the end."""
        return next((frame for frame in source if frame.pts is not None), None)

    def close(self) -> None:
        """Close the file."""
        self._container.close()
