"""The benchmark of whole models, on the CPU and in miniature."""

import argparse
import csv
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from script_runner import run_script

REPO = Path(__file__).parents[2]
SCRIPT = REPO / 'tools' / 'benchmark' / 'models.py'
SMALL = ('--device', 'cpu', '--batch', 2, '--sizes', 32, '--repeats', 2, '--dtype', 'float32')


@pytest.fixture(scope='module')
def models(load_script):
    return load_script('benchmark/models.py')


def test_rows_hold_what_was_measured(tmp_path):
    table = tmp_path / 'sub' / 'models.csv'
    plot = tmp_path / 'plot.svg'
    done = run_script(
        'benchmark/models.py', *SMALL, '--models', 'vim-t', '--csv', table, '--plot', plot
    )
    assert done.returncode == 0, done.stdout
    head, *lines = table.read_text().splitlines()
    assert 'torch' in head
    rows = list(csv.DictReader(lines))
    assert [(r['package'], r['mode'], r['size']) for r in rows] == [
        ('mmvim', 'inference', '32x32'),
        ('mmvim', 'training', '32x32'),
    ]
    assert plot.read_text().lstrip().startswith('<?xml')
    again = tmp_path / 'again.svg'
    done = run_script('benchmark/models.py', '--read', table, '--plot', again)
    assert done.returncode == 0
    assert again.stat().st_size == pytest.approx(plot.stat().st_size, rel=0.01)
    for row in rows:
        rate, milliseconds = float(row['rate']), float(row['milliseconds'])
        assert rate > 0
        assert math.isclose(rate * milliseconds, 2 * 1e3, rel_tol=1e-6)
        assert not row['note']


def test_a_killed_run_leaves_its_rows(tmp_path):
    """SIGTERM, which Python does not handle, while there is much left to measure."""
    table = tmp_path / 'models.csv'
    options = (*SMALL, '--models', 'vim-t', '--modes', 'inference', '--csv', table)
    command = [sys.executable, SCRIPT, *options, '--sizes', *[32] * 1000]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': '1'}
    )
    try:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            if table.is_file() and len(table.read_text().splitlines()) >= 4:
                break
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()
    assert table.read_text().endswith('\n')
    head, *lines = table.read_text().splitlines()
    assert head.startswith('# ')
    rows = list(csv.DictReader(lines))
    assert 2 <= len(rows) < 1000
    assert all(float(row['rate']) > 0 and row['note'] == '' for row in rows)


def test_a_table_without_rows_is_not_drawn(tmp_path):
    table = tmp_path / 'models.csv'
    table.write_text('# a GPU\nmodel,package\n')
    done = run_script('benchmark/models.py', '--read', table, '--plot', tmp_path / 'x.svg')
    assert done.returncode == 1
    assert done.stderr == f'error: {table} has no rows\n'


def test_a_missing_peer_is_a_row_with_the_reason_and_an_error():
    done = run_script(
        'benchmark/models.py', *SMALL, '--models', 'mambavision-t', '--modes', 'inference',
        '--peers', 'mambavision',
    )  # fmt: skip
    assert done.returncode == 1
    assert "failed: No module named 'mambavision'" in done.stdout


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (('--models', 'vim-x'), 'invalid choice'),
        (('--batch', '0'), 'must be positive, got 0'),
        (('--profile', 'x.svg'), '--profile needs a CUDA device, got --device cpu'),
        (('--read', 'x.csv'), '--read needs --plot or --profile'),
        (('--runs', 'graph'), '--runs graph needs a CUDA device, got --device cpu'),
        (('--models', 'vim-t-1024', '--runs', 'launcher'), 'vim-t-1024 has no run of --runs'),
        (('--models', 'upernet-vim-t', '--peers', 'timm'), 'upernet-vim-t has no run of --runs'),
    ],
)
def test_bad_options(option, message):
    done = run_script('benchmark/models.py', '--device', 'cpu', *option)
    assert done.returncode == 2
    assert message in done.stderr


def test_profiles_are_drawn(tmp_path):
    table, picture = tmp_path / 'parts.csv', tmp_path / 'parts.svg'
    table.write_text('# a GPU\nmodel,scan,convolution,attention,norm,optimizer,matrix products,'
                     'elementwise\n"vim-t, training",4,1,0,1,0.5,3,0.5\n')  # fmt: skip
    done = run_script('benchmark/models.py', '--read', table, '--profile', picture)
    assert done.returncode == 0, done.stderr
    assert '10.0 ms' in picture.read_text()


@pytest.mark.parametrize('picture', [False, True])
def test_a_stopped_profile_leaves_its_rows(models, monkeypatch, capsys, tmp_path, picture):
    table = tmp_path / 'parts.csv'
    times = dict.fromkeys((*models.PARTS, models.REST), 1.5)

    def profile_all(args, device):
        yield 'vim-t, inference', times
        assert 'vim-t, inference ' in capsys.readouterr().out
        raise KeyboardInterrupt

    monkeypatch.setattr(models, 'profile_all', profile_all)
    args = argparse.Namespace(profile=table, csv=None)
    if picture:
        args = argparse.Namespace(profile=tmp_path / 'parts.svg', csv=table)
    with pytest.raises(KeyboardInterrupt):
        models.profile(args, torch.device('cpu'))
    _, *lines = table.read_text().splitlines()
    (row,) = csv.DictReader(lines)
    assert row.pop('model') == 'vim-t, inference'
    assert {part: float(time) for part, time in row.items()} == times


@pytest.mark.gpu
def test_profile(models, tmp_path):
    table = tmp_path / 'parts.csv'
    done = run_script('benchmark/models.py', '--models', 'vim-t', '--batch', 2, '--profile', table)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(table.read_text().splitlines()[1:]))
    assert [row['model'] for row in rows] == ['vim-t, inference', 'vim-t, training']
    for row in rows:
        assert float(row['scan']) > 0
        assert float(row['matrix products']) > 0


def test_parts_of_a_step(models):
    assert models.part_of('void mmvim::scan::forward_kernel<__nv_bfloat16>') == 'scan'
    assert models.part_of('void mmvim::norm::backward_kernel<float>') == 'norm'
    assert models.part_of('nvjet_sm90_tst_192x192_64x4') == 'matrix products'
    assert models.part_of('vectorized_elementwise_kernel') == 'elementwise'
    lines = models.lines_of_rest(
        {
            'nvjet_sm90_tst_192x192_64x4': (1.0, 9.0),
            'void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >': (
                3,
                0.5,
            ),
            'void (anonymous namespace)::roi_align_backward_kernel<float>': (8.0, 2.25),
        }
    )
    assert lines == [
        '       2.25 ms    8.0 x  roi_align_backward_kernel<float>',
        '       0.50 ms    3.0 x  vectorized_elementwise_kernel<4, FillFunctor<float> >',
    ]
    assert models.sized(models.MODELS['vim-t'], 448, None) == ((3, 448, 448), 32)


def test_the_reference_peer_runs_the_reference_scan(models, monkeypatch):
    calls = []
    interface = types.ModuleType('mamba_ssm.ops.selective_scan_interface')
    interface.selective_scan_ref = lambda u, *_: calls.append(u.shape) or u
    for name in ('mamba_ssm', 'mamba_ssm.ops'):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    net = models._on_reference_scan(models.MODELS['vim-t'].build)(32).eval()
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    assert len(calls) == 2 * 24


@pytest.mark.parametrize(
    ('model', 'size', 'more'),
    [('vim-t', 32, []), ('upernet-vim-t', 64, ['--runs', 'launcher', 'eager'])],
)
def test_the_launcher_trains(model, size, more, tmp_path):
    pytest.importorskip('mmseg' if 'upernet' in model else 'mmpretrain')
    table = tmp_path / 'models.csv'
    options = ['--batch', 2, '--sizes', size, '--repeats', 2, '--dtype', 'float32']
    done = run_script(
        'benchmark/models.py', *options, '--models', model, '--runs', 'launcher', *more,
        '--csv', table,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (row,) = csv.DictReader(table.read_text().splitlines()[1:])
    assert (row['run'], row['mode'], row['batch']) == ('launcher', 'training', '2')
    assert float(row['rate']) * float(row['milliseconds']) == pytest.approx(2e3)


def test_what_runs_there_are(models):
    launched = [
        (name, run, mode)
        for name, case in models.MODELS.items()
        for run in models.RUNS
        for mode in models.MODES
        if models.runs(case, 'mmvim', run, mode)
    ]
    assert ('vim-t', 'launcher-graph', 'training') in launched
    assert ('vim-t', 'launcher', 'inference') not in launched
    assert ('vim-t-1024', 'launcher', 'training') not in launched
    assert {mode for name, _, mode in launched if name == 'mask-rcnn-r50'} == {'training'}
    for family in ('vim', 'mambavision', 'vmamba'):
        for name in (f'{family}-t', f'mask-rcnn-{family}-t', f'upernet-{family}-t'):
            assert (name, 'launcher', 'training') in launched
    assert not models.runs(models.MODELS['vim-t'], 'timm', 'launcher', 'training')


def test_the_configs_are_those_of_the_models(models):
    for name, case in models.MODELS.items():
        if not case.config or '::' in case.config:
            continue
        backbone = Config.fromfile(REPO / 'configs' / f'{case.config}.py').model.backbone
        if case.build is None:  # a detector or segmentor: the config alone
            continue
        with torch.device('meta'):
            own = case.build(case.shape[-1]).backbone
        assert backbone.type == f'mmvim.{type(own).__name__}'
        assert own._parse_arch(backbone.arch) == own.arch, name
