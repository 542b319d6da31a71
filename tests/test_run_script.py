"""The task libraries' own scripts, through ``python -m mmvim.run``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tests' / 'tools'))
import task_configs  # noqa: E402


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, '-m', 'mmvim.run', *arguments],
        cwd=cwd,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_own_scripts_train_and_test(scope, tmp_path):
    pytest.importorskip(scope)
    task_configs.write(tmp_path, scope)
    text = (tmp_path / 'config.py').read_text().replace("'SyncBN'", "'BN'")
    # mmpretrain's script makes workers persist, which torch refuses without any.
    text = text.replace('num_workers=0', f'num_workers={int(scope == "mmpretrain")}')
    base = f"_base_ = '{scope}::_base_/default_runtime.py'\n"
    (tmp_path / 'config.py').write_text(base + text)
    trained = run(f'{scope}::train.py', 'config.py', cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr[-3000:]
    checkpoint = 'work_dirs/config/iter_1.pth'
    tested = run(f'{scope}::test.py', 'config.py', checkpoint, cwd=tmp_path)
    assert tested.returncode == 0, tested.stderr[-3000:]
    assert {'mmpretrain': 'accuracy/top1', 'mmdet': 'bbox_mAP', 'mmseg': 'mIoU'}[scope] in (
        tested.stdout + tested.stderr
    )


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'usage: python -m mmvim.run SCRIPT'),
        (['nolib::train.py'], 'nolib is not installed'),
        (['gone.py'], "there is no script 'gone.py'"),
        (['mmseg::dist_train.sh'], 'torchrun --nproc_per_node 8 -m mmvim.run mmseg::train.py'),
    ],
)
def test_bad_scripts(arguments, message, tmp_path):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode
    assert message in result.stderr
    assert 'Traceback' not in result.stderr
