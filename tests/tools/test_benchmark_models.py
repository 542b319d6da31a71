"""The benchmark of whole models, on the CPU and in miniature."""

import csv
import importlib.util
import math
import sys
from pathlib import Path

import pytest
from script_runner import run_script

SCRIPT = Path(__file__).parents[2] / 'tools' / 'benchmark' / 'models.py'
SMALL = ('--device', 'cpu', '--batch', 2, '--sizes', 32, '--repeats', 2, '--dtype', 'float32')


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


def test_parts_of_a_step():
    spec = importlib.util.spec_from_file_location('benchmark_models', SCRIPT)
    models = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = models
    spec.loader.exec_module(models)
    assert models.part_of('void mmvim::scan::forward_kernel<__nv_bfloat16>') == 'scan'
    assert models.part_of('void mmvim::norm::backward_kernel<float>') == 'norm'
    assert models.part_of('nvjet_sm90_tst_192x192_64x4') == 'matrix products'
    assert models.part_of('vectorized_elementwise_kernel') == 'elementwise'
    assert models.sized(models.MODELS['vim-t'], 448, None) == ((3, 448, 448), 32)
