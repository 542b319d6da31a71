"""``mmcv._ext``: where it comes from, what it has, and what it says it does not have."""

import importlib
import importlib.machinery
import importlib.util
import pathlib
import re
import sys

import pytest
import torch

from mmvim.compat import mmcv_ext
from mmvim.compat import mmcv_ops as shim


@pytest.fixture
def fake_mmcv(tmp_path, monkeypatch):
    """An mmcv package without ops; the real one comes back afterwards."""
    for name in [name for name in sys.modules if name.partition('.')[0] == 'mmcv']:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').write_text('')
    monkeypatch.syspath_prepend(str(tmp_path))
    shim.install()
    yield tmp_path / 'mmcv'
    for name in [name for name in sys.modules if name.partition('.')[0] == 'mmcv']:
        del sys.modules[name]


def test_an_extension_that_is_there_wins(fake_mmcv):
    (fake_mmcv / '_ext.py').write_text('nms = "compiled"\n')
    assert shim.is_compiled()
    assert importlib.import_module('mmcv._ext').nms == 'compiled'


def test_an_extension_that_does_not_load_is_not_papered_over(fake_mmcv):
    (fake_mmcv / '_ext.py').write_text('raise ImportError("undefined symbol")\n')
    with pytest.raises(ImportError, match='undefined symbol'):
        importlib.import_module('mmcv._ext')


def test_the_replacement_stands_in_for_a_missing_extension(fake_mmcv):
    assert not shim.is_compiled()
    module = importlib.import_module('mmcv._ext')
    assert module.nms is mmcv_ext.nms.nms
    assert module.__spec__.origin == 'mmvim.compat'


def test_nothing_else_of_mmcv_is_answered_for(fake_mmcv):
    for name in ('mmcv._extra', 'mmcv.ops', 'mmcv._ext2'):
        assert importlib.util.find_spec(name) is None


def test_install_twice_is_once():
    shim.install()
    shim.install()
    places = [i for i, x in enumerate(sys.meta_path) if isinstance(x, shim._ExtFinder)]
    assert len(places) == 1
    # After the finder of files: mmcv's own extension wins where there is one.
    assert places[0] > sys.meta_path.index(importlib.machinery.PathFinder)


def test_every_function_is_one_that_mmcv_calls(mmcv_ops):
    """By name, so that a misspelt function cannot hide behind the one that raises."""
    folder = pathlib.Path(mmcv_ops.__file__).parent
    called = set()
    for path in folder.glob('*.py'):
        called |= set(re.findall(r'ext_module\.(\w+)', path.read_text()))
    assert set(mmcv_ext.functions()) <= called
    assert len(mmcv_ext.functions()) == 21


def test_other_ops_say_what_to_do(mmcv_ops):
    boxes = torch.zeros(1, 5)
    with pytest.raises(NotImplementedError, match=r"mmcv op 'box_iou_rotated'.*pip install"):
        mmcv_ops.box_iou_rotated(boxes, boxes)
    with pytest.raises(NotImplementedError, match="mmcv op 'nms_rotated'"):
        mmcv_ops.nms_rotated(boxes, torch.zeros(1), 0.5)


def test_private_names_are_not_ops(mmcv_ops):
    import mmcv._ext

    with pytest.raises(AttributeError, match='__path__'):
        mmcv._ext.__getattr__('__path__')


def test_missing_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    with pytest.raises(ImportError, match='needs torchvision, which cannot be imported'):
        mmcv_ext.nms.nms(torch.zeros(1, 4), torch.zeros(1), 0.5, 0)


def test_environment_report(mmcv_ops):
    from mmcv.utils import collect_env

    report = collect_env()
    assert report['MMCV Compiler'].startswith('none')
    assert report['MMCV CUDA Compiler'] == 'not available'
