"""Checkpoints that load without running code, and refusals with their messages."""

import argparse
import functools
import http.server
import pickle
import socket
import sys
import threading
import time
import types
import zipfile

import numpy as np
import pytest
import torch

from mmvim import compat

mmengine = pytest.importorskip('mmengine')

from mmengine.logging.history_buffer import HistoryBuffer  # noqa: E402
from mmengine.runner import CheckpointLoader, load_checkpoint  # noqa: E402


@pytest.fixture(autouse=True)
def _installed():
    compat.install()


@pytest.fixture
def never_unsafe(monkeypatch):
    """Fails the test at any call of torch.load with weights_only=False."""
    original = torch.load

    def load(*args, weights_only=None, **kwargs):
        assert weights_only is not False
        return original(*args, weights_only=weights_only, **kwargs)

    monkeypatch.setattr(torch, 'load', load)


class Runs:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def saved(folder, content, name='checkpoint.pth'):
    path = folder / name
    torch.save(content, path)
    return str(path)


def test_official_checkpoint_with_arguments(tmp_path, never_unsafe):
    arguments = argparse.Namespace(model='vim_tiny', lr=5e-4, betas=[0.9, 0.95], resume=None)
    model = torch.nn.Linear(2, 3)
    path = saved(
        tmp_path, {'state_dict': model.state_dict(), 'args': arguments, 'epoch': 299, 'scaler': {}}
    )
    loaded = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    assert loaded['args'] == arguments
    target = torch.nn.Linear(2, 3)
    load_checkpoint(target, path, strict=True)
    assert torch.equal(target.weight, model.weight)


@pytest.mark.parametrize('kind', ['yacs.config.CfgNode', 'utils.easydict.EasyDict'])
def test_settings_of_official_scripts(tmp_path, never_unsafe, monkeypatch, kind):
    """They load without their classes, as dicts, and none of the classes' code runs."""
    module, _, name = kind.rpartition('.')

    def refuse(self, state):
        raise AssertionError

    settings = type(name, (dict,), {'__module__': module, '__setstate__': refuse})
    with monkeypatch.context() as patch:
        for package in (module.partition('.')[0], module):
            patch.setitem(sys.modules, package, types.SimpleNamespace(**{name: settings}))
        config = settings(MODEL=settings(TYPE='vssm'), LR=5e-4)
        config.frozen = True
        path = saved(tmp_path, {'model': {'w': torch.ones(1)}, 'config': config})
    loaded = CheckpointLoader.load_checkpoint(path)
    assert loaded['config'] == {'MODEL': {'TYPE': 'vssm'}, 'LR': 5e-4}


NUMPY_VALUES = {
    'float32': np.float32(0.75),
    'float64': np.float64(0.5),
    'int64': np.int64(3),
    'bool': np.bool_(True),
    'text': np.str_('mIoU'),
    'complex': np.complex64(1 + 2j),
    **{f'array_{code}': np.arange(3).astype(code) for code in '?bhilqBHILQefdFD'},
    'array_text': np.array(['a', 'bc']),
    'fortran': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
}


@pytest.mark.parametrize('name', NUMPY_VALUES)
@pytest.mark.parametrize('written_by', ['core', '_core'])
def test_numpy_values_of_either_numpy(tmp_path, never_unsafe, name, written_by):
    value = NUMPY_VALUES[name]
    path = saved(tmp_path, {'value': value}, 'here.pth')
    other = tmp_path / 'other.pth'
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, 'w') as target:
        for item in source.infolist():
            data = source.read(item)
            if item.filename.endswith('data.pkl'):
                data = data.replace(b'numpy._core.', b'numpy.core.')
                data = data.replace(b'numpy.core.', b'numpy.%s.' % written_by.encode())
                assert b'numpy.' in data
            target.writestr(item.filename, data)
    loaded = CheckpointLoader.load_checkpoint(str(other))['value']
    assert type(loaded) is type(value)
    assert np.array_equal(loaded, value)
    assert loaded.dtype == value.dtype


def test_training_history(tmp_path, never_unsafe):
    history = HistoryBuffer([1.0, 2.0, 4.0], [1, 1, 1])
    path = saved(tmp_path, {'message_hub': {'log_scalars': {'train/loss': history}}})
    loaded = CheckpointLoader.load_checkpoint(path)['message_hub']['log_scalars']['train/loss']
    assert isinstance(loaded, HistoryBuffer)
    assert loaded.mean() == history.mean()
    assert loaded.statistics('max') == 4.0
    loaded.update(8.0)
    assert loaded.current() == 8.0


def touch(path):
    """The effect of an attack."""
    with open(path, 'w') as file:
        file.write('run')


@pytest.mark.parametrize('reader', ['loader', 'model', 'compat'])
def test_code_is_refused_and_not_run(tmp_path, reader):
    marker = tmp_path / 'marker'
    path = saved(tmp_path, {'state_dict': {}, 'extra': Runs(touch, str(marker))})
    load = {
        'loader': CheckpointLoader.load_checkpoint,
        'model': functools.partial(load_checkpoint, torch.nn.Linear(1, 1)),
        'compat': compat.mmengine_checkpoints.load,
    }[reader]
    with pytest.raises(pickle.UnpicklingError) as error:
        load(path)
    assert not marker.exists()
    message = str(error.value)
    assert message.startswith(f"checkpoint '{path}' refused: it contains ")
    assert f'{touch.__module__}.touch' in message
    assert 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1' in message
    assert '\n' not in message


def test_system_calls_are_refused(tmp_path):
    import os

    path = saved(tmp_path, Runs(os.system, 'true'))
    with pytest.raises(pickle.UnpicklingError, match=r'contains posix\.system, which can run any'):
        CheckpointLoader.load_checkpoint(path)


@pytest.mark.parametrize(
    'call', [(str, 'format'), (HistoryBuffer, '__init__'), (torch.nn.Linear, 'forward')]
)
def test_getattr_reaches_nothing_but_history_methods(tmp_path, call):
    path = saved(tmp_path, Runs(getattr, *call))
    with pytest.raises(pickle.UnpicklingError, match='refused'):
        CheckpointLoader.load_checkpoint(path)


def test_object_arrays_are_refused(tmp_path):
    path = saved(tmp_path, np.array([{'a': 1}, None], dtype=object))
    with pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint(path)


def test_types_that_the_user_allows(tmp_path):
    path = saved(tmp_path, {'extra': Runs(touch, str(tmp_path / 'marker'))})
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([touch, argparse.Namespace]):
        CheckpointLoader.load_checkpoint(path)
        # What was on the list before stays on it.
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    assert (tmp_path / 'marker').exists()
    assert set(torch.serialization.get_safe_globals()) == before


def test_switch_of_torch_for_trusted_files(tmp_path, monkeypatch):
    path = saved(tmp_path, {'extra': Runs(touch, str(tmp_path / 'marker'))})
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    with pytest.warns(UserWarning, match='forcing weights_only=False'):
        CheckpointLoader.load_checkpoint(path)
    assert (tmp_path / 'marker').exists()


@pytest.mark.parametrize('damage', ['empty', 'text', 'truncated'])
def test_damaged_files(tmp_path, damage):
    path = saved(tmp_path, {'weight': torch.zeros(1000)})
    with open(path, 'rb') as file:
        content = file.read()
    replacement = {'empty': b'', 'text': b'<html>404</html>', 'truncated': content[:-200]}[damage]
    with open(path, 'wb') as file:
        file.write(replacement)
    with pytest.raises(pickle.UnpicklingError) as error:
        CheckpointLoader.load_checkpoint(path)
    start = f"checkpoint '{path}' cannot be read: it is damaged or not a PyTorch checkpoint ("
    assert str(error.value).startswith(start)
    assert '\n' not in str(error.value)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r'nowhere\.pth'):
        CheckpointLoader.load_checkpoint('/nowhere.pth')


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of an HTTP server for ``tmp_path / 'served'``."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield folder, f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()
        thread.join()


def test_downloads_are_no_exception(tmp_path, server, never_unsafe):
    folder, address = server
    saved(folder, {'args': argparse.Namespace(a=1)}, 'good.pth')
    saved(folder, {'extra': Runs(touch, str(tmp_path / 'marker'))}, 'bad.pth')
    loaded = CheckpointLoader.load_checkpoint(f'{address}/good.pth')
    assert loaded['args'].a == 1
    with pytest.raises(pickle.UnpicklingError, match=r'bad\.pth. refused: it contains'):
        CheckpointLoader.load_checkpoint(f'{address}/bad.pth')
    assert not (tmp_path / 'marker').exists()


def test_rubbish_does_not_stay_in_the_cache(tmp_path, server):
    folder, address = server
    (folder / 'page.pth').write_text('<html>not here</html>')
    for _ in range(2):
        with pytest.raises(pickle.UnpicklingError, match='damaged or not a PyTorch checkpoint'):
            CheckpointLoader.load_checkpoint(f'{address}/page.pth')
    assert not list((tmp_path / 'cache').rglob('page*'))
    with pytest.raises(OSError, match='404'):
        CheckpointLoader.load_checkpoint(f'{address}/missing.pth')
    saved(folder, {'w': torch.ones(2)}, 'page.pth')
    assert CheckpointLoader.load_checkpoint(f'{address}/page.pth')['w'].tolist() == [1, 1]


def test_a_server_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(compat.mmengine_checkpoints, 'TIMEOUT', 0.3)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)
    before = socket.getdefaulttimeout()
    with socket.create_server(('127.0.0.1', 0)) as silent:
        port = silent.getsockname()[1]
        start = time.perf_counter()
        with pytest.raises(OSError, match='timed out'):
            CheckpointLoader.load_checkpoint(f'http://127.0.0.1:{port}/x.pth')
    assert time.perf_counter() - start < 20
    assert socket.getdefaulttimeout() == before
    assert not list(tmp_path.rglob('*.pth'))


def test_mmengine_without_a_loader_of_its_own(tmp_path):
    """mmengine 0.10.7 calls torch.load plainly."""

    class Loader:
        @classmethod
        def load_checkpoint(cls, filename, map_location=None, logger='current'):
            return torch.load(filename, map_location=map_location)

    module = types.ModuleType('checkpoint')
    module.CheckpointLoader, module.load_url = Loader, lambda *a, **k: None
    content = {'history': HistoryBuffer([1.0], [1]), 'args': argparse.Namespace(a=1)}
    path = saved(tmp_path, content)
    with pytest.raises(pickle.UnpicklingError):
        Loader.load_checkpoint(path)
    compat.mmengine_checkpoints._patch(module)
    compat.mmengine_checkpoints._patch(module)
    loaded = Loader.load_checkpoint(path)
    assert loaded['history'].mean() == 1.0
    assert loaded['args'].a == 1
