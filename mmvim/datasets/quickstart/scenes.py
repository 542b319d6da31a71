"""Scenes of handwritten digits of several sizes on textured photographs."""

from typing import NamedTuple

import numpy as np

from .digits import Digits, load_digits
from .errors import require

#: Photographs per split, all shipped with scikit-image. Whole photographs are held out, so no pixel
#: of a test scene was seen in training.
PHOTOS: dict[str, tuple[str, ...]] = {
    'train': (
        'astronaut',
        'brick',
        'camera',
        'grass',
        'hubble_deep_field',
        'immunohistochemistry',
        'moon',
        'retina',
        'stereo_motorcycle',
    ),
    'val': ('coins', 'rocket'),
    'test': ('chelsea', 'coffee', 'gravel'),
}

#: Scenes per split.
SCENE_COUNTS: dict[str, int] = {'train': 3200, 'val': 100, 'test': 200}

SCENE_SIZE = 128  # pixels, height and width
DIGITS_PER_SCENE = (4, 8)
DIGIT_HEIGHT = (36, 64)  # pixels, before rotation
_CROP_SIDE = (110, 300)  # pixels of the photograph that become one scene
_MAX_ROTATION = 12.0  # degrees
_GAP = 2  # pixels kept free between digits
_INK = 0.55  # ink coverage at which the stroke's outline lies
_EDGE = 0.12  # half width, in ink coverage, of the blended rim


class PlacedDigit(NamedTuple):
    """One digit in a scene.

    Attributes:
        label: 0-9.
        source: position in scikit-learn's data set.
        box: (x1, y1, x2, y2) in pixels, the extent of the pixels with ``alpha >= 0.5``.
        alpha: (y2 - y1, x2 - x1) float32 opacity in [0, 1] inside the box.
    """

    label: int
    source: int
    box: tuple[int, int, int, int]
    alpha: np.ndarray


class Scene(NamedTuple):
    """A composed image.

    Attributes:
        image: (128, 128, 3) uint8 RGB.
        digits: the placed digits, which never overlap.
        photo: name of the photograph.
        alpha: (128, 128) float32, opacity of the digits over the photograph.
        labels: (128, 128) int64, digit class where ``alpha > 0``, else -1.
    """

    image: np.ndarray
    digits: list[PlacedDigit]
    photo: str
    alpha: np.ndarray
    labels: np.ndarray


class SceneGenerator:
    """Generator of the scenes of one split, from its own digits and photographs.

    Scene ``i`` depends only on the seed, the split and ``i``, not on earlier scenes.

    Args:
        split: 'train', 'val' or 'test'.
        digits: digits to draw from. Defaults to those of ``split``.
        seed: seed of the whole data set.

    Raises:
        QuickstartDataError: scikit-learn or scikit-image is not installed.
        ValueError: unknown split.
    """

    def __init__(self, split: str, digits: Digits | None = None, seed: int = 0) -> None:
        if split not in PHOTOS:
            raise ValueError(f'split must be one of {sorted(PHOTOS)}, got {split!r}')
        self._photos = {name: _load_photo(name) for name in PHOTOS[split]}
        self._digits = load_digits()[split] if digits is None else digits
        self._key = (seed, list(PHOTOS).index(split))

    def __call__(self, index: int) -> Scene:
        """Compose scene ``index``."""
        rng = np.random.default_rng([*self._key, index])
        name = str(rng.choice(list(self._photos)))
        image = _crop(self._photos[name], rng)
        alpha = np.zeros((SCENE_SIZE, SCENE_SIZE), np.float32)
        labels = np.full((SCENE_SIZE, SCENE_SIZE), -1, np.int64)
        taken = np.zeros((SCENE_SIZE, SCENE_SIZE), bool)
        placed: list[PlacedDigit] = []
        for _ in range(rng.integers(DIGITS_PER_SCENE[0], DIGITS_PER_SCENE[1] + 1)):
            chosen = int(rng.integers(len(self._digits.labels)))
            opacity = _render(self._digits.images[chosen], rng)
            corner = _find_place(taken, opacity.shape, rng)
            if corner is None:
                continue
            y, x = corner
            h, w = opacity.shape
            window = np.s_[y : y + h, x : x + w]
            colour = _contrasting_colour(image[window], opacity, rng)
            image[window] += opacity[..., None] * (colour - image[window])
            label = int(self._digits.labels[chosen])
            alpha[window] = opacity
            labels[window][opacity > 0] = label
            taken[max(y - _GAP, 0) : y + h + _GAP, max(x - _GAP, 0) : x + w + _GAP] = True
            placed.append(_placed(label, int(self._digits.indices[chosen]), opacity, y, x))
        return Scene(np.clip(np.rint(image), 0, 255).astype(np.uint8), placed, name, alpha, labels)


def _load_photo(name: str) -> np.ndarray:
    """(h, w, 3) uint8 RGB."""
    photo = getattr(require('skimage.data'), name)()
    if name == 'stereo_motorcycle':
        photo = photo[0]  # left view; the right one is nearly the same picture
    if photo.ndim == 2:
        photo = np.repeat(photo[..., None], 3, axis=-1)
    return np.ascontiguousarray(photo[..., :3])


def _crop(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random square of the photograph as (128, 128, 3) float32, brightness jittered."""
    image_module = require('PIL.Image')
    height, width = photo.shape[:2]
    limit = min(height, width)
    side = int(rng.integers(min(_CROP_SIDE[0], limit), min(_CROP_SIDE[1], limit) + 1))
    y = int(rng.integers(height - side + 1))
    x = int(rng.integers(width - side + 1))
    patch = image_module.fromarray(photo[y : y + side, x : x + side])
    patch = patch.resize((SCENE_SIZE, SCENE_SIZE), image_module.Resampling.LANCZOS)
    out = np.asarray(patch, np.float32)
    if rng.random() < 0.5:
        out = out[:, ::-1]
    return np.clip(out * rng.uniform(0.75, 1.25), 0, 255)


def _render(digit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Opacity (h, w) of a digit at a random size and rotation, cut to its visible extent."""
    ndimage = require('scipy.ndimage')
    height = np.exp(rng.uniform(*np.log(DIGIT_HEIGHT)))
    # A border of zeros closes strokes that touch the edge of the 8x8 cell.
    ink = ndimage.zoom(np.pad(digit, 1), height / digit.shape[0], order=3)
    ink = ndimage.rotate(ink, rng.uniform(-_MAX_ROTATION, _MAX_ROTATION), order=1)
    opacity = np.clip((ink - _INK + _EDGE) / (2 * _EDGE), 0, 1).astype(np.float32)
    ys, xs = np.nonzero(opacity > 0)
    return opacity[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def _find_place(
    taken: np.ndarray, shape: tuple[int, int], rng: np.random.Generator, tries: int = 40
) -> tuple[int, int] | None:
    """A free top left corner, or None if the scene is too full."""
    h, w = shape
    if h > taken.shape[0] or w > taken.shape[1]:
        return None
    for _ in range(tries):
        y = int(rng.integers(taken.shape[0] - h + 1))
        x = int(rng.integers(taken.shape[1] - w + 1))
        if not taken[y : y + h, x : x + w].any():
            return y, x
    return None


def _contrasting_colour(
    background: np.ndarray, opacity: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(3,) float32 RGB, light on a dark ground and dark on a light one, of any hue."""
    under = background[opacity >= 0.5].mean(axis=0)
    luminance = float(under @ np.array([0.299, 0.587, 0.114], np.float32))
    tint = rng.uniform(0, 70, 3)
    return (255 - tint if luminance < 128 else tint).astype(np.float32)


def _placed(label: int, source: int, opacity: np.ndarray, y: int, x: int) -> PlacedDigit:
    ys, xs = np.nonzero(opacity >= 0.5)
    y1, y2, x1, x2 = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    box = (int(x + x1), int(y + y1), int(x + x2), int(y + y2))
    return PlacedDigit(label, source, box, opacity[y1:y2, x1:x2])
