"""The benchmark of the ops, on the CPU and in miniature."""

import csv
import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / 'docs' / 'operations' / 'benchmarks'


@pytest.fixture(scope='module')
def bench(load_script):
    return load_script('benchmark/ops.py')


@pytest.fixture
def quick(bench, capsys):
    def run(*argv):
        status = bench.main(['--device', 'cpu', '--shapes', '2x6x9x3', '--seconds', '0.001', *argv])
        return status, capsys.readouterr()

    return run


def test_every_op_is_measured_and_right(quick, tmp_path):
    table = tmp_path / 'sub' / 'out.csv'
    status, printed = quick('--errors', '--torch-path', '--no-peers', '--csv', str(table))
    assert status == 0
    with table.open() as file:
        rows = list(csv.DictReader(file))
    measured = {(r['op'], r['implementation'], r['direction']) for r in rows}
    for op in ('scan', 'bidirectional', 'conv', 'bidirectional-conv', 'norm'):
        for direction in ('forward', 'backward'):
            assert (op, 'mmvim', direction) in measured
            assert re.search(rf'(?m)^{op} .* {direction} ', printed.out)
    assert ('scan', 'mmvim-torch', 'backward') in measured
    for row in rows:
        assert float(row['fastest']) <= float(row['time']) <= float(row['slowest'])
        assert row['dtype'] == 'float32'
        assert row['batch'] == '2'
        assert row['states'] == '3'
        assert row['torch'] == f'torch {torch.__version__}'
    errors = [float(r['error']) for r in rows if r['error']]
    # forward, backward and both of scan and its PyTorch path; forward and backward of conv
    assert len(errors) == 8
    assert max(errors) < 1e-5


def test_peers_on_a_cpu(quick, monkeypatch):
    """A package's scan is measured by autograd, with its error, beside both of our passes."""

    def pscan(decay, drive):
        states, h = [], torch.zeros_like(drive[:, 0])
        for t in range(drive.shape[1]):
            h = decay[:, t] * h + drive[:, t]
            states.append(h)
        return torch.stack(states, 1)

    module = types.ModuleType('mambapy.pscan')
    module.pscan = pscan
    monkeypatch.setitem(sys.modules, 'mambapy', types.ModuleType('mambapy'))
    monkeypatch.setitem(sys.modules, 'mambapy.pscan', module)
    _, printed = quick('--ops', 'scan', '--errors')
    for direction in ('forward', 'forward+backward'):
        row = re.search(
            rf'(?m)^scan .* mambapy +{re.escape(direction)} .* error (\S+)', printed.out
        )
        assert float(row[1]) < 1e-5
        # Which peer is the fastest at this size is chance.
        fastest = r'.*x (mambapy|mamba_ssm reference)$'
        assert re.search(rf'(?m)^scan .* {re.escape(direction)} {fastest}', printed.out)


def test_error_is_that_of_the_candidate(bench):
    """A wrong implementation shows."""
    shape, device = (2, 6, 9, 3), torch.device('cpu')
    errors = bench.Errors('scan', shape, torch.float32, device, 0, 'zoh')
    right = bench.mmvim_scan(bench.scan_data(shape, torch.float32, device, 0), 'zoh')
    other = bench.mmvim_scan(bench.scan_data(shape, torch.float32, device, 1), 'zoh')
    for direction in ('forward', 'backward'):
        assert errors.of(right, direction) < 1e-5
        assert errors.of(other, direction) > 0.5


def test_methods(quick):
    _, printed = quick('--ops', 'scan', '--methods', 'all', '--no-backward')
    methods = re.findall(r'(?m)^scan +2x6x9x3 +float32 +(\w+) +forward', printed.out)
    assert len(methods) == len(set(methods)) == 9


def test_csv_round_trip_and_plot(quick, bench, tmp_path):
    table, plot = tmp_path / 'a.csv', tmp_path / 'b' / 'a.svg'
    _, first = quick('--ops', 'bidirectional', '--csv', str(table))
    status, second = quick('--from-csv', str(table), '--plot', str(plot))
    assert status == 0
    assert second.out.strip() in first.out
    assert 'two calls' in plot.read_text() or plot.stat().st_size > 5000


def test_nothing_to_plot(quick, tmp_path):
    status, printed = quick('--ops', 'conv', '--plot', str(tmp_path / 'a.svg'))
    assert status == 1
    assert 'there is nothing to plot' in printed.err


def test_a_stopped_run_leaves_its_rows(quick, bench, monkeypatch, tmp_path):
    table = tmp_path / 'out.csv'
    measure_one, calls = bench.measure_one, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            # Each row is in the file before the next one is measured.
            assert len(bench.read_csv(table)[0]) == 2
            raise KeyboardInterrupt
        return measure_one(*args)

    monkeypatch.setattr(bench, 'measure_one', stopped)
    with pytest.raises(KeyboardInterrupt):
        quick('--ops', 'scan', '--no-peers', '--csv', str(table))
    rows, machine = bench.read_csv(table)
    assert [row.direction for row in rows] == ['forward', 'training-forward']
    assert machine['torch'] == f'torch {torch.__version__}'
    status, printed = quick('--from-csv', str(table))
    assert status == 0
    assert re.search(r'(?m)^scan .* training-forward ', printed.out)


def test_time_limit(quick, bench, tmp_path):
    table = tmp_path / 'out.csv'
    status, printed = quick('--time-limit', '0', '--csv', str(table))
    assert status == 0
    assert 'stopped after 0 s' in printed.out
    assert bench.read_csv(table) == ([], {})


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--shapes', 'vim-huge'], "'vim-huge' is neither built in nor BxDxLxN"),
        (['--shapes', '2x0x9x3'], "'2x0x9x3' is neither built in nor BxDxLxN"),
        (['--ops', 'attention'], "invalid choice: 'attention'"),
    ],
)
def test_bad_arguments(bench, capsys, argv, message):
    with pytest.raises(SystemExit):
        bench.main(['--device', 'cpu', *argv])
    assert message in capsys.readouterr().err


def test_bad_peer(quick):
    status, printed = quick('--peer', 'mamba_ssm=/nowhere.so')
    assert status == 1
    assert "--peer must be mamba_ssm|oflex|causal_conv1d=FILE, got 'mamba_ssm=/nowhere.so'" in (
        printed.err
    )


def test_published_figures_are_whole(bench):
    """The table in the documentation holds every built-in shape, and says where it was measured."""
    rows, machine = bench.read_csv(TABLES / 'h100.csv')
    assert 'H100' in machine['device']
    assert machine['cuda'].startswith('CUDA')
    for op in ('scan', 'conv', 'bidirectional'):
        for direction in ('forward', 'backward'):
            shapes = {
                r.shape
                for r in rows
                if (r.op, r.direction, r.implementation) == (op, direction, 'mmvim')
            }
            assert shapes == set(bench.SHAPES)
    peers = {r.implementation for r in rows}
    assert {'mamba_ssm', 'causal_conv1d'} <= peers
