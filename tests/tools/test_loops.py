"""Runs that go on within an epoch."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mmvim.cli.launcher import main_train
from mmvim.engine.loops import EpochBasedTrainLoop, IterBasedTrainLoop


def resume(*options: str):
    runner = main_train(
        ['config.py', '--no-validate', '--resume', 'work_dirs/config/iter_7.pth', '--work-dir',
         'resumed', '--cfg-options', *options]
    )  # fmt: skip
    return runner, '\n'.join(path.read_text() for path in Path('resumed').glob('*/*.log'))


def test_an_epoch_of_another_length_starts_over(toy):
    options = ('default_hooks.checkpoint.by_epoch=False', 'default_hooks.checkpoint.interval=7')
    main_train(['config.py', '--no-validate', '--cfg-options', *options])
    runner, log = resume(*options)
    assert 'Epoch 2 continues after 3 of 4 batches' in log
    assert (runner.epoch, runner.iter) == (2, 8)
    runner, log = resume(*options, 'train_dataloader.batch_size=2')
    assert '3 batches into an epoch of 4, and an epoch has 8 batches now: epoch 2' in log
    assert (runner.epoch, runner.iter) == (2, 15)


@pytest.mark.parametrize(('loop', 'at', 'end'), [
    (IterBasedTrainLoop, '_iter', '_max_iters'), (EpochBasedTrainLoop, '_epoch', '_max_epochs'),
])  # fmt: skip
def test_validation_is_due_at_the_end_too(loop, at, end):
    due = [
        n for n in range(1, 8)
        if loop._validation_is_due(SimpleNamespace(val_begin=3, val_interval=2, **{at: n, end: 7}))
    ]  # fmt: skip
    assert due == [4, 6, 7]
