"""Refusal of arguments of wrong types, by name, in components other than backbones."""

import pytest
import torch

from mmvim._arguments import parameters
from mmvim.datasets.video import (
    LoadVideo,
    PackVideo,
    RandomErasingVideo,
    RepeatAugment,
    ThreeCrop,
    VideoDataset,
    VideoTransform,
)
from mmvim.models import SimpleFPN, VideoDataPreprocessor

PARTS = {
    SimpleFPN: {'in_channels': 8, 'out_channels': 8},
    VideoDataPreprocessor: {},
    LoadVideo: {'sampling': 'dense'},
    RandomErasingVideo: {},
    ThreeCrop: {'size': 8},
    RepeatAugment: {'transforms': []},
    PackVideo: {},
    VideoTransform: {'name': 'Resize', 'size': 8},
    VideoDataset: {'ann_file': 'a.txt', 'lazy_init': True},
}
# Checked by mmengine when they are used, or by mmpretrain.
OTHERS = {
    'init_cfg', 'metainfo', 'data_root', 'filter_cfg', 'indices', 'serialize_data', 'pipeline',
    'test_mode', 'lazy_init', 'max_refetch', 'transforms', 'batch_augments', 'non_blocking',
}  # fmt: skip
WRONG = ([2j], {'a': 7}, 2j)


def arguments(part: type) -> list[str]:
    return [p.name for p in parameters(part) if p.name not in OTHERS]


CASES = [(part, name) for part in PARTS for name in arguments(part)]


@pytest.mark.parametrize('part', PARTS)
def test_right_arguments(part):
    part(**PARTS[part])


@pytest.mark.parametrize(('part', 'name'), CASES, ids=lambda x: getattr(x, '__name__', x))
def test_other_types_are_refused(part, name):
    for value in WRONG:
        with pytest.raises((TypeError, ValueError), match=rf'\b{name}\b'):
            part(**{**PARTS[part], name: value})


def transformed(name: str, **options: object) -> torch.Tensor:
    frames = torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8)
    return VideoTransform(name=name, **options)({'frames': frames})['frames']


def test_options_of_torchvision():
    assert transformed('Resize', size=8, interpolation='bilinear').shape == (1, 2, 3, 8, 8)
    with pytest.raises(TypeError, match=r"'Resize' has no option 'sise'; allowed: size, interpol"):
        transformed('Resize', sise=8)
    with pytest.raises(TypeError, match="'Resize' needs the option 'size'"):
        transformed('Resize')
    for value in (['x'], {'a': 7}):
        with pytest.raises(ValueError, match='RandAugment: magnitude='):
            transformed('RandAugment', magnitude=value)
    with pytest.raises(ValueError, match='Resize: interpolation='):
        transformed('Resize', size=8, interpolation=['x'])
    with pytest.raises(ValueError, match='Resize: size='):
        transformed('Resize', size={'a': 7})
