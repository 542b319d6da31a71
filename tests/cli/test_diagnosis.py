"""Exceptions that become one line, and exceptions that keep their traceback."""

import pickle
import sys

import pytest
import torch
from mmengine.registry import Registry
from torch.utils.data import DataLoader, Dataset

from mmvim.cli import diagnosis, samples
from mmvim.cli.diagnosis import explain, locate, reported_errors
from mmvim.errors import CheckpointError, SampleError, UserError

PARTS = Registry('part')


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
        if kind == 'tensor':
            torch.zeros(self.size)
        if kind == 'lookup':
            {}['missing']
        if kind == 'deep':
            PARTS.build({'type': 'Part', 'kind': 'bad'})


@PARTS.register_module()
class Inner(Part):
    def __init__(self, name: str, **kwargs):
        super().__init__(**kwargs)


def explained(config: dict, cfg: dict | None = None) -> str | None:
    with pytest.raises(Exception) as info:
        PARTS.build(config)
    return explain(info.value, cfg or {'model': {'part': config}})


def test_build_errors_name_the_key():
    assert explained({'type': 'Part', 'kind': 'bad'}) == (
        "model.part (Part): kind must be 'good', not 'bad'"
    )
    assert explained({'type': 'Part', 'kind': 'good', 'widht': 3}) == (
        "model.part: Part has no argument 'widht' (did you mean 'width'?); "
        'allowed: kind, width, depth'
    )
    assert explained({'type': 'Part'}) == (
        "model.part: Part needs 'kind', which the config does not give"
    )
    assert explained({'type': 'Inner', 'name': 'x'}) == (
        "model.part: Inner needs 'kind', which the config does not give"
    )
    unknown = explained({'type': 'Pat'})
    assert unknown.startswith("model.part.type is 'Pat', which is not a reg")
    assert 'the config has no default_scope' in unknown
    scoped = {'model': {'part': {'type': 'Pat'}}, 'default_scope': 'mmdet'}
    assert explained({'type': 'Pat'}, scoped).endswith("; default_scope is 'mmdet'")
    scoped['default_scope'] = PARTS.scope
    assert 'default_scope' not in explained({'type': 'Pat'}, scoped)
    assert explained({'kind': 'x'}) is not None
    nested = {'model': {'outer': {'type': 'Part', 'kind': 'deep', 'inner': [{'type': 'Part'}]}}}
    nested['model']['outer']['inner'][0]['kind'] = 'bad'
    message = explained({'type': 'Part', 'kind': 'deep'}, nested)
    assert message.startswith('model.outer.inner.0 (Part): ')


def test_values_of_another_type_are_named():
    assert explained({'type': 'Part', 'kind': 'good', 'width': {'a': 7}}) == (
        "model.part (Part): width={'a': 7} must be int "
        "(TypeError: unsupported operand type(s) for *: 'dict' and 'int')"
    )
    # A library's own part, which is not in the config, has no key to name.
    unseen = explained({'type': 'Part', 'kind': 'good', 'width': {}}, {'model': {'type': 'Other'}})
    assert unseen is None


def test_negative_sizes_are_named():
    message = explained({'type': 'Part', 'kind': 'tensor', 'width': -2})
    assert message.startswith('model.part (Part): width=-2 (RuntimeError: ')


def test_bugs_stay_bugs():
    assert explained({'type': 'Part', 'kind': 'bug'}) is None
    assert explained({'type': 'Part', 'kind': 'lookup'}) is None
    for error in (RuntimeError('x'), IndexError('x'), ValueError('x'), KeyError('x')):
        with pytest.raises(type(error)) as info:
            raise error
        assert explain(info.value) is None


def test_bugs_say_where_in_the_config_they_arose(capsys):
    cfg = {'model': {'part': {'type': 'Part', 'kind': 'bug'}}, 'part': {'type': 'Part'}}

    def build():
        with reported_errors() as context:
            context.cfg = cfg
            PARTS.build(cfg['model']['part'])

    with pytest.raises(AttributeError) as info:
        build()
    shown = ''.join(getattr(info.value, '__notes__', [])) + capsys.readouterr().err
    assert shown.startswith('this happened with model.part')
    with pytest.raises(TypeError) as info:
        PARTS.build('Part')
    assert explain(info.value, cfg) == "a component must be a dict with a type, got 'Part'"


def test_locate_takes_the_most_similar():
    cfg = {
        'dataset': {'type': 'D', 'path': 'a'},
        'train_dataloader': {'dataset': {'type': 'D', 'path': 'a'}},
        'val_dataloader': {'dataset': {'type': 'D', 'path': 'b', 'more': torch.zeros(2)}},
    }
    assert locate(cfg, {'type': 'D', 'path': 'a', 'new': 1}) == 'train_dataloader.dataset'
    assert locate(cfg, {'type': 'D', 'path': 'b', 'more': torch.ones(2)}).startswith('val_')
    assert locate(cfg, {'type': 'E'}) == 'E'


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
