"""The shell scripts: torchrun with two CPU processes, and Slurm's command lines."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from ports import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason='the CPU path')
def test_two_processes_train_and_test(toy, run_script):
    (toy / 'dist.py').write_text(
        "_base_ = 'config.py'\n"
        "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2, val_interval=2)\n"
        'default_hooks = dict(checkpoint=dict(by_epoch=False, interval=2))\n'
        "env_cfg = dict(dist_cfg=dict(backend='nccl'))\n"
        "norm_cfg = dict(type='SyncBN')\n"
        'randomness = dict(seed=0, diff_rank_seed=True)\n'
    )
    done = run_script('dist_train.sh', 'dist.py', '2', '--auto-scale-lr', cwd=toy, PORT=free_port())
    assert done.returncode == 0, done.stderr[-3000:]
    log = next((toy / 'work_dirs' / 'dist').glob('*/*.log')).read_text()
    assert 'the distributed backend is gloo instead of nccl' in log
    assert 'the current batch size is 8' in log
    assert 'Epoch(val) [0][2/2]    accuracy' in log
    checkpoint = toy / 'work_dirs' / 'dist' / 'iter_2.pth'
    saved = torch.load(checkpoint, weights_only=False)
    assert saved['meta']['iter'] == 2
    first, second = (state['torch'] for state in saved['mmvim_random_states'])
    assert not torch.equal(first, second)

    arguments = ('--out', 'metrics.json', '--out-item', 'metrics')
    done = run_script(
        'dist_test.sh', 'dist.py', str(checkpoint), '2', *arguments, cwd=toy, PORT=free_port()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((toy / 'metrics.json').read_text())
    assert 0 <= metrics['accuracy'] <= 1


@pytest.fixture
def srun(tmp_path):
    """A directory with an ``srun`` that prints its arguments, one a line."""
    directory = tmp_path / 'bin'
    directory.mkdir()
    script = directory / 'srun'
    script.write_text('#!/bin/sh\nfor argument in "$@"; do printf "%s\\n" "$argument"; done\n')
    script.chmod(0o755)
    return directory


def slurm_lines(run_script, srun, script, *args, **env) -> list[str]:
    done = run_script(
        script, *args, cwd=srun, **{'PATH': f'{srun}:/usr/bin:/bin', 'PYTHON': '', **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_slurm_train(run_script, srun):
    lines = slurm_lines(
        run_script, srun, 'slurm_train.sh', 'gpu', 'a job', 'c.py', 'out dir', '--amp',
        '--cfg-options', 'a=b c', GPUS='16', CPUS_PER_TASK='3', SRUN_ARGS='--qos=high --mem=1G',
    )  # fmt: skip
    assert lines[:10] == [
        '-p', 'gpu', '--job-name=a job', '--gres=gpu:8', '--ntasks=16', '--ntasks-per-node=8',
        '--cpus-per-task=3', '--kill-on-bad-exit=1', '--qos=high', '--mem=1G',
    ]  # fmt: skip
    assert lines[10:12] == ['python', '-u']
    assert lines[12].endswith('tools/train.py')
    assert lines[12].startswith('/')
    assert lines[13:] == [
        'c.py', '--work-dir=out dir', '--launcher=slurm', '--amp', '--cfg-options', 'a=b c',
    ]  # fmt: skip


def test_slurm_test(run_script, srun):
    lines = slurm_lines(
        run_script, srun, 'slurm_test.sh', 'gpu', 'job', 'c.py', 'w.pth', '--tta',
        GPUS='2', PYTHON='/opt/python',
    )  # fmt: skip
    assert '--gres=gpu:2' in lines
    assert '--ntasks=2' in lines
    assert '--ntasks-per-node=2' in lines
    assert lines[lines.index('/opt/python') + 1] == '-u'
    assert lines[-4:] == ['c.py', 'w.pth', '--launcher=slurm', '--tta']
    assert lines[-5].endswith('tools/test.py')


@pytest.mark.parametrize(('code', 'requeued'), [(0, False), (1, False), (137, False), (143, True)])
def test_the_guide_s_batch_script(tmp_path, code, requeued):
    """It goes back into the queue after SIGTERM alone, and keeps srun's exit code."""
    guide = (ROOT / 'docs' / 'user_guides' / 'distributed.md').read_text()
    (tmp_path / 'job.sh').write_text(re.search(r'```sh\n(#!/bin/bash\n.*?)```', guide, re.S)[1])
    for name, line in (('srun', f'exit {code}'), ('scontrol', ':')):
        file = tmp_path / name
        file.write_text(f'#!/bin/sh\necho {name} "$@" >> calls\n{line}\n')
        file.chmod(0o755)
    env = {
        'PATH': f'{tmp_path}:/usr/bin:/bin',
        'SLURM_CPUS_PER_TASK': '10',
        'SLURM_JOB_ID': '4711',
    }
    done = subprocess.run(['bash', 'job.sh'], cwd=tmp_path, env=env, check=False)
    assert done.returncode == code
    srun, *others = (tmp_path / 'calls').read_text().splitlines()
    assert '--cpus-per-task=10 --kill-on-bad-exit=1' in srun
    assert srun.endswith('tools/train.py CONFIG --launcher slurm --resume')
    assert others == ['scontrol requeue 4711'] * requeued


@pytest.mark.parametrize(
    ('script', 'args'),
    [
        ('dist_train.sh', ['config.py']),
        ('dist_train.sh', ['config.py', 'two']),
        ('dist_test.sh', ['config.py', 'w.pth']),
        ('dist_test.sh', ['config.py', 'w.pth', '--tta']),
        ('slurm_train.sh', ['part', 'job', 'config.py']),
        ('slurm_test.sh', []),
    ],
)
def test_usage(run_script, tmp_path, script, args):
    done = run_script(script, *args, cwd=tmp_path)
    assert done.returncode == 2
    assert f'usage: tools/{script}' in done.stderr
