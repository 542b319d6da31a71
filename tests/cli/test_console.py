"""One screen on the terminal, everything in the log file."""

import contextlib
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest

from mmvim.cli import console

sys.path.insert(0, str(Path(__file__).parents[1] / 'tools'))
import task_configs

ROOT = Path(__file__).parents[2]
SCREEN = 24
#: Said by the libraries about themselves, in every run.
NOISE = (
    'OneDL',
    'faster_coco_eval',
    'FileClient',
    'HardDiskBackend',
    'prefix is not set',
    'pin',
    'Failed to search registry',
)


def run(script: str, *args: object, cwd: Path, **options):
    done = forks.run_script(ROOT / 'tools' / script, *args, cwd=cwd, **options)
    assert done.returncode == 0, done.stderr
    return done


def log_of(work_dir: Path) -> str:
    (log,) = work_dir.glob('*/*.log')
    return log.read_text()


@pytest.mark.parametrize('scope', task_configs.TASKS)
def test_one_screen(scope, tmp_path):
    task_configs.write(tmp_path, scope)
    config, work = tmp_path / 'config.py', tmp_path / 'work'
    options = ('train_dataloader.pin_memory=True', 'val_dataloader.pin_memory=True')
    if scope == 'mmpretrain':
        options += ('train_dataloader.collate_fn.type=default_collate',)
    done = run('train.py', config, '--work-dir', work, '--cfg-options', *options, cwd=tmp_path)
    lines = (done.stdout + done.stderr).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('  config'))
    assert start < SCREEN
    for word in NOISE:
        assert word not in done.stdout + done.stderr
    head = '\n'.join(lines[: start + 1])
    for text in (
        '4 samples, 2 classes',
        'Vim, 0.0',
        'device      cpu',
        'operators   ',
        'precision   float32',
        '0 workers',
        'start       random weights',
        str(next(work.glob('*/*.log'))),
        str(work / 'config.py'),
    ):
        assert text in head
    assert (work / 'config.py').is_file()
    log = log_of(work)
    for text in ('System environment', 'Config:', 'optim_wrapper = ', 'Hooks will be executed'):
        assert text in log
        assert text not in done.stdout
    assert 'Epoch(val) [0][4/4]' in done.stdout or scope == 'mmpretrain'
    if scope != 'mmseg':
        return
    tested = run(
        'test.py', config, work / 'iter_1.pth', '--work-dir', tmp_path / 'test', cwd=tmp_path
    )
    assert len(tested.stdout.splitlines()) < SCREEN
    assert 'mIoU' in tested.stdout.splitlines()[-1]
    assert 'Config:' in log_of(tmp_path / 'test')
    verbose = run(
        'train.py', config, '--work-dir', tmp_path / 'v', '--verbose', cwd=tmp_path
    ).stdout
    assert 'Config:' in verbose
    assert 'Hooks will be executed' in verbose


def test_what_is_known_about_a_run(tmp_path):
    task_configs.write(tmp_path, 'mmpretrain')
    config, work = tmp_path / 'config.py', tmp_path / 'work'
    run('train.py', config, '--work-dir', work, cwd=tmp_path)
    options = ('--amp', '--resume', '--cfg-options', 'train_cfg.max_iters=2')
    again = run('train.py', config, '--work-dir', work, *options, cwd=tmp_path).stdout
    assert 'start       resumed at epoch 0, iteration 1' in again
    assert 'precision   mixed, bfloat16' in again
    assert 'There is no GPU: mixed precision is bfloat16' in again
    frozen = ('--cfg-options', f'load_from={work / "iter_1.pth"}', 'model.backbone.frozen_stages=0')
    env = {**os.environ, 'MMVIM_BACKEND': 'torch'}
    tuned = run(
        'train.py', config, '--work-dir', tmp_path / 'w2', *frozen, cwd=tmp_path, env=env
    ).stdout
    assert f'weights of {work / "iter_1.pth"}' in tuned
    assert 'M of them trained' in tuned
    assert 'operators   PyTorch' in tuned


def test_data_without_a_length():
    loader = SimpleNamespace(dataset=object(), batch_size=2, num_workers=0)
    assert console._data(loader) == 'object, batches of 2, 0 workers'


@pytest.mark.skipif(sys.platform == 'win32', reason='needs a pseudo-terminal')
def test_bars_on_a_terminal(tmp_path):
    import pty

    task_configs.write(tmp_path, 'mmpretrain')
    main, terminal = pty.openpty()
    arguments = (tmp_path / 'config.py', '--work-dir', tmp_path)
    env = {**os.environ, 'TERM': 'xterm', 'COLUMNS': '100'}
    shown = b''

    def read():
        nonlocal shown
        with contextlib.suppress(OSError):  # the end of a terminal
            while part := os.read(main, 4096):
                shown += part

    reader = threading.Thread(target=read)
    reader.start()
    run('train.py', *arguments, cwd=tmp_path, env=env, terminal=os.ttyname(terminal))
    os.close(terminal)
    reader.join()
    os.close(main)
    shown = shown.decode()
    assert 'training' in shown.partition('  config')[2]
    assert '━' in shown
    assert 'accuracy/top1' in shown
    assert 'Config:' not in shown
