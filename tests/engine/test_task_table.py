"""Heads that must match the classes of the data set."""

import pytest
from torch import nn

from mmvim.engine.tasks import TASKS


def head(name: str, count: object = 5) -> nn.Module:
    module = type(name, (nn.Module,), {})()
    module.num_classes = count
    return module


def model(name: str = 'Model', **parts: nn.Module) -> nn.Module:
    module = type(name, (nn.Module,), {})()
    for key, part in parts.items():
        setattr(module, key, part)
    return module


@pytest.mark.parametrize(
    ('scope', 'parts', 'expected'),
    [
        ('mmpretrain', {'head': head('LinearClsHead')}, {'model.head.num_classes': 5}),
        ('mmpretrain', {'head': head('Head', None)}, {}),
        ('mmpretrain', {}, {}),
        ('mmdet', {'bbox_head': head('RetinaHead')}, {'model.bbox_head.num_classes': 5}),
        ('mmdet', {'bbox_head': head('RPNHead', 1)}, {}),
        (
            'mmdet',
            {
                'rpn_head': head('RPNHead', 1),
                'roi_head': model(bbox_head=nn.ModuleList([head('A'), head('B', 6)])),
            },
            {
                'model.roi_head.bbox_head.0.num_classes': 5,
                'model.roi_head.bbox_head.1.num_classes': 6,
            },
        ),
        ('mmdet', {'bbox_head': head('A'), 'language_model': nn.Identity()}, {}),
        ('mmdet', {'bbox_head': head('A'), 'panoptic_fusion_head': nn.Identity()}, {}),
        (
            'mmseg',
            {'decode_head': nn.ModuleList([head('A', 2), head('B')]), 'auxiliary_head': head('C')},
            {'model.decode_head.num_classes': 5},
        ),
        ('mmseg', {'decode_head': head('VPDDepthHead')}, {}),
    ],
)
def test_class_outputs(scope, parts, expected):
    assert TASKS[scope].class_outputs(model(**parts)) == expected
