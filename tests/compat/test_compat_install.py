import subprocess
import sys

import pytest

from mmvim import compat

LEAN = """
import sys, types
# The package without its __init__, which imports mmengine where it is installed.
package = types.ModuleType('mmvim')
package.__path__ = [{path!r}]
sys.modules['mmvim'] = package
# What any program has loaded:
import __future__, argparse, importlib.metadata, importlib.util, pickle, re
before = set(sys.modules)
from mmvim import compat
compat.install()
print(*(set(sys.modules) - before))
"""


def test_install_is_cheap_and_imports_no_package():
    path = str(compat.__path__[0]).rpartition('compat')[0]
    done = subprocess.run(
        [sys.executable, '-c', LEAN.format(path=path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    imported = done.stdout.split()
    assert 'mmvim.compat' in imported
    assert {name for name in imported if not name.startswith('mmvim.')} == set()
    others = {name for name in imported if not name.startswith('mmvim.compat')}
    assert others == {'mmvim._names', 'mmvim.errors'}


def test_install_twice_changes_nothing():
    compat.install()
    finders, callbacks = list(sys.meta_path), {**compat._import_hook._callbacks}
    counts = {name: len(functions) for name, functions in callbacks.items()}
    compat.install()
    assert sys.meta_path == finders
    assert {name: len(f) for name, f in compat._import_hook._callbacks.items()} == counts


def test_require_returns_the_module():
    assert compat.require('json', 'reading') is sys.modules['json']


def test_require_names_what_is_missing():
    with pytest.raises(ImportError) as error:
        compat.require('mmnothing', 'object detection')
    assert str(error.value) == (
        'mmnothing is needed for object detection and is not installed. '
        "Install the task libraries with: pip install 'mmvim[onedl]'"
    )
    assert error.value.name == 'mmnothing'


def test_require_says_why_an_import_fails(tmp_path, monkeypatch):
    (tmp_path / 'mmbroken.py').write_text('import mmnothing\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = (
        r"mmbroken is needed for tests and cannot be imported \(No module named 'mmnothing'\)"
    )
    with pytest.raises(ImportError, match=expected):
        compat.require('mmbroken', 'tests')
