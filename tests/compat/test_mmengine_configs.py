"""``mmvim::`` in configs, from a checkout and from an installation."""

import shutil

import pytest

from mmvim import compat
from mmvim.compat import mmengine_configs

pytest.importorskip('mmengine')

from mmengine.config import Config
from mmengine.hub import get_config

LEAF = 'vim/leaf.py'


@pytest.fixture(params=['checkout', 'installed'])
def configs(request, tmp_path, monkeypatch):
    """The folder of configs of an mmvim of either kind."""
    package = tmp_path / 'mmvim'
    package.mkdir()
    if request.param == 'checkout':
        (tmp_path / 'pyproject.toml').write_text('')
        base = tmp_path
    else:
        base = package / '.mim'
    folder = base / 'configs'
    (folder / '_base_').mkdir(parents=True)
    (folder / 'vim').mkdir()
    (folder / '_base_' / 'model.py').write_text(
        "model = dict(type='Classifier', head=dict(type='H'))"
    )
    (folder / LEAF).write_text("_base_ = '../_base_/model.py'\nlr = 1\n")
    monkeypatch.setattr(mmengine_configs, 'PACKAGE', package)
    compat.install()
    return folder


def child(tmp_path, base, text=''):
    path = tmp_path / 'child.py'
    path.write_text(f'_base_ = {base!r}\n{text}')
    return Config.fromfile(path)


def test_base_config(configs, tmp_path):
    config = child(tmp_path, f'mmvim::{LEAF}', 'lr = 2')
    assert config.model.type == 'Classifier'
    assert config.lr == 2


def test_base_config_keeps_its_scope(configs, tmp_path):
    """Under the scope mmvim the types of the task libraries would not be found."""
    config = child(tmp_path, [f'mmvim::{LEAF}'])
    assert '_scope_' not in config.model
    assert '_scope_' not in config.model.head


def test_get_config(configs):
    assert get_config(f'mmvim::{LEAF}').model.type == 'Classifier'


def test_get_config_with_weights(configs):
    root = configs.parent
    (root / 'model-index.yml').write_text('Import:\n- configs/vim/metafile.yml\n')
    (configs / 'vim' / 'metafile.yml').write_text(
        f'Models:\n- Name: leaf\n  Config: configs/{LEAF}\n  Weights: https://example.org/leaf.pth\n'
    )
    config = get_config(f'mmvim::{LEAF}', pretrained=True)
    assert config.model_path == 'https://example.org/leaf.pth'
    assert get_config('mmvim::_base_/model.py').model.type == 'Classifier'


def test_misspelt_config(configs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config 'vim/laef\.py'; .*vim has leaf\.py"):
        child(tmp_path, 'mmvim::vim/laef.py')


def test_package_without_configs(configs):
    shutil.rmtree(configs)
    with pytest.raises(FileNotFoundError, match="mmvim's configs are missing"):
        get_config(f'mmvim::{LEAF}')


def test_read_only_and_nothing_written(configs, tmp_path):
    before = {path for path in tmp_path.rglob('*') if '__pycache__' not in path.parts}
    get_config(f'mmvim::{LEAF}')
    after = {path for path in tmp_path.rglob('*') if '__pycache__' not in path.parts}
    assert after == before


def test_configs_of_this_repository():
    compat.install()
    config = get_config('mmvim::vim/vim-tiny_8xb128_in1k.py')
    assert config.model.backbone.type == 'mmvim.Vim'


def test_other_packages_are_looked_up_as_before(tmp_path):
    compat.install()
    pytest.importorskip('mmdet')
    config = child(tmp_path, 'mmdet::_base_/schedules/schedule_1x.py')
    assert config.train_cfg.max_epochs == 12
    with pytest.raises(FileNotFoundError):
        child(tmp_path, 'mmdet::_base_/nothing.py')
