"""The benchmark of exported files, in miniature."""

import csv

import pytest
from script_runner import run_script

pytest.importorskip('onnxscript')
pytest.importorskip('onnxruntime')


@pytest.mark.slow
def test_rows_hold_what_was_measured(tmp_path):
    table = tmp_path / 'exported.csv'
    arguments = ('--runtimes', 'ONNX Runtime', '--images', 2, '--repeats', 2, '--csv', table)
    for _ in range(2):
        done = run_script(
            'benchmark/exported.py', 'configs/quickstart/vim_digits_cls.py', *arguments
        )
        assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row['runtime'], row['images']) for row in rows] == [('ONNX Runtime', '2')] * 2
    assert float(rows[0]['median_ms']) > 0
    assert float(rows[0]['ratio']) > 0
