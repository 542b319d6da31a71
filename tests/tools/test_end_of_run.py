"""The end of a run: at once, silent, with its own exit code."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ports import free_port

CLOCK = """
import glob, json, os, time, atexit
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

def threads():
    names = [open(path).read().strip() for path in glob.glob('/proc/self/task/*/comm')]
    with open(f'ended_{os.environ.get("RANK", 0)}', 'w') as file:
        json.dump({'time': ENDED[0], 'threads': names}, file)

ENDED = [None]
# What is registered first runs last.
atexit.register(threads)

@HOOKS.register_module()
class Clock(Hook):
    priority = 'LOWEST'

    def __init__(self, fail=None):
        self.fail = fail

    def after_train_iter(self, runner, *args, **kwargs):
        if self.fail == 'train':
            ENDED[0] = time.time()
            raise ValueError('made to fail')

    def after_val_iter(self, runner, *args, **kwargs):
        if self.fail == 'val':
            ENDED[0] = time.time()
            raise ValueError('made to fail')

    def after_run(self, runner):
        ENDED[0] = time.time()
"""


def write(toy: Path, fail: str | None, persistent: bool, workers: int = 2) -> None:
    (toy / 'clock.py').write_text(CLOCK)
    (toy / 'ending.py').write_text(
        "_base_ = 'config.py'\n"
        "custom_imports = dict(imports=['clock', 'toy'], allow_failed_imports=False)\n"
        f"custom_hooks = [dict(type='Clock', fail={fail!r})]\n"
        f'train_dataloader = dict(num_workers={workers}, persistent_workers={persistent})\n'
        f'val_dataloader = dict(num_workers={workers}, persistent_workers={persistent})\n'
    )


@pytest.mark.parametrize(
    ('fail', 'persistent'), [(None, True), ('train', True), ('val', False)],
    ids=['success', 'error in training', 'error in validation'],
)  # fmt: skip
def test_workers_end_with_their_parent(toy, run_script, fail, persistent):
    """They outlive a SIGTERM to the whole job, which is not the one that their parent sends."""
    write(toy, fail, persistent)
    done = run_script('train.py', 'ending.py', cwd=toy, PYTHONPATH=f'{toy}:{Path(__file__).parent}')
    late = time.time() - json.loads((toy / 'ended_0').read_text())['time']
    # Workers that wait for more than their parent would wait for 25 seconds.
    assert late < 20, f'{late:.1f} s'
    assert 'DataLoader worker' not in done.stderr
    if fail is None:
        assert done.returncode == 0, done.stderr[-3000:]
        assert 'Traceback' not in done.stderr
        assert (toy / 'work_dirs/ending/epoch_2.pth').exists()
    else:
        assert done.returncode == 1
        assert done.stderr.count('Traceback') == 1
        assert 'ValueError: made to fail' in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason='the CPU path')
def test_threads_of_gloo_end_before_the_interpreter(toy):
    """One that drops its last tensor in an interpreter that is ending aborts the process."""
    write(toy, None, persistent=False, workers=0)
    script = Path(__file__).parents[2] / 'tools/train.py'
    paths = (str(toy), str(Path(__file__).parent), os.environ.get('PYTHONPATH', ''))
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join(paths),
        'OMP_NUM_THREADS': '1',
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': str(free_port()),
        'WORLD_SIZE': '2',
    }
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), 'ending.py', '--launcher', 'pytorch'],
            cwd=toy,
            env={**environment, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, run in enumerate(runs):
        error = run.communicate(timeout=300)[1]
        assert run.returncode == 0, error[-3000:]
        names = json.loads((toy / f'ended_{rank}').read_text())['threads']
        assert not [name for name in names if 'gloo' in name], names
