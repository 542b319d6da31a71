import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

from mmvim.models.video import VideoDataPreprocessor

BACKBONE = dict(
    type='mmvim.VideoMamba', arch=dict(embed_dims=16, depth=2, d_state=4), img_size=16,
    patch_size=8, num_frames=4,
)  # fmt: skip


def classifier(kind='mmvim.VideoClassifier', **kwargs):
    torch.manual_seed(0)
    init_default_scope('mmpretrain')
    model = MODELS.build(
        dict(
            type=kind,
            **{
                'backbone': BACKBONE,
                'head': dict(
                    type='LinearClsHead', num_classes=5, in_channels=16,
                    loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
                ),
                **kwargs,
            },
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def batch(*shape, labels=(1, 4)):
    torch.manual_seed(1)
    inputs = torch.randint(0, 256, (len(labels), *shape, 3, 4, 16, 16), dtype=torch.uint8)
    samples = [DataSample().set_gt_label(label) for label in labels]
    return {'inputs': inputs, 'data_samples': samples}


def test_normalises_each_channel():
    mean, std = (10.0, 20.0, 30.0), (2.0, 4.0, 5.0)
    data = batch()
    out = VideoDataPreprocessor(mean, std)(data)['inputs']
    for c in range(3):
        expected = (data['inputs'][:, c].float() - mean[c]) / std[c]
        torch.testing.assert_close(out[:, c], expected)
    listed = {'inputs': list(data['inputs'])}
    assert torch.equal(VideoDataPreprocessor(mean, std)(listed)['inputs'], out)


def test_views_become_samples_in_training_only():
    data = batch(3)
    preprocess = VideoDataPreprocessor()
    out = preprocess(data, training=True)
    assert out['inputs'].shape == (6, 3, 4, 16, 16)
    assert [int(sample.gt_label) for sample in out['data_samples']] == [1, 1, 1, 4, 4, 4]
    assert len({id(sample) for sample in out['data_samples']}) == 6
    assert preprocess(data)['inputs'].shape == (2, 3, 3, 4, 16, 16)


@pytest.mark.parametrize('kind', ['Mixup', 'CutMix'])
def test_mixes_all_frames_alike(kind):
    preprocess = VideoDataPreprocessor(
        (0.0,) * 3,
        (1.0,) * 3,
        num_classes=5,
        batch_augments=dict(augments=[dict(type=kind, alpha=1.0)]),
    )
    torch.manual_seed(3)
    data = batch()
    data['inputs'] = data['inputs'][:, :, :1].expand(-1, -1, 4, -1, -1)
    data['inputs'] = data['inputs'].clone()
    out = preprocess(data, training=True)
    assert not torch.equal(out['inputs'], data['inputs'].float())
    assert torch.equal(out['inputs'], out['inputs'][:, :, :1].expand_as(out['inputs']))
    scores = torch.stack([sample.gt_score for sample in out['data_samples']])
    torch.testing.assert_close(scores.sum(1), torch.ones(2))
    torch.testing.assert_close(scores[:, [0, 2, 3]], torch.zeros(2, 3))
    assert torch.equal(preprocess(data)['inputs'], data['inputs'].float())


@pytest.mark.parametrize('views_per_step', [None, 1, 4, 100])
def test_averages_the_views_probabilities(views_per_step):
    model = classifier(views_per_step=views_per_step)
    data = batch(3)
    with torch.no_grad():
        found = model.test_step(data)
        clips = model.data_preprocessor(data)['inputs']
        for i, sample in enumerate(found):
            expected = model(clips[i]).softmax(-1).mean(0)
            torch.testing.assert_close(sample.pred_score, expected, rtol=1e-4, atol=1e-6)
            assert int(sample.pred_label) == int(expected.argmax())
            assert int(sample.gt_label) == (1, 4)[i]


HEADS = {
    'MultiLabelLinearClsHead': (dict(num_classes=5, in_channels=16, thr=0.5), torch.sigmoid),
    'LinearRegressionHead': (dict(num_classes=5, in_channels=16), lambda x: x),
    'StackedLinearClsHead': (
        dict(num_classes=5, in_channels=16, mid_channels=[8]),
        lambda x: x.softmax(-1),
    ),
}


@pytest.mark.parametrize('head', HEADS)
def test_averages_what_the_head_predicts(head):
    options, predict = HEADS[head]
    model = classifier(head=dict(type=head, **options))
    equal = batch(1)
    equal['inputs'] = equal['inputs'].expand(-1, 4, -1, -1, -1, -1)
    data = batch(3)
    with torch.no_grad():
        one = model.test_step(batch())
        for a, b in zip(model.test_step(equal), one, strict=True):
            torch.testing.assert_close(a.pred_score, b.pred_score, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(a.pred_label, b.pred_label, rtol=1e-4, atol=1e-5)
        clips = model.data_preprocessor(data)['inputs']
        for i, sample in enumerate(model.test_step(data)):
            expected = predict(model(clips[i])).mean(0)
            torch.testing.assert_close(sample.pred_score, expected, rtol=1e-4, atol=1e-5)


def test_refuses_views_of_heads_it_cannot_merge():
    tasks = dict(a=dict(type='LinearClsHead', num_classes=5))
    model = classifier(head=dict(type='MultiTaskHead', task_heads=tasks, in_channels=16))
    with pytest.raises(TypeError, match='head=MultiTaskHead cannot merge views'):
        model.test_step({'inputs': batch(2)['inputs']})


@pytest.mark.parametrize('kind', ['mmvim.VideoClassifier', 'ImageClassifier'])
def test_one_view_and_training(kind):
    model = classifier(
        kind,
        data_preprocessor=dict(type='mmvim.VideoDataPreprocessor', num_classes=5),
        train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
    )
    found = model.test_step(batch())
    assert len(found) == 2
    assert found[0].pred_score.shape == (5,)
    data = model.data_preprocessor(batch(2), training=True)
    assert data['inputs'].shape[0] == 4
    loss = model(**data, mode='loss')['loss']
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_errors():
    with pytest.raises(ValueError, match=r'got \(2, 3, 16, 16\)'):
        VideoDataPreprocessor()({'inputs': torch.zeros(2, 3, 16, 16)})
    with pytest.raises(ValueError, match='std positive'):
        VideoDataPreprocessor(std=(1.0, 0.0, 1.0))
    augments = dict(augments=[dict(type='Mixup', alpha=0.8)])
    with pytest.raises(ValueError, match='need num_classes'):
        VideoDataPreprocessor(batch_augments=augments)
    with pytest.raises(ValueError, match='label 4 does not fit num_classes=3'):
        VideoDataPreprocessor(batch_augments=augments, num_classes=3)(batch(), training=True)
    with pytest.raises(ValueError, match='views_per_step=0'):
        classifier(views_per_step=0)


def test_resolves_where_mmaction2_looks():
    """mmaction2 builds from mmengine's root registry too, by the plain name or with the scope."""
    init_default_scope('mmengine')
    for name in ('VideoMamba', 'mmvim.VideoMamba'):
        backbone = MODELS.build({**BACKBONE, 'type': name})
        # Its recognizers give the backbone (batch, channels, frames, height, width).
        assert backbone(torch.zeros(1, 3, 4, 16, 16))[0].shape == (1, 16)
