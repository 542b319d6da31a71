"""Exceptions that become one line, and exceptions that keep their traceback."""

import copy
import pickle
import sys

import pytest
import torch
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset

from mmvim.cli import diagnosis, samples
from mmvim.cli.diagnosis import explain, locate, reported_errors
from mmvim.errors import CheckpointError, SampleError, UserError

PARTS = Registry('part', scope='test_diagnosis')
diagnosis.install()


@PARTS.register_module()
class Base:
    def __init__(self, width: int = 1, depth: int = 2):
        self.size = width * depth


@PARTS.register_module()
class Part(Base):
    def __init__(self, kind: str, **kwargs):
        super().__init__(**kwargs)
        if kind == 'bad':
            raise ValueError("kind must be 'good',\n not 'bad'")
        if kind == 'bug':
            raise AttributeError('oh')
        if kind == 'own':
            PARTS.build({'type': 'Inner', 'name': 'x', 'kind': 'bad'})

    def work(self):
        raise IndexError('oh')


@PARTS.register_module()
class Inner(Part):
    def __init__(self, name: str, **kwargs):
        super().__init__(**kwargs)


def explained(part: dict, scope: str | None = None) -> str | None:
    cfg = {'model': {'parts': [{'type': 'Base'}, part]}, 'part': part, 'default_scope': scope}
    with pytest.raises(Exception) as info:
        PARTS.build(copy.deepcopy(part))
    return explain(info.value, cfg)


def test_unknown_type_without_a_config():
    """Tools that read no whole config say it in one line, too."""
    from mmengine.registry import TRANSFORMS

    with pytest.raises(KeyError) as info:
        TRANSFORMS.build({'type': 'mmvim.ResizeVideo'})
    assert explain(info.value) == "type 'mmvim.ResizeVideo' is not a registered transform"


def test_errors_of_a_build_name_the_key():
    assert explained({'type': 'Part', 'kind': 'bad'}) == (
        "model.parts.1 (Part): kind must be 'good', not 'bad'"
    )
    assert explained({'type': 'Part', 'kind': 'good', 'widht': 3}) == (
        "model.parts.1: Part has no argument 'widht' (did you mean 'width'?); "
        'allowed: kind, width, depth'
    )
    for given in ({'type': 'Part'}, {'type': 'Inner', 'name': 'x'}):
        needed = explained(given)
        assert needed.endswith("needs 'kind', which the config does not give")
    assert explained({'type': 'Pat'}).startswith(
        "model.parts.1.type is 'Pat', which is not a registered part of 'test_diagnosis' (did you"
    )
    assert explained({'type': 'Part', 'kind': 'good', 'width': {'a': 7}}) == (
        "model.parts.1 (Part): width={'a': 7} must be int "
        "(TypeError: unsupported operand type(s) for *: 'dict' and 'int')"
    )
    assert "is 'no.such.Part', which is not a" in explained({'type': 'no.such.Part'})
    # What a part builds for itself has no key: the part has.
    assert explained({'type': 'Part', 'kind': 'own'}).startswith('model.parts.1 (Part): kind must')


def test_what_may_be_a_bug_keeps_its_traceback_and_names_the_key(capsys):
    part = {'type': 'Part', 'kind': 'bug'}
    assert explained(part) is None
    for error in (RuntimeError('x'), IndexError('x'), ValueError('x'), KeyError('x')):
        with pytest.raises(type(error)) as info:
            raise error
        assert explain(info.value) is None
    built = {'type': 'Part', 'kind': 'good'}
    for action, place in (
        (lambda: PARTS.build(dict(part)), 'model.parts.0 (Part)'),
        (PARTS.build(dict(built)).work, 'model.parts.1 (Part)'),
    ):

        def run(action=action):
            with reported_errors() as context:
                context.cfg = {'model': {'parts': [part, built]}}
                action()

        with pytest.raises((AttributeError, IndexError)) as info:
            run()
        shown = ''.join(getattr(info.value, '__notes__', [])) + capsys.readouterr().err
        assert shown.startswith(f'this happened with {place} of the config')


@pytest.mark.parametrize(
    'text',
    [
        '[../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:12450. This is',
        '[../gloo/transport/tcp/pair.cc:534] Read error [10.0.0.2]:3: Connection reset by peer',
        'NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error, NCCL '
        'version 2.29.3\nncclRemoteError: A call failed possibly due to a network error',
    ],
)
def test_processes_that_survive_another_point_to_it(text):
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        message = explain(error)
    assert message.startswith('the connection to another process of the run is lost (')
    assert 'in the output of that process' in message


def test_runner_s_parts_are_named():
    loader = {'batch_size': 0, 'dataset': [0], 'sampler': {'type': 'DefaultSampler'}}
    with pytest.raises(ValueError, match='batch_size') as info:
        Runner.build_dataloader(dict(loader), seed=0)
    cfg = {'val_dataloader': {**loader, 'batch_size': 2}, 'test_dataloader': loader}
    assert explain(info.value, cfg).startswith('test_dataloader: batch_size')


def test_locate_takes_the_most_similar():
    cfg = {
        'dataset': {'type': 'D', 'path': 'a'},
        'train_dataloader': {'dataset': {'type': 'D', 'path': 'a'}},
        'val_dataloader': {'dataset': {'type': 'D', 'path': 'b', 'more': torch.zeros(2)}},
    }
    assert locate(cfg, {'type': 'D', 'path': 'a', 'new': 1}) == 'train_dataloader.dataset'
    assert locate(cfg, {'type': 'D', 'path': 'b', 'more': torch.ones(2)}).startswith('val_')
    assert locate(cfg, {'type': 'E'}) is None
    # Of two with the same values, the one without others.
    cfg['test_dataloader'] = {'dataset': {'type': 'D', 'path': 'b'}}
    assert locate(cfg, {'type': 'D', 'path': 'b'}) == 'test_dataloader.dataset'


class Broken(Dataset):
    def __init__(self, error: Exception):
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise self.error


@pytest.mark.parametrize('workers', [0, 1])
def test_errors_of_workers(workers):
    for error, expected in (
        (SampleError("cannot load image 'a.png'"), "cannot load image 'a.png'"),
        (FileNotFoundError(2, 'No such file', 'a.png'), 'a.png'),
    ):
        with pytest.raises(type(error)) as info:
            next(iter(DataLoader(Broken(error), num_workers=workers)))
        assert expected in explain(info.value)
    with pytest.raises(ZeroDivisionError) as info:
        next(iter(DataLoader(Broken(ZeroDivisionError('oh')), num_workers=workers)))
    assert explain(info.value) is None


def test_uneven_batch():
    items = [torch.zeros(2), torch.zeros(3)]
    with pytest.raises(RuntimeError) as info:
        next(iter(DataLoader(items, batch_size=2)))
    assert 'different sizes ([2] at entry 0 and [3] at entry 1)' in explain(info.value)


def test_missing_packages_and_files(tmp_path):
    with pytest.raises(ModuleNotFoundError) as info:
        __import__('surely_not_there')
    assert explain(info.value).startswith("the package 'surely_not_there' is missing")
    with pytest.raises(OSError) as info:
        (tmp_path / 'gone').read_text()
    assert explain(info.value) == f"No such file or directory: '{tmp_path / 'gone'}'"
    error = ModuleNotFoundError("No module named 'mmvim.x'", name='mmvim.x')
    assert explain(error) is None


def test_out_of_memory():
    assert 'batch_size' in explain(torch.OutOfMemoryError('CUDA out of memory. Tried …\nmore'))


def test_report_exits_and_can_show_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv('RANK', '3')
    with pytest.raises(SystemExit) as info, diagnosis.reported_errors():
        raise UserError('the thing is 3; allowed: 1, 2')
    assert info.value.code == 2
    assert capsys.readouterr().err == 'error (rank 3): the thing is 3; allowed: 1, 2\n'
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('MMVIM_DEBUG', '1')
    with pytest.raises(SystemExit), diagnosis.reported_errors():
        raise UserError('x')
    assert 'Traceback' in capsys.readouterr().err
    monkeypatch.delenv('MMVIM_DEBUG')
    with pytest.raises(ZeroDivisionError), diagnosis.reported_errors():
        raise ZeroDivisionError
    with pytest.raises(SystemExit) as info, diagnosis.reported_errors():
        raise KeyboardInterrupt
    assert info.value.code == 130


def test_errors_can_travel_between_processes():
    for kind in (UserError, SampleError, CheckpointError):
        assert str(pickle.loads(pickle.dumps(kind('text')))) == 'text'


class LoadThing:
    def __call__(self, results: dict) -> dict:
        raise ValueError('bad\nbytes')


class Flip:
    def __call__(self, results: dict) -> dict:
        raise ValueError('cannot flip')


def test_samples_name_the_file(monkeypatch):
    from mmengine.dataset import Compose

    monkeypatch.setattr(Compose, '__call__', Compose.__call__)
    samples.install()
    samples.install()
    assert Compose.__call__.__wrapped__.__module__.startswith('mmengine')
    with pytest.raises(SampleError, match=r"image 'a\.png' \(LoadThing\): ValueError: bad b"):
        Compose([LoadThing()])({'img_path': 'a.png'})
    with pytest.raises(ValueError, match='cannot flip'):
        Compose([Flip()])({'img_path': 'a.png'})
    with pytest.raises(ValueError, match='bad'):
        Compose([LoadThing()])({'other': 1})


def test_module_imports_no_task_library():
    import subprocess

    code = (
        'import sys, mmvim.cli.launcher\n'
        "print([m for m in ('mmdet', 'mmseg', 'mmpretrain') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip().splitlines()[-1] == '[]', done.stderr


class Wrapped(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.backbone = torch.nn.Identity()
        self.neck = torch.nn.Sequential(layer)

    def forward(self, x):
        return self.neck(self.backbone(x))


@pytest.mark.parametrize(
    ('layer', 'shape'),
    [
        (torch.nn.Linear(3, 2), (2, 5)),
        (torch.nn.Conv2d(3, 2, 1), (2, 5, 4, 4)),
        (torch.nn.BatchNorm2d(3), (2, 5, 4, 4)),
    ],
)
def test_wrong_channels_name_the_layer(layer, shape):
    with pytest.raises(RuntimeError) as info:
        Wrapped(layer)(torch.randn(shape))
    line = explain(info.value)
    assert line.startswith(f'model.neck.0 ({type(layer).__name__}) wants 3 channels and gets 5: ')
    assert explain(RuntimeError('running_mean should contain 5 elements not 3')) is None


def test_a_type_that_is_not_found_for_want_of_a_scope():
    from mmengine.registry import MODELS

    from mmvim.cli.diagnosis import unknown_type

    line = unknown_type('model', 'NoSuchDetector', MODELS)
    assert "of 'mmengine', the scope of configs without default_scope" in line
    assert 'default_scope' not in unknown_type('model', 'mmengine.NoSuchDetector', MODELS)
