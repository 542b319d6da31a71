"""Options of the command line, and checks that need no run."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.fileio import dump, get_file_backend
from mmengine.registry import DATASETS
from mmengine.runner import Priority
from ports import free_port

from mmvim.cli import checks, distributed, parsers
from mmvim.cli.options import parse_value
from mmvim.engine import atomic_io
from mmvim.errors import UserError


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('1e-3', 1e-3),
        ('a,b', ['a', 'b']),
        ('[(1,2),(3,4)]', [(1, 2), (3, 4)]),
        ('None', None),
        ("dict(type='EMAHook', momentum=2e-4)", {'type': 'EMAHook', 'momentum': 2e-4}),
        ('[dict(a=dict(b=(1,-2)), c=[True])]', [{'a': {'b': (1, -2)}, 'c': [True]}]),
        ("{'a': [{'b': None}]}", {'a': [{'b': None}]}),
        ('path/with.dots', 'path/with.dots'),
        ('img_{:05}.jpg', 'img_{:05}.jpg'),
    ],
)
def test_values_of_options(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize('text', ["dict(a=open('x'))", 'dict(**x)', '{**a}', 'dict(1)', "{'a': b}"])
def test_options_are_literals(text):
    with pytest.raises((ValueError, SyntaxError)):
        parse_value(text)


@DATASETS.register_module()
class DownloadedDataset(BaseDataset):
    def __init__(self, download: bool = True, **kwargs):
        super().__init__(**kwargs)


@DATASETS.register_module()
class PlainDataset(BaseDataset):
    pass


def config(dataset: dict) -> Config:
    loader = {'dataset': dataset}
    return Config(
        {
            'model': {},
            'train_dataloader': loader,
            'train_cfg': {},
            'optim_wrapper': {},
            'default_scope': 'mmengine',
        }
    )


def test_paths_that_are_not_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dataset in (
        {'type': 'DownloadedDataset', 'data_root': 'gone'},
        {'type': 'PlainDataset', 'data_root': 's3://bucket/data', 'ann_file': 'a.json'},
        {'type': 'PlainDataset', 'data_root': 'gone', 'backend_args': {'backend': 'petrel'}},
        {'type': 'NotThere', 'data_root': 'gone'},
        {'type': 'PlainDataset'},
        {'type': 'PlainDataset', 'data_prefix': {'seg_map_path': 'no labels at test time'}},
    ):
        checks.check_config(config(dataset), ('train',))
    checks.check_config(config({'type': 'PlainDataset', 'data_root': 'gone'}), ('train',), False)
    for address in (None, 'https://host/a.pth', 'torchvision://resnet50', 'open-mmlab://x'):
        checks.check_checkpoint(address, 'load_from')


def test_paths_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    for dataset, expected in (
        ({'type': 'DownloadedDataset', 'download': False, 'data_root': 'gone'}, "'gone'"),
        ({'type': 'PlainDataset', 'data_root': 'data', 'data_prefix': 'x'}, "'data/x'"),
        (
            {'type': 'PlainDataset', 'data_root': 'data', 'ann_file': str(tmp_path / 'a.json')},
            str(tmp_path / 'a.json'),
        ),
        (
            {
                'type': 'PlainDataset',
                'data_prefix': {'seg_map_path': 'maps'},
                'pipeline': [{'type': 'LoadAnnotations'}],
            },
            "data_prefix.seg_map_path: the directory 'maps'",
        ),
        ({'type': 'PlainDataset', 'data_root': 3}, 'data_root must be str, not 3'),
    ):
        wrapped = {'type': 'ClassBalancedDataset', 'dataset': dataset, 'oversample_thr': 1}
        with pytest.raises(UserError) as info:
            checks.check_config(config(wrapped), ('train',))
        assert expected in str(info.value)
        assert 'train_dataloader.dataset.dataset.' in str(info.value)


def test_values_that_are_used_late(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for change, expected in (
        ({'train_cfg': {'max_epochs': 2, 'val_interval': ['x']}}, 'train_cfg: val_interval'),
        (
            {'default_hooks': {'checkpoint': {'type': 'CheckpointHook', 'interval': '3'}}},
            "default_hooks.checkpoint: interval='3' must be int",
        ),
        ({'custom_hooks': [{'type': 'EMAHook', 'begin_iter': []}]}, 'custom_hooks.0: begin_iter'),
        (
            {'custom_hooks': [{'type': 'EMAHook', 'priority': 'NoSuchName'}]},
            'custom_hooks.0.priority must be an integer in 0 .. 100 or one of HIGHEST, VERY_HIGH, '
            "HIGH, ABOVE_NORMAL, NORMAL, BELOW_NORMAL, LOW, VERY_LOW, LOWEST, not 'NoSuchName'",
        ),
        (
            {'default_hooks': {'timer': {'type': 'IterTimerHook', 'priority': -1}}},
            'default_hooks.timer.priority must be an integer in 0 .. 100 or',
        ),
        ({'custom_hooks': [{'type': 'EMAHook', 'priority': ['x']}]}, 'one of HIGHEST'),
        ({'log_level': None}, 'log_level must be int or one of CRITICAL, '),
        ({'log_level': 'LOUD'}, "not 'LOUD'"),
        ({'train_cfg': {'max_epochs': None}}, 'train_cfg: max_epochs=None must be int'),
        ({'log_processor': {'window_size': 'x'}}, 'log_processor: window_size'),
        (
            {'randomness': {'deterministic': True}},
            'randomness.seed must be None or in 0 .. 2**32 - 1',
        ),
        ({'randomness': {'seed': -1}}, 'randomness.seed must be None or in 0 .. 2**32 - 1'),
        ({'randomness': {'seed': ['x']}}, 'randomness: seed'),
        ({'env_cfg': {'mp_cfg': 3}}, 'env_cfg.mp_cfg must be dict'),
        ({'env_cfg': {'mp_cfg': {'opencv_num_threads': 'x'}}}, 'opencv_num_threads'),
        ({'env_cfg': {'dist_cfg': {'backend': 3}}}, 'env_cfg.dist_cfg: backend'),
        ({'visualizer': {'type': ['x']}}, 'visualizer.type must be the name of'),
        (
            {'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': '1e-3'}}},
            "optim_wrapper.optimizer: lr='1e-3' must be float",
        ),
        (
            {'optim_wrapper': {'paramwise_cfg': {'custom_keys': {'a': {'lr_mult': None}}}}},
            'optim_wrapper.paramwise_cfg.custom_keys.a.lr_mult must be a number, not None',
        ),
        (
            {'train_dataloader': {'dataset': {}, 'drop_last': 'yes'}},
            "train_dataloader.drop_last must be True or False, not 'yes'",
        ),
        (
            {'train_dataloader': {'dataset': {}, 'collate_fn': {}}},
            'train_dataloader.collate_fn must be a dict with a type',
        ),
        (
            {'train_dataloader.collate_fn': {'type': 'pseudo_collate', 'x': 1}},
            "train_dataloader.collate_fn: pseudo_collate has no argument 'x'",
        ),
        ({'optim_wrapper': {'optimizer': {'lr': 1}}}, 'optim_wrapper.optimizer has no type'),
        (
            {
                'optim_wrapper': {
                    'optimizer': {'type': 'SGD'},
                    'paramwise_cfg': {'custom_keys': {'a': {'decay_mult': 0}}},
                }
            },
            'optim_wrapper.optimizer has no lr',
        ),
        (
            {'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': None}}},
            'optim_wrapper.optimizer: lr=None must be float',
        ),
    ):
        cfg = config({'type': 'PlainDataset'})
        cfg.merge_from_dict(change)
        with pytest.raises(UserError) as info:
            checks.check_config(cfg, ('train',))
        assert expected in str(info.value)


@pytest.mark.parametrize('priority', [-1, 101, True, 'HIGHER', 1.5])
def test_priorities_out_of_range(priority):
    with pytest.raises(UserError, match=r'x\.priority must be an integer in 0 \.\. 100 or one of'):
        checks._check_priority(priority, 'x')


def test_options_add_up():
    words = ['c.py', '--cfg-options', 'a=1', 'b=2', '--cfg-options', 'b=3', 'c.d=x']
    args = parsers.build_train_parser().parse_args(words)
    assert args.cfg_options == {'a': 1, 'b': 3, 'c.d': 'x'}


def test_priorities_of_hooks():
    for priority in (0, 100, 'LOWEST', 'very_high', Priority.LOW, None):
        cfg = config({'type': 'PlainDataset'})
        cfg.custom_hooks = [{'type': 'EMAHook', 'priority': priority}]
        checks.check_config(cfg, ('train',))


def test_atomic_writes(tmp_path, monkeypatch):
    atomic_io.install()
    backend = get_file_backend(str(tmp_path))
    assert type(backend) is atomic_io.AtomicLocalBackend
    target = tmp_path / 'deep' / 'file.json'
    dump({'a': 1}, target)
    assert target.read_text() == '{"a": 1}'
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask

    def fail(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match=r'No space left on device.*file\.json'):
        backend.put(b'new', target)
    assert target.read_text() == '{"a": 1}'
    assert [path.name for path in target.parent.iterdir()] == ['file.json']


def test_several_writers_of_one_file(tmp_path):
    backend, target = atomic_io.AtomicLocalBackend(), tmp_path / 'metrics.json'
    texts = [str(i) * 10000 for i in range(10)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: backend.put_text(text, target), texts * 20))
    assert target.read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ['metrics.json']


def test_launchers_need_their_environment(monkeypatch):
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        monkeypatch.delenv(name, raising=False)
    for launcher, name in (('pytorch', 'RANK'), ('mpi', 'OMPI_COMM_WORLD_RANK')):
        with pytest.raises(UserError, match=name):
            distributed.prepare(Config({'model': {}}), launcher, [])
    distributed.prepare(Config({'model': {}}), 'none', [])


@pytest.fixture
def slurm(monkeypatch):
    """Set variables of Slurm; no others are set."""
    for name in ('MASTER_ADDR', 'MASTER_PORT', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        # Removed even if the code sets it.
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)

    def give(**variables: str) -> None:
        for name, value in {'PROCID': '0', 'NTASKS': '1', 'LOCALID': '0', **variables}.items():
            monkeypatch.setenv(f'SLURM_{name}', value)

    return give


def on_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)


def test_every_slurm_job_has_a_port_of_its_own(slurm, monkeypatch):
    on_gpus(monkeypatch, 8)
    ports = []
    for job, step in (('4711', '0'), ('4711', '1'), ('4712', '1'), ('999999999', 'batch')):
        monkeypatch.delenv('MASTER_PORT', raising=False)
        slurm(JOB_ID=job, STEP_ID=step)
        distributed.prepare(Config({'model': {}}), 'slurm', [])
        ports.append(int(os.environ['MASTER_PORT']))
    assert len(set(ports)) == 4
    assert all(1024 < port < 32768 for port in ports)
    # What the user says holds.
    distributed.prepare(Config({'model': {}}), 'slurm', [])
    assert int(os.environ['MASTER_PORT']) == ports[-1]
    monkeypatch.delenv('MASTER_PORT')
    settings = {'dist_cfg': {'backend': 'nccl', 'port': 1234}}
    distributed.prepare(Config({'model': {}, 'env_cfg': settings}), 'slurm', [])
    assert 'MASTER_PORT' not in os.environ


@pytest.mark.parametrize(
    ('count', 'message'), [(1, '--gpu-bind=none'), (2, 'there are 2; start as many')]
)
def test_processes_without_a_gpu(slurm, monkeypatch, count, message):
    on_gpus(monkeypatch, count)
    slurm(LOCALID='2')
    with pytest.raises(UserError, match=message):
        distributed.prepare(Config({'model': {}}), 'slurm', [])


def test_a_wrapper_of_the_config_is_completed(slurm, monkeypatch):
    """Options of DDP do not turn on what is off without them."""
    on_gpus(monkeypatch, 1)
    slurm()
    cfg = Config({'model': {}, 'model_wrapper_cfg': {'static_graph': True}})
    distributed.prepare(cfg, 'slurm', [])
    assert cfg.model_wrapper_cfg == {
        'type': 'MMDistributedDataParallel', 'static_graph': True,
        'broadcast_buffers': False, 'find_unused_parameters': False,
    }  # fmt: skip
    cfg = Config({'model': {}})
    distributed.prepare(cfg, 'slurm', [])
    assert 'model_wrapper_cfg' not in cfg
    other = {'type': 'MMFullyShardedDataParallel'}
    cfg = Config({'model': {}, 'model_wrapper_cfg': dict(other)})
    distributed.prepare(cfg, 'slurm', [])
    assert cfg.model_wrapper_cfg == other


@pytest.mark.skipif(torch.cuda.is_available(), reason='the CPU path')
def test_slurm_on_cpu(slurm, tmp_path, monkeypatch):
    port = int(free_port())
    script = tmp_path / 'scontrol'
    script.write_text('#!/bin/sh\n[ "$3" = "node[1-2]" ] && echo 127.0.0.1 && echo 10.0.0.2\n')
    script.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    slurm(NODELIST='node[1-2]')
    norms = {'norm_cfg': {'type': 'SyncBN'}, 'heads': [{'norm_cfg': {'type': 'SyncBN'}}]}
    cfg = Config({'model': norms, 'env_cfg': {'dist_cfg': {'backend': 'nccl', 'port': port}}})
    notes = []
    distributed.prepare(cfg, 'slurm', notes)
    try:
        assert torch.distributed.get_backend() == 'gloo'
        assert torch.distributed.get_world_size() == 1
        assert os.environ['MASTER_ADDR'] == '127.0.0.1'
        assert cfg.env_cfg.dist_cfg.backend == 'gloo'
        assert cfg.model_wrapper_cfg.device_ids is None
        assert cfg.model.norm_cfg.type == cfg.model.heads[0].norm_cfg.type == 'BN'
        assert len(notes) == 2
    finally:
        distributed.finish()
    assert not torch.distributed.is_initialized()
