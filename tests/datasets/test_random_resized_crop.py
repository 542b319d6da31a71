import numpy as np
import pytest
import torch
from mmengine.registry import TRANSFORMS
from PIL import Image
from torchvision.transforms import RandomResizedCrop as Crops

import mmvim  # noqa: F401
from mmvim.datasets import RandomResizedCrop

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (61, 83, 3), np.uint8)
FILTERS = {'bilinear': Image.BILINEAR, 'bicubic': Image.BICUBIC}


def cropped(image, seed, **options):
    torch.manual_seed(seed)
    results = RandomResizedCrop(**options)({'img': image.copy()})
    torch.manual_seed(seed)
    ranges = [options.get('crop_ratio_range', (0.08, 1)), (3 / 4, 4 / 3)]
    top, left, height, width = Crops.get_params(torch.empty(1, *image.shape[:2]), *ranges)
    assert results['img_shape'] == results['img'].shape
    return results['img'], image[top : top + height, left : left + width]


@pytest.mark.parametrize('interpolation', FILTERS)
@pytest.mark.parametrize('scale', [24, (40, 17), (90, 120)])
def test_is_that_of_pillow(interpolation, scale):
    size = (scale, scale) if isinstance(scale, int) else scale
    seen = set()
    for seed in range(8):
        image, crop = cropped(NOISE, seed, scale=scale, interpolation=interpolation)
        expected = np.asarray(Image.fromarray(crop).resize(size[::-1], FILTERS[interpolation]))
        assert image.dtype == np.uint8
        assert image.shape == (*size, 3)
        difference = abs(image.astype(int) - expected)
        assert difference.max() <= 2
        assert (difference > 1).mean() < 1e-3
        seen.add(crop.shape)
    assert len(seen) > 4


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize('channels', [(), (1,), (4,), (13,)])
def test_any_type_and_number_of_channels(dtype, channels):
    image = (RNG.random((33, 47, *channels)) * 250).astype(dtype)
    image[0] = 0  # overshoots of the bicubic filter
    image[1:3] = 1 if dtype == np.float32 else np.iinfo(dtype).max
    out, crop = cropped(image, 1, scale=16, crop_ratio_range=(0.7, 1), interpolation='bicubic')
    assert out.shape == (16, 16, *channels)
    assert out.dtype == dtype
    planes = np.atleast_3d(crop).transpose(2, 0, 1).astype(np.float32)
    wide = [np.asarray(Image.fromarray(plane).resize((16, 16), Image.BICUBIC)) for plane in planes]
    expected = np.stack(wide, -1).reshape(out.shape)
    if dtype != np.float32:
        expected = np.clip(expected.round(), np.iinfo(dtype).min, np.iinfo(dtype).max)
    error = abs(out.astype(np.float64) - expected)
    assert error.max() <= (1 if dtype != np.float32 else 1e-3)


def test_is_a_transform_of_configs():
    transform = TRANSFORMS.build(dict(type='mmvim.RandomResizedCrop', scale=8))
    assert isinstance(transform, RandomResizedCrop)
    assert 'scale=(8, 8)' in repr(transform)
    assert "'bilinear'" in repr(transform)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(scale=0), 'scale=0'),
        (dict(scale=(8, -1)), 'scale=-1'),
        (dict(scale=(8, 8, 8)), r'scale=\(8, 8, 8\)'),
        (dict(scale=8, crop_ratio_range=(1, 0.5)), r'crop_ratio_range=\(1, 0.5\)'),
        (dict(scale=8, aspect_ratio_range=(0, 1)), r'aspect_ratio_range=\(0, 1\)'),
        (dict(scale=8, interpolation='lanczos'), "interpolation='lanczos'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        RandomResizedCrop(**options)
