"""Models by name, here and through mmpretrain and mmengine's hub."""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

import mmvim
from mmvim.apis import model_info
from mmvim.apis.model_zoo import models
from mmvim.errors import CheckpointError

ROOT = Path(__file__).parents[2]
TABLES = SimpleNamespace(**runpy.run_path(ROOT / 'tools' / 'misc' / 'model_zoo_tables.py'))
NAME = 'vim-tiny_3rdparty_in1k'
CONFIG = 'vim/vim-tiny_8xb128_in1k.py'
SHALLOW = dict(
    backbone=dict(_delete_=True, type='mmvim.Vim', arch=dict(embed_dims=32, depth=2), img_size=32),
    head=dict(in_channels=32, num_classes=10),
)


def test_list():
    names = mmvim.list_models()
    assert NAME in names
    assert names == sorted(models())
    assert set(mmvim.list_models('*upernet*')) < set(names)
    assert all(model_info(name).weights for name in mmvim.list_models(pretrained=True))
    assert 'mask-rcnn_vim-tiny_simplefpn_1x_coco' not in mmvim.list_models(pretrained=True)


def test_every_config_is_there():
    for info in models().values():
        assert info.config.is_file()
        assert info.weights is None or info.weights.startswith('https://')


def test_get_model_leaves_the_scope_alone():
    model = mmvim.get_model(NAME, **SHALLOW)
    assert not model.training
    assert type(model.backbone) is mmvim.Vim
    assert model(torch.randn(1, 3, 32, 32), mode='tensor').shape == (1, 10)
    assert model._config.model.backbone.img_size == 32
    assert DefaultScope.get_current_instance() is None


@pytest.fixture
def official(tmp_path):
    """A file as the authors write it, of a small model."""
    model = mmvim.get_model(NAME, **SHALLOW)
    weights = {
        k.replace('backbone.', '').replace('head.fc.', 'head.'): v + 1
        for k, v in model.state_dict().items()
    }
    path = tmp_path / 'official.pth'
    torch.save({'model': weights, 'epoch': 3}, path)
    return path, weights


@pytest.mark.parametrize('source', ['name', 'path', 'config'])
def test_weights_of_the_authors(official, source, monkeypatch):
    path, weights = official
    info = model_info(NAME)
    given = {'name': NAME, 'path': info.config, 'config': Config.fromfile(info.config)}[source]
    model = mmvim.get_model(given, str(path), **SHALLOW)
    torch.testing.assert_close(model.head.fc.weight, weights['head.weight'])
    torch.testing.assert_close(model.backbone.norm_f.weight, weights['norm_f.weight'])


def test_pretrained_downloads_the_file_of_the_metafile(official, monkeypatch):
    path, weights = official
    asked = []
    monkeypatch.setattr(
        'mmengine.runner.checkpoint.load_url',
        lambda url, **kwargs: asked.append(url) or torch.load(path),
    )
    model = mmvim.get_model(NAME, pretrained=True, **SHALLOW)
    assert asked == [model_info(NAME).weights]
    torch.testing.assert_close(model.backbone.norm_f.weight, weights['norm_f.weight'])


def test_bad_requests(tmp_path):
    with pytest.raises(ValueError, match='similar names: vim-tiny_3rdparty_in1k'):
        mmvim.get_model('vim-tiny_in1k')
    with pytest.raises(ValueError, match='no weights were published'):
        mmvim.get_model('mask-rcnn_vim-tiny_simplefpn_1x_coco', pretrained=True)
    with pytest.raises(ValueError, match='needs a name of the zoo'):
        mmvim.get_model(str(model_info(NAME).config), pretrained=True)
    with pytest.raises(FileNotFoundError, match='does not exist'):
        mmvim.get_model(tmp_path / 'x.py')
    with pytest.raises(CheckpointError, match='does not exist'):
        mmvim.get_model(NAME, pretrained=tmp_path / 'x.pth', **SHALLOW)
    other = tmp_path / 'other.pth'
    torch.save({'model': {'conv1.weight': torch.zeros(3)}}, other)
    with pytest.raises(CheckpointError, match=r'other\.pth'):
        mmvim.get_model(NAME, pretrained=other, **SHALLOW)


def test_mmpretrain():
    mmpretrain = pytest.importorskip('mmpretrain')
    names = mmpretrain.list_models('vim-*')
    assert NAME in names
    assert not any('upernet' in name for name in names)
    assert 'resnet50_8xb32_in1k' in mmpretrain.list_models('resnet50*')
    model = mmpretrain.get_model(NAME, **copy.deepcopy(SHALLOW))
    assert type(model.backbone) is mmvim.Vim
    result = mmpretrain.inference_model(model, np.zeros((32, 32, 3), np.uint8))
    assert 0 <= result['pred_score'] <= 1
    assert result['pred_label'] < 1000


def test_hub(official):
    from mmengine.hub import get_model

    model = get_model(f'mmvim::{CONFIG}', **SHALLOW)
    assert type(model).__name__ == 'ImageClassifier'
    assert DefaultScope.get_current_instance() is None
    with pytest.raises(AssertionError, match='Weights'):
        get_model('mmvim::vim/mask-rcnn_vim-tiny_simplefpn_1x_coco.py', pretrained=True)


@pytest.mark.parametrize('path', TABLES.files(ROOT), ids=lambda p: str(p.relative_to(ROOT)))
def test_tables_are_up_to_date(path):
    text = path.read_text()
    assert TABLES.fill(text, path.parent) == text, 'run tools/misc/model_zoo_tables.py'


def test_tables_say_what_is_wrong():
    with pytest.raises(ValueError, match='has no <!-- end'):
        TABLES.fill('<!-- model zoo: COCO of Vim -->\n', ROOT)
    with pytest.raises(ValueError, match='no model belongs to'):
        TABLES.fill('<!-- model zoo: MNIST of Vim -->\n<!-- end of model zoo -->', ROOT)


def test_another_head(official, monkeypatch):
    path, weights = official
    said = []
    monkeypatch.setattr('mmvim.apis.model_zoo.print_log', lambda text, **_: said.append(text))
    changes = copy.deepcopy(SHALLOW)
    changes['head']['num_classes'] = 7
    model = mmvim.get_model(NAME, path, **changes)
    torch.testing.assert_close(model.backbone.norm_f.weight, weights['norm_f.weight'])
    assert model.head.fc.weight.shape == (7, 32)
    line = next(text for text in said if 'left out' in text)
    assert 'head.fc.weight (10, 32) for (7, 32), head.fc.bias (10,) for (7,)' in line
    # A backbone of another shape is another model.
    changes['backbone']['arch'] = dict(embed_dims=16, depth=2)
    changes['head']['in_channels'] = 16
    with pytest.raises(CheckpointError, match=r'backbone\.|embed_dims'):
        mmvim.get_model(NAME, path, **changes)
    with pytest.raises(CheckpointError, match='does not fit'):
        mmvim.apis.load_weights(
            mmvim.get_model(NAME, **SHALLOW, train_cfg=None),
            {'model': {**weights, 'head.weight': torch.zeros(3, 32)}},
        )


@pytest.mark.parametrize('classes', [10, 1000])
def test_inference_model_of_mmpretrain(classes):
    mmpretrain = pytest.importorskip('mmpretrain')
    changes = copy.deepcopy(SHALLOW)
    changes['head']['num_classes'] = classes
    model = mmvim.get_model(NAME, **changes)
    found = mmpretrain.inference_model(model, np.zeros((40, 50, 3), np.uint8))
    assert len(found['pred_scores']) == classes
    # The names of ImageNet's classes are not those of ten others.
    assert ('pred_class' in found) == (classes == 1000) or found['pred_class'].isdecimal()
