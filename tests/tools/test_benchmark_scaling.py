"""The benchmark of several devices, on the CPU."""

import argparse
import csv
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmvim.cli.config_keys import RUNNER_KEYS

pytest.importorskip('mmpretrain')

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / 'configs' / 'quickstart' / 'vim_digits_cls.py')
CLASSIFIERS = {
    'vim/vim-tiny_8xb128_in1k.py': [3, 224, 224],
    'mambavision/mambavision-tiny_32xb128_in1k.py': [3, 224, 224],
    'videomamba/videomamba-middle-distill_16xb128_in1k.py': [3, 224, 224],
    'videomamba/videomamba-tiny_in1k-pre_8xb64-16x224-70e_kinetics400.py': [3, 16, 224, 224],
}


@pytest.fixture(scope='module')
def scaling(load_script):
    return load_script('benchmark/scaling.py')


@pytest.fixture
def fake_training(scaling, monkeypatch, tmp_path):
    """Let a line of shell take the place of tools/dist_train.sh."""

    def use(text: str) -> None:
        (tmp_path / 'tools').mkdir()
        (tmp_path / 'tools' / 'dist_train.sh').write_text(text)
        monkeypatch.setattr(scaling, 'ROOT', tmp_path)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)

    return use


@pytest.mark.skipif(torch.cuda.is_available(), reason='the CPU path')
def test_one_process(scaling, capsys, tmp_path):
    """A whole run: a config that is shipped, its hooks, the launcher, gloo."""
    table = tmp_path / 'sub' / 'scaling.csv'
    status = scaling.main(
        ['--config', CONFIG, '--batch', '2', '--warm-up', '1', '--iterations', '2',
         '--dtype', 'float32', '--csv', str(table)]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0, printed.err
    head, *lines = table.read_text().splitlines()
    assert f'torch {torch.__version__}' in head
    (row,) = csv.DictReader(lines)
    assert (row['config'], row['processes'], row['batch']) == ('vim_digits_cls', '1', '2')
    assert float(row['rate']) * float(row['milliseconds']) == pytest.approx(2 * 1e3)
    assert row['factor'] == '1.0'
    assert '  1 x 2 ' in printed.out


def test_rates_and_factors(scaling, fake_training, tmp_path):
    """Two processes do twice the samples in 1.25 times the time."""
    fake_training(
        'echo "{\\"processes\\": $2, \\"seconds\\": 1.$((($2 - 1) * 25))}" > ${1%.py}.json'
    )
    table = tmp_path / 'scaling.csv'
    options = ['--batch', '8', '--iterations', '10', '--csv', str(table)]
    scaling.main(['--config', CONFIG, '--processes', '2', '1', *options])
    rows = list(csv.DictReader(table.read_text().splitlines()[1:]))
    assert [
        [float(row[key]) for key in ('processes', 'rate', 'milliseconds', 'factor')] for row in rows
    ] == [[1, 80, 100, 1], [2, 128, 125, 1.6]]


def test_a_run_that_fails_says_why_and_keeps_the_other_rows(
    scaling, fake_training, capsys, tmp_path
):
    fake_training(
        '[ $2 = 1 ] || { echo "error: the reason"; exit 1; }\n'
        'echo "{\\"processes\\": 1, \\"seconds\\": 1}" > ${1%.py}.json'
    )
    table = tmp_path / 'scaling.csv'
    with pytest.raises(SystemExit, match='2'):
        scaling.main(['--config', CONFIG, CONFIG, '--processes', '1', '2', '--csv', str(table)])
    message = 'error: training with --processes 2 ended with code 1: the reason'
    assert capsys.readouterr().err.count(message) == 2
    assert len(table.read_text().splitlines()) == 4


def test_a_file_that_is_no_config_does_not_end_the_others(scaling, fake_training, capsys, tmp_path):
    fake_training(': # never ready\n')
    text, broken = tmp_path / 'notes.txt', tmp_path / 'broken.py'
    text.write_text('a = 1')
    broken.write_text('a = (')
    with pytest.raises(SystemExit):
        scaling.main(['--config', str(text), str(broken), str(tmp_path / 'none.py')])
    assert capsys.readouterr().err.count('the config file') == 3


def test_every_config_with_every_options(scaling, fake_training, capsys, tmp_path):
    """Also the milliseconds of kernels, where there is a GPU."""
    fake_training(
        f'{sys.executable} - $1 $2 <<"EOF"\n'
        'import json, sys\n'
        'from mmengine.config import Config\n'
        'cfg = Config.fromfile(sys.argv[1], import_custom_modules=False)\n'
        'static = (cfg.get("model_wrapper_cfg") or {}).get("static_graph", False)\n'
        'kernels = {"ncclDevKernel": [2, 1.5 + static], "gemm": [9, 4.0], "scan": [3, 2.0]}\n'
        'result = {"processes": int(sys.argv[2]), "seconds": 1, "gib": 3.0, "kernels": kernels}\n'
        'open(sys.argv[1][:-2] + "json", "w").write(json.dumps(result))\n'
        'EOF\n'
    )
    table = tmp_path / 'scaling.csv'
    wrapper = 'model_wrapper_cfg=dict(static_graph=True)'
    scaling.main(
        ['--config', CONFIG, str(ROOT / 'configs' / 'vim' / 'vim-tiny_8xb128_in1k.py'),
         '--processes', '2', '--cfg-options', 'graph=False',
         '--cfg-options', 'graph=True', wrapper, '--csv', str(table)]
    )  # fmt: skip
    rows = list(csv.DictReader(table.read_text().splitlines()[1:]))
    assert [(row['config'], row['options'], row['nccl'], row['kernels']) for row in rows] == [
        (config, options, nccl, '6.0')
        for config in ('vim_digits_cls', 'vim-tiny_8xb128_in1k')
        for options, nccl in (('graph=False', '1.5'), (f'graph=True {wrapper}', '2.5'))
    ]
    printed = capsys.readouterr().out
    assert '(3.00 GiB; kernels 6.00 ms, NCCL 1.50 ms)' in printed
    assert 'nan' not in printed


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_a_config_needs_neither_data_nor_weights(scaling, tmp_path, name):
    cfg = Config.fromfile(ROOT / 'configs' / name)
    before = cfg.pretty_text
    args = argparse.Namespace(warm_up=3, iterations=5, size=None, config=name)
    scaling.synthetic(cfg, 16, 2, args, tmp_path / 'out.json').dump(tmp_path / 'config.py')
    assert cfg.pretty_text == before
    changed = Config.fromfile(tmp_path / 'config.py', import_custom_modules=False)
    assert changed.custom_imports.imports[-1] == 'synthetic'
    read = ' '.join(str(changed.get(key)) for key in RUNNER_KEYS)
    assert 'http' not in read
    assert 'data/' not in read
    assert changed.model.backbone.type == cfg.model.backbone.type
    assert changed.optim_wrapper == cfg.optim_wrapper
    assert changed.param_scheduler == cfg.param_scheduler
    assert changed.custom_hooks[:-1] == (cfg.get('custom_hooks') or [])
    assert changed.val_dataloader is None
    loader = changed.train_dataloader
    assert loader.collate_fn.shape == CLASSIFIERS[name]
    assert loader.dataset.length == (3 + 5) * 16 * 2


@pytest.mark.parametrize(
    ('name', 'side'),
    [
        ('vim/mask-rcnn_vim-tiny_simplefpn_1x_coco.py', 1024),
        ('vim/cascade-mask-rcnn_vim-tiny_simplefpn_8xb8-lsj-100ep_coco.py', 1024),
        ('mambavision/mambavision-tiny_upernet_8xb2-160k_ade20k-512x512.py', 512),
    ],
)
def test_batches_of_other_tasks(scaling, tmp_path, name, side):
    cfg = Config.fromfile(ROOT / 'configs' / name)
    args = argparse.Namespace(warm_up=3, iterations=5, size=None, config=name)
    changed = scaling.synthetic(cfg, 2, 1, args, tmp_path / 'out.json', profiled=2)
    collate = changed.train_dataloader.collate_fn
    assert collate.shape == [3, side, side]
    assert collate.classes == (150 if 'upernet' in name else 80)
    assert collate.task == changed.default_scope
    assert changed.custom_hooks[-1].profiled == 2
    assert changed.train_dataloader.dataset.length == (3 + 5 + 2) * 2


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (('--processes', '0'), 'must be positive, got 0'),
        (('--config', 'nothing.py'), 'nothing.py'),
        (
            (
                '--config',
                str(ROOT / 'configs' / '_base_' / 'default_runtime_mmdet.py'),
                '--batch',
                '2',
            ),
            'default_runtime_mmdet.py is not the config of a classifier, detector or segmentor',
        ),
        (('--cfg-options', 'modell.x=1'), "the config has no 'modell'"),
    ],
)
def test_bad_options(scaling, capsys, options, message):
    with pytest.raises(SystemExit, match='2'):
        scaling.main(list(options))
    assert message in capsys.readouterr().err
