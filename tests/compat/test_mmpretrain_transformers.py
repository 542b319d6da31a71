"""mmpretrain imports beside a transformers 5 (a stand-in whose modules cannot be imported)."""

import types

import forks
import pytest

from mmvim.compat import mmpretrain_transformers as shim


def add_transformers(folder, version):
    info = folder / f'transformers-{version}.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Name: transformers\nVersion: {version}\n')
    (folder / 'transformers').mkdir()
    (folder / 'transformers' / '__init__.py').write_text('raise ImportError("a name is gone")\n')


def test_mmpretrain_imports(tmp_path):
    pytest.importorskip('mmpretrain.version')
    pytest.importorskip('pycocotools')
    add_transformers(tmp_path, '5.0.0')
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
assert 'transformers' not in sys.modules
import mmvim
from mmpretrain.utils import dependency
assert dependency.satisfy_requirement('transformers>=4.28.0')
assert dependency.satisfy_requirement('pycocotools')
assert dependency.WITH_MULTIMODAL is False
import mmpretrain.models
assert 'ImageClassifier' in mmpretrain.models.classifiers.__all__
try:
    mmpretrain.registry.MODELS.build(dict(type='Blip2Caption'))
except ImportError as error:
    print(error)
"""
    done = forks.run_code(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    message = "mmpretrain's Blip2Caption does not work with transformers 5.0.0: pip install "
    assert message in done.stdout


@pytest.mark.parametrize(
    ('version', 'before', 'after'),
    [('5.1.0', True, False), ('6.0', True, False), ('4.57.1', True, True), ('5.1.0', False, False)],
)
def test_only_transformers_5_switches_off(tmp_path, monkeypatch, version, before, after):
    add_transformers(tmp_path, version)
    monkeypatch.syspath_prepend(str(tmp_path))
    placeholder = object()
    dependency = types.SimpleNamespace(
        WITH_MULTIMODAL=before, register_multimodal_placeholder=placeholder
    )
    shim._patch(dependency)
    assert dependency.WITH_MULTIMODAL is after
    assert (dependency.register_multimodal_placeholder is placeholder) == (before == after)
