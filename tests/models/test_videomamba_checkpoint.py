"""Loading checkpoints: official ones, inflated ones, resized ones and wrong ones."""

import pytest
import torch
from mmengine.runner import load_checkpoint

from mmvim.layers import resize_pos_embed, resize_temporal_pos_embed
from mmvim.models import VideoMamba

ARCH = {'embed_dims': 16, 'depth': 2, 'd_state': 4}


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = VideoMamba(**{'arch': ARCH, 'img_size': 8, 'patch_size': 4, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def official(model):
    """Weights as the official training scripts save them."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    head = {'head.weight': torch.randn(5, 16), 'head.bias': torch.randn(5)}
    return {**weights, **head}


def assert_equal(a, b, skip=()):
    other = b.state_dict()
    for name, value in a.state_dict().items():
        if name not in skip:
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize('wrapper', [None, 'model', 'module', 'state_dict'])
@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.', 'encoder.', 'module.backbone.'])
def test_wrappers_and_prefixes(wrapper, prefix):
    source, model = build(seed=1, num_frames=4), build(num_frames=4)
    weights = {prefix + name: value for name, value in official(source).items()}
    given = weights if wrapper is None else {wrapper: weights, 'epoch': 3}
    assert not any(model.load_state_dict(given, strict=True))
    assert_equal(model, source)


def test_two_keys_for_one_parameter():
    weights = official(build())
    with pytest.raises(ValueError, match=r"'norm_f\.weight' twice"):
        build().load_state_dict({**weights, 'encoder.norm_f.weight': torch.ones(16)})


def test_self_distillation_head_is_dropped():
    extra = {'distill_head.0.weight': torch.ones(16), 'distill_head.1.weight': torch.ones(4, 16)}
    assert not any(build().load_state_dict({**official(build()), **extra}, strict=True))


@pytest.mark.parametrize('prefix', ['', 'vision_encoder.'])
def test_pretraining_files(prefix):
    """Those of masked pretraining, and of multimodal models, whose encoder it is."""
    source, model = build(seed=1, num_frames=4), build(num_frames=4)
    weights = {prefix + k.replace('norm_f.', 'norm.'): v for k, v in source.state_dict().items()}
    for name in ('clip_decoder.0.head.weight', 'clip_decoder.0.norm.bias', 'pool_norm.weight'):
        weights[prefix + name] = torch.zeros(3)
    if prefix:
        others = ('text_encoder.bert.x', 'text_proj.bias', 'vision_proj.bias', 'itm_head.bias')
        weights.update({name: torch.zeros(3) for name in (*others, 'temp', 'clip_teacher.proj')})
    assert not any(model.load_state_dict(weights, strict=True))
    assert_equal(model, source)


@pytest.mark.parametrize('inflation', ['center', 'average'])
@pytest.mark.parametrize('tubelet', [1, 2, 3])
def test_inflation(inflation, tubelet):
    source = build(seed=1)
    model = build(num_frames=6, tubelet_size=tubelet, inflation=inflation)
    assert not any(model.load_state_dict({'model': official(source)}, strict=True))
    weight = model.patch_embed.proj.weight
    assert_equal(source, model, skip=('patch_embed.proj.weight',))
    torch.testing.assert_close(weight.sum(2), source.patch_embed.proj.weight)
    if inflation == 'center':
        assert [bool(weight[:, :, k].any()) for k in range(tubelet)] == [
            k == tubelet // 2 for k in range(tubelet)
        ]
    else:
        assert all(torch.equal(weight[:, :, k], weight[:, :, 0]) for k in range(tubelet))
    assert model.temporal_pos_embedding.eq(0).all()
    # Each tubelet of a still video is embedded as the image is.
    image = torch.randn(1, 3, 8, 8)
    expected, _ = source.patch_embed(image)
    tokens, _ = model.patch_embed(image.unsqueeze(2).repeat(1, 1, 6, 1, 1))
    torch.testing.assert_close(tokens, expected.unsqueeze(1).expand_as(tokens))


def test_other_size_and_number_of_frames():
    source = build(seed=1, num_frames=4)
    model = build(img_size=(12, 8), num_frames=16, tubelet_size=1)
    model.load_state_dict(official(source), strict=True)
    resized = ('pos_embed', 'temporal_pos_embedding')
    assert_equal(model, source, skip=resized)
    spatial = resize_pos_embed(source.pos_embed, (2, 2), (3, 2), 'head')
    torch.testing.assert_close(model.pos_embed, spatial)
    temporal = resize_temporal_pos_embed(source.temporal_pos_embedding, 16)
    torch.testing.assert_close(model.temporal_pos_embedding, temporal)
    x = torch.randn(1, 3, 16, 12, 8)
    torch.testing.assert_close(model(x)[0], source(x)[0])


def test_class_token_that_is_not_wanted():
    source, model = build(seed=1), build(cls_token='none', img_size=12)
    assert not any(model.load_state_dict(official(source), strict=True))
    expected = resize_pos_embed(source.pos_embed[:, 1:], (2, 2), (3, 3))
    torch.testing.assert_close(model.pos_embed, expected)


@pytest.mark.parametrize(
    ('source', 'target', 'message'),
    [
        ({'num_frames': 4}, {}, "it is a video model's"),
        ({'num_frames': 4}, {'num_frames': 4, 'tubelet_size': 2}, r'weight is \(16, 3, 1, 4, 4\)'),
        ({'bimamba': 'none'}, {}, "its bimamba is 'none'"),
        ({}, {'bimamba': 'none'}, "its bimamba is 'v2'"),
        ({'cls_token': 'none'}, {}, "its class token is 'none'"),
        ({'arch': {**ARCH, 'depth': 3}}, {}, 'its depth is 3'),
    ],
)
def test_another_model(source, target, message):
    with pytest.raises(ValueError, match=f'does not fit this VideoMamba.*{message}'):
        build(**target).load_state_dict(official(build(**source)), strict=False)


def test_classifier_reads_an_official_checkpoint(tmp_path):
    mmpretrain = pytest.importorskip('mmpretrain.models')
    source = build(seed=1)
    weights = official(source)
    torch.save({'model': weights}, tmp_path / 'official.pth')
    classifier = mmpretrain.ImageClassifier(
        backbone={'type': 'mmvim.VideoMamba', 'arch': ARCH, 'img_size': 8, 'patch_size': 4},
        head={'type': 'mmpretrain.LinearClsHead', 'num_classes': 5, 'in_channels': 16},
    ).eval()
    load_checkpoint(classifier, str(tmp_path / 'official.pth'), strict=True)
    assert_equal(classifier.backbone, source)
    images = torch.randn(2, 3, 8, 8)
    expected = source(images)[0] @ weights['head.weight'].T + weights['head.bias']
    torch.testing.assert_close(classifier.head(classifier.backbone(images)), expected)

    # The backbone alone takes a classifier's weights too.
    model = build()
    assert not any(model.load_state_dict(classifier.state_dict(), strict=True))
    assert_equal(model, source)
