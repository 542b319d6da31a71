import importlib
import importlib.util
import inspect
import sys
import zipfile

import pytest

from mmvim.compat import _import_hook
from mmvim.compat._import_hook import when_imported


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``hooked`` with the modules ``one`` and ``two``; forgotten afterwards."""
    folder = tmp_path / 'hooked'
    folder.mkdir()
    (folder / '__init__.py').write_text('')
    (folder / 'one.py').write_text('value = 1\n\n\ndef function():\n    return value\n')
    (folder / 'two.py').write_text('from hooked.one import value\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(_import_hook, '_callbacks', {})
    yield tmp_path
    for name in [name for name in sys.modules if name.partition('.')[0] == 'hooked']:
        del sys.modules[name]


def test_acts_when_the_module_is_imported_and_before_its_importer_goes_on(package):
    when_imported('hooked.one', lambda module: setattr(module, 'value', 2))
    assert 'hooked' not in sys.modules
    import hooked.two

    assert hooked.two.value == 2


def test_acts_at_once_when_the_module_is_there(package):
    import hooked.one

    seen = []
    when_imported('hooked.one', seen.append)
    assert seen == [hooked.one]


def test_the_same_callback_acts_once(package):
    seen = []
    for _ in range(3):
        when_imported('hooked.one', seen.append)
    importlib.import_module('hooked.one')
    when_imported('hooked.one', seen.append)
    assert len(seen) == 1


def test_acts_again_on_a_module_that_is_imported_again(package):
    seen = []
    when_imported('hooked.one', seen.append)
    importlib.import_module('hooked.one')
    del sys.modules['hooked.one']
    importlib.import_module('hooked.one')
    assert len(seen) == 2
    importlib.reload(sys.modules['hooked.one'])
    assert len(seen) == 3


def test_leaves_the_module_as_an_import_makes_it(package):
    when_imported('hooked.one', lambda module: None)
    module = importlib.import_module('hooked.one')
    plain = importlib.import_module('hooked.two')
    assert type(module.__loader__) is type(plain.__loader__)
    assert vars(module.__loader__).keys() == vars(plain.__loader__).keys()
    assert inspect.getsource(module.function).startswith('def function')
    assert importlib.util.find_spec('hooked.one').origin == module.__file__


def test_a_search_without_an_import_does_not_act(package):
    seen = []
    when_imported('hooked.one', seen.append)
    assert importlib.util.find_spec('hooked.one') is not None
    assert importlib.util.find_spec('hooked.three') is None
    assert seen == []
    importlib.import_module('hooked.one')
    assert len(seen) == 1


def test_modules_in_a_zip_file_share_a_loader(package, monkeypatch):
    archive = package / 'archive.zip'
    with zipfile.ZipFile(archive, 'w') as target:
        for path in (package / 'hooked').glob('*.py'):
            target.write(path, f'hooked/{path.name}')
            path.unlink()
    (package / 'hooked').rmdir()
    monkeypatch.syspath_prepend(str(archive))
    seen = []
    when_imported('hooked.one', lambda module: seen.append(module.__name__))
    importlib.import_module('hooked.two')
    assert seen == ['hooked.one']


def test_errors_reach_the_importer(package):
    def fail(module):
        raise RuntimeError('cannot patch')

    when_imported('hooked.one', fail)
    with pytest.raises(RuntimeError, match='cannot patch'):
        importlib.import_module('hooked.one')


def test_a_missing_module_stays_missing(package):
    when_imported('hooked.three', lambda module: None)
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'hooked\.three'"):
        importlib.import_module('hooked.three')
