"""Real handwritten digits, alone and on photographs, in the formats the task libraries load.

``prepare('cls' | 'det' | 'seg', root)`` writes a folder-per-class PNG tree, a COCO tree or an
ADE20K-style tree. The pixels come from the data that scikit-learn and scikit-image ship inside
their packages, so nothing is downloaded.
"""

from .build import TASKS, QuickstartDataError, prepare
from .digits import DIGIT_CLASSES, SPLIT_SIZES, Digits, load_digits
from .scenes import PHOTOS, SCENE_COUNTS, PlacedDigit, Scene, SceneGenerator
from .writers import SEG_CLASSES, SEG_PALETTE

__all__ = [
    'DIGIT_CLASSES',
    'PHOTOS',
    'SCENE_COUNTS',
    'SEG_CLASSES',
    'SEG_PALETTE',
    'SPLIT_SIZES',
    'TASKS',
    'Digits',
    'PlacedDigit',
    'QuickstartDataError',
    'Scene',
    'SceneGenerator',
    'load_digits',
    'prepare',
]
