"""Existing checkpoints, and the random state of each process."""

import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.fileio import LocalBackend

from mmvim.cli.launcher import main_train
from mmvim.engine import CheckpointHook, random_state
from mmvim.engine.hooks import checkpoint

WORK_DIR = Path('work_dirs/config')


def saved() -> set[str]:
    return {path.name for path in WORK_DIR.glob('*.pth')}


def test_regular_checkpoints_begin_at_save_begin(toy):
    options = (
        'default_hooks.checkpoint.by_epoch=False', 'default_hooks.checkpoint.interval=3',
        'default_hooks.checkpoint.save_begin=4', 'default_hooks.checkpoint.save_last=False',
        'train_cfg.max_epochs=3',
    )  # fmt: skip
    runner = main_train(['config.py', '--no-validate', '--cfg-options', *options])
    assert saved() == {'iter_4.pth', 'iter_7.pth', 'iter_10.pth'}
    hook = next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
    assert [step for step in range(13) if hook._is_regular(step)] == [4, 7, 10]
    # Between two of them the run is interrupted: that one is removed after the next, these stay.
    assert Path(hook.save_now(runner, 3)).name == 'iter_3.pth'
    assert Path(hook.save_now(runner, 7)).name == 'iter_7.pth'
    assert saved() == {'iter_4.pth', 'iter_7.pth', 'iter_10.pth'}


def test_what_an_interrupted_save_left_is_removed(toy):
    """The run was killed between the writing of a checkpoint and the removal of the former one."""
    keep = ['--cfg-options', 'default_hooks.checkpoint.max_keep_ckpts=1']
    main_train(['config.py', '--no-validate', *keep])
    assert saved() == {'epoch_2.pth'}
    content = torch.load(WORK_DIR / 'epoch_2.pth', weights_only=False)
    assert content['mmvim_superseded'] == ['epoch_1.pth']
    shutil.copy(WORK_DIR / 'epoch_2.pth', WORK_DIR / 'epoch_1.pth')
    shutil.copy(WORK_DIR / 'epoch_2.pth', WORK_DIR / 'epoch_7.pth')
    (WORK_DIR / 'last_checkpoint').write_text(str(WORK_DIR / 'epoch_1.pth'))
    main_train(['config.py', '--no-validate', '--resume', str(WORK_DIR / 'epoch_2.pth'), *keep])
    assert saved() == {'epoch_2.pth', 'epoch_7.pth'}
    assert Path((WORK_DIR / 'last_checkpoint').read_text()).name == 'epoch_2.pth'


def test_a_copy_of_a_run_leaves_the_original_alone(toy, monkeypatch):
    import toy as task

    values = iter(range(10))
    monkeypatch.setattr(
        task.ToyMetric, 'compute_metrics', lambda *args: {'accuracy': float(next(values))}
    )
    best = ['--cfg-options', 'default_hooks.checkpoint.save_best=accuracy']
    main_train(['config.py', *best, 'train_cfg.max_epochs=1'])
    shutil.copytree(WORK_DIR, 'copy')
    main_train(['config.py', '--work-dir', 'copy', '--resume', *best, 'train_cfg.max_epochs=2'])
    assert [path.name for path in WORK_DIR.glob('best_*')] == ['best_accuracy_epoch_1.pth']
    assert [path.name for path in Path('copy').glob('best_*')] == ['best_accuracy_epoch_2.pth']


def test_what_has_just_been_written_stays(tmp_path):
    """After resuming, a best checkpoint may get the name of the one that it replaces."""
    last, best, old = (str(tmp_path / f'{name}.pth') for name in ('iter_4', 'best', 'old'))
    hook = CheckpointHook()
    hook.file_backend, hook.last_ckpt, hook.best_ckpt_path = LocalBackend(), last, best
    for path in (last, best, old):
        Path(path).touch()
    with hook._removing_afterwards():
        for path in (last, best, old):
            hook.file_backend.remove(path)
        assert len(list(tmp_path.iterdir())) == 3
    assert sorted(map(str, tmp_path.iterdir())) == [best, last]


@pytest.mark.parametrize('rank', [0, 1])
def test_each_process_gets_its_own_random_state(rank, monkeypatch, tmp_path):
    states = []
    for seed in range(2):
        random_state.seed_all(seed)
        states.append(random_state.capture())
    runner = SimpleNamespace(
        _resume=True,
        iter=1,
        rank=rank,
        world_size=2,
        _load_from='',
        work_dir=str(tmp_path),
        param_schedulers=None,
    )
    monkeypatch.setattr(checkpoint.MMEngineCheckpointHook, 'before_train', lambda *args: None)
    hook = CheckpointHook()
    hook.out_dir = str(tmp_path)
    hook.after_load_checkpoint(runner, {checkpoint.RANDOM_STATES: states})
    random_state.seed_all(7)
    hook.before_train(runner)
    drawn = random.random(), torch.rand(())
    random_state.seed_all(rank)
    assert drawn == (random.random(), torch.rand(()))
