"""Loading checkpoints: official ones, resized ones and wrong ones."""

import argparse
import logging

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.runner import load_checkpoint

from mmvim.layers import resize_pos_embed
from mmvim.models import Vim

ARCH = {'embed_dims': 32, 'depth': 2, 'd_state': 4}


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Vim(**{'arch': ARCH, 'img_size': 64, **kwargs}).eval()


def official(model, classes=5):
    """A checkpoint as saved by the official training script."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights['head.weight'] = torch.randn(classes, 32)
    weights['head.bias'] = torch.randn(classes)
    optimizer = {'state': {0: {'step': 1}}, 'param_groups': [{'lr': 0.1, 'params': [0]}]}
    return {
        'model': weights,
        'model_ema': {name: value + 1 for name, value in weights.items()},
        'optimizer': optimizer,
        'lr_scheduler': {'base_values': [0.1]},
        'epoch': 3,
        'scaler': {},
        'args': argparse.Namespace(lr=0.1),
    }


def assert_equal(a, b, skip=()):
    other = b.state_dict()
    for name, value in a.state_dict().items():
        if name not in skip:
            assert torch.equal(value, other[name]), name


@pytest.fixture
def log(caplog):
    """Log records of mmengine's current logger."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


@pytest.mark.parametrize('wrapper', ['raw', 'model', 'state_dict', 'module', 'model+module'])
def test_official_keys_and_wrappers(wrapper, log):
    source = build(seed=1)
    checkpoint = official(source)
    weights = checkpoint['model']
    if 'module' in wrapper:
        weights = {f'module.{name}': value for name, value in weights.items()}
    given = {
        'raw': weights,
        'model': checkpoint,
        'state_dict': {'state_dict': weights, 'meta': {}},
        'module': weights,
        'model+module': {**checkpoint, 'model': weights},
    }[wrapper]
    model = build()
    keys = set(given)
    assert not any(model.load_state_dict(given, strict=True))
    assert_equal(model, source)
    assert set(given) == keys, "the caller's dict must not change"
    assert any("'head.weight'" in r.getMessage() for r in log.records)


def test_official_file_through_mmengine(tmp_path):
    source, model = build(seed=1), build()
    torch.save(official(source), tmp_path / 'official.pth')
    load_checkpoint(model, str(tmp_path / 'official.pth'), map_location='cpu', strict=True)
    assert_equal(model, source)

    init_cfg = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'official.pth')}
    model = build(init_cfg=init_cfg)
    model.init_weights()
    assert_equal(model, source)


@pytest.mark.parametrize('place', ['middle', 'head', 'tail', 'double', 'none'])
@pytest.mark.parametrize('size', [96, (96, 48)])
def test_position_embedding_of_another_size(place, size, log):
    source, model = build(seed=1, cls_token=place), build(cls_token=place, img_size=size)
    model.load_state_dict(official(source), strict=True)
    expected = resize_pos_embed(source.pos_embed, (4, 4), model.grid, place)
    torch.testing.assert_close(model.pos_embed, expected)
    assert_equal(model, source, skip=('pos_embed',))
    assert any('(4, 4)' in r.getMessage() for r in log.records if r.levelno == logging.INFO)
    images = torch.randn(1, 3, *model.img_size)
    torch.testing.assert_close(model(images)[0], source(images)[0])


def test_stride_changes_the_grid():
    source, model = build(seed=1), build(stride=8)
    model.load_state_dict(official(source))
    assert model.pos_embed.shape == (1, 50, 32)
    expected = resize_pos_embed(source.pos_embed, (4, 4), (7, 7), 'middle')
    torch.testing.assert_close(model.pos_embed, expected)


def test_grid_of_own_checkpoint_travels_in_its_metadata():
    """4 x 6 and 6 x 4 patches are as many: only the metadata can tell them apart."""
    source, model = build(seed=1, img_size=(64, 96)), build(img_size=(96, 64))
    model.load_state_dict(source.state_dict())
    expected = resize_pos_embed(source.pos_embed, (4, 6), (6, 4), 'middle')
    torch.testing.assert_close(model.pos_embed, expected)


def test_grid_that_is_no_square_keeps_the_aspect_ratio():
    source, model = build(seed=1, img_size=(64, 128)), build(img_size=(128, 256))
    model.load_state_dict(dict(source.state_dict()))
    expected = resize_pos_embed(source.pos_embed, (4, 8), (8, 16), 'middle')
    torch.testing.assert_close(model.pos_embed, expected)


@pytest.mark.parametrize('place', ['middle', 'double'])
def test_class_token_that_is_not_wanted(place, log):
    source, model = build(seed=1, cls_token=place), build(cls_token='none', img_size=96)
    assert not any(model.load_state_dict(official(source), strict=True))
    index = [8] if place == 'middle' else [0, 17]
    keep = [i for i in range(source.pos_embed.shape[1]) if i not in index]
    expected = resize_pos_embed(source.pos_embed[:, keep], (4, 4), (6, 6))
    torch.testing.assert_close(model.pos_embed, expected)
    assert any('class token' in r.getMessage() for r in log.records if r.levelno == logging.WARNING)


def test_rope_tables_are_checked():
    table = {'rope.freqs_cos': torch.ones(16, 32), 'rope.freqs_sin': torch.zeros(16, 32)}
    weights = dict(build(seed=1).state_dict())
    with pytest.raises(ValueError, match='here rope=False'):
        build().load_state_dict({**weights, **table})
    with pytest.raises(ValueError, match='rope_pt_size=14'):
        build(rope=True).load_state_dict({**weights, **table})
    with pytest.raises(ValueError, match=r'freqs_cos is \(16, 8\)'):
        build(rope=True).load_state_dict({**weights, 'rope.freqs_cos': torch.ones(16, 8)})


def test_final_norm_that_is_not_wanted():
    model = build(out_norm='none')
    assert not any(model.load_state_dict(official(build(seed=1)), strict=True))


def vit():
    return {
        'cls_token': torch.zeros(1, 1, 32),
        'pos_embed': torch.zeros(1, 17, 32),
        'patch_embed.proj.weight': torch.zeros(32, 3, 16, 16),
        'patch_embed.proj.bias': torch.zeros(32),
        'blocks.0.attn.qkv.weight': torch.zeros(96, 32),
    }


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (
            lambda: build(arch={**ARCH, 'embed_dims': 64}).state_dict(),
            r'64.* there and .*32.* here',
        ),
        (lambda: build(arch={**ARCH, 'depth': 3}).state_dict(), 'its depth is 3'),
        (lambda: build(arch={**ARCH, 'depth': 1}).state_dict(), 'its depth is 1'),
        (lambda: build(arch={**ARCH, 'd_state': 8}).state_dict(), r'A_log is \(64, 8\) there'),
        (lambda: build(bimamba='v1').state_dict(), "its bimamba is 'v1'"),
        (lambda: build(bimamba='none').state_dict(), "its bimamba is 'none'"),
        (lambda: build(cls_token='double').state_dict(), "its class token is 'double'"),
        (lambda: build(cls_token='none').state_dict(), "its class token is 'none'"),
        (lambda: build(patch_size=8, img_size=32).state_dict(), r'patch_embed\.proj\.weight is'),
        (vit, r"another model's: blocks\.0\.attn"),
        (lambda: {'conv1.weight': torch.zeros(64, 3, 7, 7)}, "another model's: conv1.weight"),
    ],
)
@pytest.mark.parametrize('through', ['torch', 'mmengine'])
def test_another_model(make, message, through, tmp_path):
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({'state_dict': make()}, tmp_path / 'other.pth')
    load = {
        'torch': lambda: model.load_state_dict(make(), strict=False),
        'mmengine': lambda: load_checkpoint(model, str(tmp_path / 'other.pth'), strict=False),
    }[through]
    with pytest.raises(ValueError, match=f'does not fit this Vim.*{message}') as error:
        load()
    assert '\n' not in str(error.value)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_parts_of_a_model_can_be_loaded():
    model = build()
    model.load_state_dict({'pos_embed': torch.ones_like(model.pos_embed)}, strict=False)
    assert model.pos_embed.eq(1).all()
    adapter = {'layers.0.mixer.in_proj.lora_A': torch.zeros(1)}
    assert model.load_state_dict(adapter, strict=False).unexpected_keys == [*adapter]
