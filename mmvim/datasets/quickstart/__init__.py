"""Real handwritten digits, alone, on photographs and moving, in standard formats.

``prepare('cls' | 'det' | 'seg' | 'video', root)`` writes a folder-per-class PNG tree, a COCO tree,
an ADE20K-style tree or video files with lists. The pixels come from the data that scikit-learn and
scikit-image ship in their packages, so nothing is downloaded.
"""

from .build import TASKS, QuickstartDataError, prepare
from .digits import DIGIT_CLASSES, SPLIT_SIZES, Digits, load_digits
from .movies import DIRECTIONS, MOVIE_COUNTS, VIDEO_CLASSES, Movie, MovieGenerator
from .scenes import PHOTOS, SCENE_COUNTS, PlacedDigit, Scene, SceneGenerator
from .writers import SEG_CLASSES, SEG_PALETTE

__all__ = [
    'DIGIT_CLASSES',
    'DIRECTIONS',
    'MOVIE_COUNTS',
    'PHOTOS',
    'SCENE_COUNTS',
    'SEG_CLASSES',
    'SEG_PALETTE',
    'SPLIT_SIZES',
    'TASKS',
    'VIDEO_CLASSES',
    'Digits',
    'Movie',
    'MovieGenerator',
    'PlacedDigit',
    'QuickstartDataError',
    'Scene',
    'SceneGenerator',
    'load_digits',
    'prepare',
]
