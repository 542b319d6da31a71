"""Refusal of input that would crash pycocotools."""

import math

import numpy as np
import pytest

from mmvim import compat

compat.install()
masks = pytest.importorskip('pycocotools.mask')
SIZE = [24, 40]


@pytest.mark.parametrize(
    ('segmentation', 'message'),
    [
        ({'size': [10**9, 10**9], 'counts': [100, 200]}, r'must be \[height, width\], got'),
        ({'size': [24], 'counts': [960]}, r'must be \[height, width\], got \[24\]'),
        ({'size': SIZE, 'counts': [200, 660]}, 'of 24 x 40 pixels add up to 860'),
        ({'size': SIZE, 'counts': [-5, 965]}, 'must be 0 or more, got -5'),
        ({'size': SIZE, 'counts': [None, 960]}, 'must be 0 or more, got None'),
        ([[0, 0, 1e9, 0, 1e9, 1e9]], 'a number up to 1048576, got 1000000000.0'),
        ([[0, 0, math.inf, 0, 9, 9]], 'got inf'),
        ([[0, 0, math.nan, 0, 9, 9]], 'got nan'),
        ([[0, 0, None, 0, 9, 9]], 'got None'),
    ],
)
def test_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        masks.frPyObjects(segmentation, *SIZE)


def test_whole_masks_pass():
    runs = masks.frPyObjects({'size': SIZE, 'counts': [100, 200, 660]}, *SIZE)
    assert masks.decode(runs).sum() == 200
    polygons = masks.frPyObjects([[0, 0, 10, 0, 10, 10, 0, 10], [20, 0, 30, 0, 30, 10]], *SIZE)
    assert masks.decode(polygons).shape == (*SIZE, 2)
    boxes = masks.frPyObjects(np.array([[1.0, 2.0, 3.0, 4.0]]), *SIZE)
    assert masks.decode(masks.merge(boxes)).sum() == 12
    with pytest.raises(ValueError, match='must be'):
        masks.decode({'size': [10**6, 10**6], 'counts': b'04'})
