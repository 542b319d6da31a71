"""Folders of frames, one picture each, read like a video file."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterator, Sequence

import numpy as np

from .errors import VideoSampleError
from .reader import Frames, VideoReader

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
_NUMBERED = re.compile(r'(.*?)(\d+)(\.\w+)')


def open_video(
    path: str | os.PathLike, num_threads: int = 1, frame_template: str | None = None
) -> VideoReader | FrameFolder:
    """Open a video file, or a folder of frames.

    Args:
        path: A video file, or the folder of one video's frames.
        num_threads: Decoding threads of a file. Defaults to 1.
        frame_template: Names of a folder's frames; see :class:`FrameFolder`. Defaults to None.

    Raises:
        VideoSampleError: It cannot be read.
    """
    if os.path.isdir(path):
        return FrameFolder(path, frame_template)
    return VideoReader(path, num_threads)


def holds_frames(path: str | os.PathLike) -> bool:
    """Whether a path is a folder with pictures."""
    return os.path.isdir(path) and any(
        name.lower().endswith(_SUFFIXES) for name in os.listdir(path)
    )


def check_template(template: str) -> tuple[str, str]:
    """The texts around the number in a template such as ``'img_{:05}.jpg'``.

    Raises:
        ValueError: It is not a file name with one place for a number.
    """
    try:
        parts = list(string.Formatter().parse(template))
        example = template.format(1)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError):
        parts, example = [], ''
    places = [part for part in parts if part[1] is not None]
    if len(places) != 1 or os.path.basename(example) != example or '1' not in example:
        raise ValueError(
            f'frame_template={template!r} must be a file name with one place for the number of '
            "the frame, such as 'img_{:05}.jpg'"
        )
    index = parts.index(places[0])
    before = ''.join(part[0] for part in parts[: index + 1])
    return before, ''.join(part[0] for part in parts[index + 1 :])


class FrameFolder(Frames):
    """The frames of a video as pictures in a folder, in the order of their numbers.

    Like :class:`VideoReader`. Counting may start at any number; none may be missing after it.

    Args:
        path (str | os.PathLike): The folder.
        template (str, optional): The frames' names as a format string with the number, such as
            ``'img_{:05}.jpg'`` or ``'{:06d}.png'``; other files are ignored. Defaults to None: all
            pictures, whose names may differ in their last number only.

    Raises:
        ValueError: If the template has no place for a number.
        VideoSampleError: There is no such folder or frame, a frame is missing, or the names leave
            the order open.
    """

    def __init__(self, path: str | os.PathLike, template: str | None = None) -> None:
        self.path = os.fspath(path)
        if not os.path.isdir(self.path):
            raise VideoSampleError(f'the folder of frames {self.path!r} does not exist')
        names = sorted(os.listdir(self.path))
        if template is None:
            numbers = self._of_any_name(names)
        else:
            before, after = check_template(template)
            numbers = {
                int(found): name
                for name in names
                if name.startswith(before)
                and name.endswith(after)
                and (found := name[len(before) : len(name) - len(after)]).isdecimal()
                and template.format(int(found)) == name
            }
        if not numbers:
            wanted = template or f'*{", *".join(_SUFFIXES)}'
            raise VideoSampleError(f'the folder {self.path!r} has no frames named {wanted}')
        first = min(numbers)
        absent = [n for n in range(first, max(numbers)) if n not in numbers]
        if absent:
            raise VideoSampleError(
                f'the folder {self.path!r} lacks frame {absent[0]} of {first} .. {max(numbers)}'
            )
        self._names = [numbers[n] for n in sorted(numbers)]

    def _of_any_name(self, names: list[str]) -> dict[int, str]:
        numbers: dict[int, str] = {}
        kinds: dict[tuple[str, str], str] = {}
        for name in names:
            if not name.lower().endswith(_SUFFIXES):
                continue
            found = _NUMBERED.fullmatch(name)
            if found is None:
                raise VideoSampleError(
                    f'the frame {os.path.join(self.path, name)!r} has no number; '
                    'frame_template says which pictures are frames'
                )
            number = int(found[2])
            kinds.setdefault((found[1], found[3]), name)
            if len(kinds) > 1 or number in numbers:
                other = numbers.get(number) or next(iter(kinds.values()))
                raise VideoSampleError(
                    f'the folder {self.path!r} has frames of several kinds, {other!r} and '
                    f'{name!r}; frame_template says which are meant'
                )
            numbers[number] = name
        return numbers

    def __len__(self) -> int:
        return len(self._names)

    @property
    def timestamps(self) -> np.ndarray:
        """(frames,) float64 seconds at which each frame is shown, at 25 a second."""
        return np.arange(len(self)) / 25

    def __iter__(self) -> Iterator[np.ndarray]:
        """All frames in order, (height, width, 3) uint8 RGB, one at a time.

        Raises:
            VideoSampleError: A frame cannot be read.
        """
        return self._pictures(range(len(self)))

    def _pictures(self, wanted: Sequence[int]) -> Iterator[np.ndarray]:
        size = None
        for index in wanted:
            picture = self._read(index, size)
            size = size or picture.shape[:2]
            yield picture

    def _read(self, index: int, size: tuple[int, int] | None) -> np.ndarray:
        from PIL import Image

        path = os.path.join(self.path, self._names[index])
        try:
            with Image.open(path) as image:
                picture = image.convert('RGB')
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise VideoSampleError(f'the frame {path!r} cannot be read: {error}') from error
        if size is not None and picture.size != size[::-1]:
            picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
        return np.array(picture)
