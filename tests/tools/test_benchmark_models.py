"""The benchmark of whole models, on the CPU and in miniature."""

import csv
import math

import pytest
from script_runner import run_script

SMALL = ('--device', 'cpu', '--batch', 2, '--size', 32, '--repeats', 2, '--dtype', 'float32')


def test_rows_hold_what_was_measured(tmp_path):
    table = tmp_path / 'sub' / 'models.csv'
    done = run_script('benchmark/models.py', *SMALL, '--models', 'vim-t', '--csv', table)
    assert done.returncode == 0, done.stdout
    head, *lines = table.read_text().splitlines()
    assert 'torch' in head
    rows = list(csv.DictReader(lines))
    assert [(r['package'], r['mode'], r['size']) for r in rows] == [
        ('mmvim', 'inference', '32x32'),
        ('mmvim', 'training', '32x32'),
    ]
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
        (('--runs', 'graph'), '--runs graph needs a CUDA device, got --device cpu'),
    ],
)
def test_bad_options(option, message):
    done = run_script('benchmark/models.py', '--device', 'cpu', *option)
    assert done.returncode == 2
    assert message in done.stderr
