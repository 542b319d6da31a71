"""Boxes keep their place under bfloat16, whose numbers are 4 apart between 512 and 1024."""

import pytest
import torch

from mmvim import compat


@pytest.fixture(scope='module', autouse=True)
def _installed():
    compat.install()
    pytest.importorskip('mmdet.models')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
def test_priors(dtype):
    from mmdet.models.task_modules import AnchorGenerator, MlvlPointGenerator

    anchors = AnchorGenerator(
        strides=[8, 16], ratios=[0.5, 1.0], octave_base_scale=4, scales_per_octave=3
    )
    points = MlvlPointGenerator(strides=[8, 16])
    sizes = [(100, 160), (50, 80)]
    for generator in (anchors, points):
        exact = generator.grid_priors(sizes, device='cpu')
        found = generator.grid_priors(sizes, dtype=dtype, device='cpu')
        positional = generator.grid_priors(sizes, dtype, 'cpu')
        expected_dtype = torch.float16 if dtype == torch.float16 else torch.float32
        for a, b, c in zip(exact, found, positional, strict=True):
            assert b.dtype == expected_dtype
            assert torch.equal(b, c)
            if dtype != torch.float16:
                assert torch.equal(b, a)
    strided = points.grid_priors(sizes, dtype=dtype, device='cpu', with_stride=True)
    assert strided[0].shape == (16000, 4)


def test_regions_are_pooled_where_they_are():
    from mmdet.models.roi_heads import SingleRoIExtractor

    extractor = SingleRoIExtractor(
        roi_layer={'type': 'RoIAlign', 'output_size': 3, 'sampling_ratio': 2},
        out_channels=2,
        featmap_strides=[4, 8],
    )
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn(1, 2, 200 // s, 1200 // s, generator=generator).bfloat16() for s in (4, 8)
    ]
    rois = torch.tensor([[0, 901.3, 20.7, 987.6, 90.2], [0, 1021.0, 3.0, 1198.0, 170.0]])
    leaves = [feature.requires_grad_() for feature in features]
    out = extractor(leaves, rois)
    expected = extractor([feature.detach().float() for feature in features], rois)
    assert torch.equal(out, expected)
    # What rounding the regions would give is far from it.
    rounded = extractor([feature.detach().float() for feature in features], rois.bfloat16().float())
    assert (rounded - expected).abs().max() > 0.1
    out.sum().backward()
    assert all(leaf.grad.dtype == torch.bfloat16 and leaf.grad.any() for leaf in leaves)


def test_proposals_of_a_region_proposal_network():
    """They are those of float32, up to the precision of the predicted offsets."""
    from mmdet.models.dense_heads import RPNHead
    from mmengine.config import ConfigDict

    torch.manual_seed(0)
    head = RPNHead(
        in_channels=4,
        feat_channels=4,
        anchor_generator={
            'type': 'AnchorGenerator',
            'scales': [8],
            'ratios': [1.0],
            'strides': [16],
        },
        bbox_coder={'type': 'DeltaXYWHBBoxCoder'},
        test_cfg=ConfigDict(
            nms_pre=200,
            max_per_img=200,
            nms={'type': 'nms', 'iou_threshold': 0.99},
            min_bbox_size=0,
        ),
    )
    features = torch.randn(1, 4, 10, 75)
    meta = [{'img_shape': (160, 1200), 'scale_factor': (1.0, 1.0)}]

    def proposals(precision):
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=precision == 'low'):
            outputs = head([features])
            return head.predict_by_feat(*outputs, batch_img_metas=meta)[0]

    low, full = proposals('low'), proposals('full')
    assert low.bboxes.dtype == torch.float32
    distance = (low.bboxes[:, None] - full.bboxes[None]).abs().amax(-1).amin(1)
    # Anchors are 128 wide and offsets a few per cent of that, in 8 bits.
    assert distance.median() < 0.3
