import mmcv_reference as reference
import numpy as np
import pytest
import torch


@pytest.fixture
def crowd():
    """40 boxes that overlap a lot, with distinct scores."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(40, 2, generator=generator) * 30
    boxes = torch.cat([corner, corner + 4 + torch.rand(40, 2, generator=generator) * 20], 1)
    return boxes, torch.randperm(40, generator=generator) / 40 + 0.01


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.0, 0.3, 0.7, 1.0])
def test_nms_keeps_what_the_definition_keeps(mmcv_ops, crowd, device, threshold, offset):
    boxes, scores = crowd
    dets, kept = mmcv_ops.nms(boxes.to(device), scores.to(device), threshold, offset)
    expected = reference.nms(boxes.double().tolist(), scores.tolist(), threshold, offset)
    assert kept.tolist() == expected
    assert dets.device.type == device
    torch.testing.assert_close(dets.cpu(), torch.cat([boxes, scores[:, None]], 1)[expected])


def test_offset_one_makes_one_pixel_boxes(mmcv_ops):
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [6, 5, 6, 5]])
    scores = torch.tensor([0.3, 0.2, 0.1])
    assert mmcv_ops.nms(boxes, scores, 0.5, offset=1)[1].tolist() == [0, 2]
    assert mmcv_ops.nms(boxes, scores, 0.5, offset=0)[1].tolist() == [0, 1, 2]


def test_nms_score_threshold_and_max_num(mmcv_ops, crowd):
    boxes, scores = crowd
    _, kept = mmcv_ops.nms(boxes, scores, 0.5, score_threshold=0.5, max_num=3)
    above = [i for i, s in enumerate(scores.tolist()) if s > 0.5]
    expected = reference.nms(boxes[above].tolist(), scores[above].tolist(), 0.5)
    assert kept.tolist() == [above[i] for i in expected][:3]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_nms_of_other_dtypes(mmcv_ops, crowd, device, dtype):
    boxes, scores = crowd[0].to(dtype), crowd[1].to(dtype)
    _, kept = mmcv_ops.nms(boxes.to(device), scores.to(device), 0.4)
    order = scores.double()
    assert len(set(order.tolist())) == len(order)
    assert kept.tolist() == reference.nms(boxes.double().tolist(), order.tolist(), 0.4)


def test_nms_of_nothing_and_of_arrays(mmcv_ops, crowd):
    dets, kept = mmcv_ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert kept.shape == (0,)
    assert kept.dtype == torch.long
    boxes, scores = (t.numpy() for t in crowd)
    dets, kept = mmcv_ops.nms(boxes, scores, 0.5)
    assert isinstance(dets, np.ndarray)
    assert kept.tolist() == reference.nms(boxes.tolist(), scores.tolist(), 0.5)


@pytest.mark.parametrize('split_thr', [10000, 10])
def test_batched_nms_suppresses_within_a_class_only(mmcv_ops, crowd, split_thr):
    boxes, scores = crowd
    classes = torch.arange(40) % 3
    config = {'type': 'nms', 'iou_threshold': 0.3, 'split_thr': split_thr}
    dets, kept = mmcv_ops.batched_nms(boxes, scores, classes, config)
    expected = set()
    for label in range(3):
        members = torch.nonzero(classes == label)[:, 0]
        found = reference.nms(boxes[members].tolist(), scores[members].tolist(), 0.3)
        expected |= {int(members[i]) for i in found}
    assert set(kept.tolist()) == expected
    assert dets[:, 4].tolist() == sorted(dets[:, 4].tolist(), reverse=True)
    torch.testing.assert_close(dets[:, :4], boxes[kept])


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('min_score', [0.001, 0.2])
def test_soft_nms(mmcv_ops, crowd, method, min_score, offset):
    boxes, scores = crowd
    before = scores.clone()
    dets, kept = mmcv_ops.soft_nms(
        boxes, scores, 0.3, sigma=0.4, min_score=min_score, method=method, offset=offset
    )
    expected, rescored = reference.soft_nms(
        boxes.double().tolist(), scores.double().tolist(), 0.3, 0.4, min_score, method, offset
    )
    assert kept.tolist() == expected
    torch.testing.assert_close(dets[:, 4], torch.tensor(rescored), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dets[:, :4], boxes[expected])
    assert torch.equal(scores, before)


def test_soft_nms_of_nothing_and_through_batched_nms(mmcv_ops, crowd):
    dets, kept = mmcv_ops.soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert dets.shape == (0, 5)
    assert kept.shape == (0,)
    boxes, scores = crowd
    classes = torch.zeros(40, dtype=torch.long)
    config = {'type': 'soft_nms', 'iou_threshold': 0.3, 'min_score': 0.05}
    dets, kept = mmcv_ops.batched_nms(boxes, scores, classes, config)
    expected, rescored = reference.soft_nms(
        boxes.tolist(), scores.tolist(), 0.3, 0.5, 0.05, 'linear'
    )
    assert kept.tolist() == expected
    torch.testing.assert_close(dets[:, 4], torch.tensor(rescored), rtol=1e-5, atol=1e-7)


def test_soft_nms_refuses_an_unknown_method():
    from mmvim.compat import mmcv_ext

    with pytest.raises(ValueError, match='method is 7, allowed are 0, 1, 2'):
        mmcv_ext.nms.softnms(
            torch.zeros(1, 4), torch.zeros(1), torch.zeros(1, 5), 0.5, 0.5, 0.0, 7, 0
        )


@pytest.mark.parametrize('threshold', [0.2, 0.5])
def test_nms_match(mmcv_ops, crowd, threshold):
    boxes, scores = crowd
    groups = mmcv_ops.nms_match(torch.cat([boxes, scores[:, None]], 1), threshold)
    expected = reference.nms_match(boxes.double().tolist(), scores.tolist(), threshold)
    assert [group.tolist() for group in groups] == expected


@pytest.mark.parametrize('mode', ['iou', 'iof'])
@pytest.mark.parametrize('offset', [0, 1])
def test_bbox_overlaps(mmcv_ops, crowd, device, mode, offset):
    first, second = crowd[0][:20].to(device), crowd[0][20:].to(device)
    matrix = mmcv_ops.bbox_overlaps(first, second, mode=mode, offset=offset)
    paired = mmcv_ops.bbox_overlaps(first, second, mode=mode, offset=offset, aligned=True)
    expected = torch.zeros(20, 20, dtype=torch.float64)
    for i, a in enumerate(first.double().tolist()):
        for j, b in enumerate(second.double().tolist()):
            expected[i, j] = reference.iou(a, b, offset)
            if mode == 'iof':
                sizes = [(c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b)]
                expected[i, j] *= sum(sizes) / (1 + expected[i, j]) / sizes[0]
    torch.testing.assert_close(matrix.cpu().double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(paired.cpu().double(), expected.diagonal(), atol=1e-6, rtol=1e-5)
