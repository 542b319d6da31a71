"""The checkpoint that a run continues from, without a run."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmvim.cli import resuming
from mmvim.errors import UserError


def save(path, model, iteration, seed):
    meta = {'epoch': 0, 'iter': iteration, 'seed': seed}
    state = {'state_dict': model.state_dict(), 'optimizer': {}, 'message_hub': {}, 'meta': meta}
    torch.save(state, path)
    return str(path)


@pytest.fixture
def runner(tmp_path):
    seeds, warnings = [], []
    newest = save(tmp_path / 'iter_3.pth', nn.Linear(5, 1), 3, 3)
    return SimpleNamespace(
        _load_from=newest, _resume=True, model=nn.Linear(2, 1), work_dir=str(tmp_path),
        _randomness_cfg={'seed': 3, 'deterministic': True}, seeds=seeds, warnings=warnings,
        logger=SimpleNamespace(warning=warnings.append),
        set_randomness=lambda **options: seeds.append(options),
    )  # fmt: skip


def test_an_older_checkpoint_brings_its_seed(runner, tmp_path):
    older = save(tmp_path / 'iter_2.pth', nn.Linear(2, 1), 2, 7)
    resuming.leave_out_foreign(runner, [older])
    assert runner._load_from == older
    assert runner.seeds == [{'seed': 7, 'deterministic': True}]
    (warning,) = runner.warnings
    assert 'weight has shape (1, 5) in it, not (1, 2)' in warning


def test_all_checkpoints_are_of_another_model(runner, tmp_path):
    older = save(tmp_path / 'iter_2.pth', nn.Linear(3, 1), 2, 7)
    with pytest.raises(UserError, match=r'no checkpoint in .* is of this model'):
        resuming.leave_out_foreign(runner, [older])
    assert not runner.seeds
