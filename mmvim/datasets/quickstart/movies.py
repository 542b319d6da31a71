"""Movies of a handwritten digit that keeps drifting through a small picture."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .digits import DIGIT_CLASSES, Digits, load_digits
from .errors import require

#: Direction (rows, columns) of a digit; it moves ``MOVIE_SPEED`` times that per frame.
DIRECTIONS: dict[str, tuple[int, int]] = {
    'up': (-1, 0),
    'down': (1, 0),
    'left': (0, -1),
    'right': (0, 1),
}

#: Digit and direction: '0 up', '0 down' .. '9 right'.
VIDEO_CLASSES: tuple[str, ...] = tuple(f'{d} {way}' for d in DIGIT_CLASSES for way in DIRECTIONS)

#: Movies per split. Each digit of a split is shown about as often as any other.
MOVIE_COUNTS: dict[str, int] = {'train': 3600, 'val': 360, 'test': 720}

MOVIE_SIZE = 32  # pixels, height and width
MOVIE_FRAMES = 16
MOVIE_DIGIT_HEIGHT = (16, 20)  # pixels
MOVIE_SPEED = 2  # pixels per frame
_FRAMES_PER_SECOND = 8
_BIT_RATE = 1_000_000
_NOISE = 8.0  # standard deviation of the background noise, in grey levels


class Movie(NamedTuple):
    """One movie.

    Attributes:
        frames: (16, 32, 32) uint8 grey levels.
        label: position in ``VIDEO_CLASSES``.
        source: position of the digit in scikit-learn's data set.
    """

    frames: np.ndarray
    label: int
    source: int


class MovieGenerator:
    """Generator of the movies of one split, from its own digits.

    A digit moves along the middle of the picture, from a random start. What leaves on one side
    re-enters on the other. So a single frame, or all frames in unknown order, may show whether a
    digit moves vertically or horizontally, but not in which of the two directions.

    Args:
        split: 'train', 'val' or 'test'.
        digits: digits to draw from. Defaults to those of ``split``.
        seed: seed of the whole data set.

    Raises:
        QuickstartDataError: scikit-learn or pillow is not installed.
        ValueError: unknown split.
    """

    def __init__(self, split: str, digits: Digits | None = None, seed: int = 0) -> None:
        if split not in MOVIE_COUNTS:
            raise ValueError(f'split must be one of {sorted(MOVIE_COUNTS)}, got {split!r}')
        self._image = require('PIL.Image')
        self._digits = load_digits()[split] if digits is None else digits
        self._seed = [seed, list(MOVIE_COUNTS).index(split)]

    def __call__(self, index: int) -> Movie:
        """Make movie ``index``, which depends only on the seed, the split and ``index``."""
        rng = np.random.default_rng([*self._seed, index])
        count = len(self._digits.labels)
        chosen = index % count
        # A digit's directions take turns, so that no class is rare.
        way = (index // count + chosen + int(self._digits.labels[chosen])) % len(DIRECTIONS)
        canvas = np.zeros((MOVIE_SIZE, MOVIE_SIZE), np.float32)
        height = int(rng.integers(MOVIE_DIGIT_HEIGHT[0], MOVIE_DIGIT_HEIGHT[1] + 1))
        ink = self._image.fromarray(np.rint(self._digits.images[chosen] * 255).astype(np.uint8))
        ink = np.asarray(ink.resize((height, height), self._image.Resampling.BICUBIC), np.float32)
        canvas[:height, :height] = ink * rng.uniform(0.7, 1.0)
        step = np.array(list(DIRECTIONS.values())[way]) * MOVIE_SPEED
        start = MOVIE_SPEED * rng.integers(0, MOVIE_SIZE // MOVIE_SPEED, 2)
        start[step == 0] = (MOVIE_SIZE - height) // 2
        frames = np.stack(
            [np.roll(canvas, tuple(start + t * step), (0, 1)) for t in range(MOVIE_FRAMES)]
        )
        frames += rng.normal(24, _NOISE, frames.shape)
        label = int(self._digits.labels[chosen]) * len(DIRECTIONS) + way
        return Movie(
            frames.clip(0, 255).round().astype(np.uint8), label, int(self._digits.indices[chosen])
        )


def write_video(root: Path, sizes: Mapping[str, int]) -> Iterator[None]:
    """Write ``root/<split>/*.mp4``, the lists ``root/<split>.txt`` and ``root/classes.txt``.

    A list has a line ``file label`` for each movie, the 'list' layout of
    :class:`mmvim.VideoDataset`. The files are MPEG-4, which every FFmpeg can write and read.

    Args:
        root: an existing, empty folder.
        sizes: split name to number of movies.

    Yields:
        After each file.
    """
    for split, count in sizes.items():
        (root / split).mkdir()
        generate = MovieGenerator(split)
        lines = []
        for index in range(count):
            movie = generate(index)
            name = f'digit_{split}_{index + 1:05d}.mp4'
            encode(movie.frames, root / split / name)
            lines.append(f'{name} {movie.label}\n')
            yield
        (root / f'{split}.txt').write_text(''.join(lines))
        yield
    (root / 'classes.txt').write_text('\n'.join(VIDEO_CLASSES) + '\n')
    yield


def encode(frames: np.ndarray, path: Path) -> None:
    """Write (count, height, width) uint8 grey frames as an MPEG-4 file."""
    av = require('av')
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('mpeg4', rate=_FRAMES_PER_SECOND)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = 'yuv420p'
        stream.bit_rate = _BIT_RATE
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='gray')))
        container.mux(stream.encode())
