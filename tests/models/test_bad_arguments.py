"""Each argument of what configs name refuses values of another type, and says which it was."""

import pytest
import torch

from mmvim.datasets.video import (
    LoadVideo,
    PackVideo,
    RandomErasingVideo,
    RepeatAugment,
    ThreeCrop,
    VideoDataset,
    VideoTransform,
)
from mmvim.models import MambaVision, SimpleFPN, VideoDataPreprocessor, VideoMamba, Vim
from mmvim.utils.argument_types import parameters

PLAIN = {'embed_dims': 8, 'depth': 1, 'd_state': 2, 'd_conv': 4, 'expand': 2, 'dt_rank': 1}
HYBRID = {
    'depths': (1, 1, 1, 1), 'embed_dims': 4, 'stem_dims': 4, 'num_heads': (1, 1), 'd_state': 2,
    'window_sizes': (2, 2), 'mlp_ratio': 1, 'drop_path_rate': 0.0, 'layer_scale': None,
    'd_conv': 3, 'expand': 1,
}  # fmt: skip
PARTS = {
    Vim: {'arch': PLAIN, 'img_size': 32},
    VideoMamba: {'arch': PLAIN, 'img_size': 32, 'num_frames': 2},
    MambaVision: {'arch': HYBRID},
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


@pytest.mark.parametrize('key', [*PLAIN])
def test_arch_of_plain_models(key):
    for value in (*WRONG, -1, 'NoSuchName'):
        with pytest.raises((TypeError, ValueError), match=key if 'dims' not in key else 'embed|d_'):
            Vim(arch={**PLAIN, key: value})


@pytest.mark.parametrize('key', [*HYBRID])
def test_arch_of_the_hybrid_model(key):
    for value in (*WRONG, 'NoSuchName'):
        with pytest.raises((TypeError, ValueError), match=key):
            MambaVision(arch={**HYBRID, key: value})


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
