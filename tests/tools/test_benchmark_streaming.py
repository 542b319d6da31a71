"""The benchmark of streams, on the CPU and in miniature."""

import csv
import math
from unittest import mock

import pytest
from script_runner import run_script

from mmvim.models import StreamingVideoMamba

SMALL = ('--device', 'cpu', '--size', 16, '--chunks', 3, '--dtype', 'float32')


def test_rows_hold_what_was_measured(tmp_path):
    table = tmp_path / 'sub' / 'streams.csv'
    done = run_script('benchmark/streaming.py', *SMALL, '--modes', 'causal', '--csv', table)
    assert done.returncode == 0, done.stdout
    head, *lines = table.read_text().splitlines()
    assert 'torch' in head
    (row,) = csv.DictReader(lines)
    assert (row['mode'], row['run'], row['size']) == ('causal', 'eager', '16')
    assert 0 < float(row['median_ms']) <= float(row['p99_ms']) * (1 + 1e-9)
    assert math.isclose(float(row['median_ms']) * float(row['frames_per_second']), 1e3)


def test_a_stopped_run_leaves_its_rows(tmp_path):
    table = tmp_path / 'streams.csv'
    model = StreamingVideoMamba('tiny', img_size=16, beyond='clamp')
    build = mock.Mock(side_effect=[model, KeyboardInterrupt])
    with mock.patch('mmvim.models.StreamingVideoMamba', build), pytest.raises(KeyboardInterrupt):
        run_script('benchmark/streaming.py', *SMALL, '--modes', 'causal', 'block', '--csv', table)
    _, *lines = table.read_text().splitlines()
    (row,) = csv.DictReader(lines)
    assert row['mode'] == 'causal'


def test_a_graph_needs_a_gpu():
    done = run_script('benchmark/streaming.py', *SMALL, '--runs', 'graph')
    assert done.returncode == 2
    assert '--runs graph needs a CUDA device, got --device cpu' in done.stderr
