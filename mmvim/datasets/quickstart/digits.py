"""The 1,797 handwritten digits of scikit-learn, in fixed splits."""

from typing import NamedTuple

import numpy as np

from .errors import require

DIGIT_CLASSES: tuple[str, ...] = tuple('0123456789')

#: Digits per split: the best checkpoint is chosen on ``val``, accuracy is reported on ``test``.
SPLIT_SIZES: dict[str, int] = {'train': 1257, 'val': 180, 'test': 360}

_SPLIT_SEED = 0


class Digits(NamedTuple):
    """Digits of one split.

    Attributes:
        images: (m, 8, 8) float32 ink coverage in [0, 1].
        labels: (m,) int64, 0-9.
        indices: (m,) int64 positions in scikit-learn's data set.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


def load_digits() -> dict[str, Digits]:
    """Load the digits, stratified by class into the splits of ``SPLIT_SIZES``.

    Returns:
        Split name to :class:`Digits`; the splits are disjoint and complete.

    Raises:
        QuickstartDataError: scikit-learn is not installed.
    """
    datasets = require('sklearn.datasets')
    train_test_split = require('sklearn.model_selection').train_test_split

    bunch = datasets.load_digits()
    images = (bunch.images / 16.0).astype(np.float32)
    labels = bunch.target.astype(np.int64)
    rest, test = train_test_split(
        np.arange(len(labels)),
        test_size=SPLIT_SIZES['test'],
        stratify=labels,
        random_state=_SPLIT_SEED,
    )
    train, val = train_test_split(
        rest, test_size=SPLIT_SIZES['val'], stratify=labels[rest], random_state=_SPLIT_SEED
    )
    splits = {'train': train, 'val': val, 'test': test}
    return {
        name: Digits(images[index], labels[index], index)
        for name, index in ((n, np.sort(i)) for n, i in splits.items())
    }
