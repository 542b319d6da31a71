"""``Runner`` resumes from a checkpoint that it wrote, with history, schedules and best score."""

import shutil

import numpy as np
import pytest
import torch

from mmvim import compat

pytest.importorskip('mmengine')

from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner, load_checkpoint


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, inputs, mode='tensor'):
        out = self.linear(inputs)
        return {'loss': out.square().mean()} if mode == 'loss' else [out.detach()]


class Score(BaseMetric):
    default_prefix = 'toy'

    def process(self, data_batch, data_samples):
        self.results.append(1.0)

    def compute_metrics(self, results):
        # As real metrics return it: a NumPy number, which ends up in the checkpoint.
        return {'score': np.float32(np.mean(results))}


def build(work_dir, epochs, name, **kwargs):
    loader = {
        'dataset': [{'inputs': torch.tensor([i / 8, i / 16])} for i in range(8)],
        'batch_size': 2,
        'num_workers': 0,
        'sampler': {'type': 'DefaultSampler', 'shuffle': True},
        'collate_fn': {'type': 'default_collate'},
    }
    torch.manual_seed(0)
    return Runner(
        Model(),
        str(work_dir),
        train_dataloader=loader,
        val_dataloader={**loader, 'sampler': {'type': 'DefaultSampler', 'shuffle': False}},
        val_evaluator=[Score()],
        train_cfg={'by_epoch': True, 'max_epochs': epochs, 'val_interval': 1},
        val_cfg={},
        optim_wrapper={'type': 'OptimWrapper', 'optimizer': {'type': 'AdamW', 'lr': 0.1}},
        param_scheduler=[
            {'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'end': 4},
            {'type': 'MultiStepLR', 'milestones': [1, 2], 'by_epoch': True},
        ],
        default_hooks={
            'logger': {'type': 'LoggerHook', 'interval': 1},
            'checkpoint': {
                'type': 'CheckpointHook',
                'interval': 1,
                'save_best': 'toy/score',
                'rule': 'greater',
            },
        },
        custom_hooks=[{'type': 'EMAHook'}],
        randomness={'seed': 0},
        experiment_name=name,
        default_scope='mmengine',
        log_level='ERROR',
        **kwargs,
    )


@pytest.fixture
def never_unsafe(monkeypatch):
    original = torch.load

    def load(*args, weights_only=None, **kwargs):
        assert weights_only is not False
        return original(*args, weights_only=weights_only, **kwargs)

    monkeypatch.setattr(torch, 'load', load)


def history(runner):
    return list(runner.message_hub.get_scalar('train/loss')._log_history)


def test_resume(tmp_path, never_unsafe):
    compat.install()
    whole = build(tmp_path / 'whole', 3, 'whole')
    whole.train()
    parts = tmp_path / 'parts'
    parts.mkdir()
    shutil.copy(tmp_path / 'whole' / 'epoch_1.pth', parts)
    (parts / 'last_checkpoint').write_text(str(parts / 'epoch_1.pth'))
    resumed = build(parts, 3, 'resumed', resume=True)
    resumed.train()
    assert resumed.epoch == 3
    assert resumed.iter == 12
    assert resumed.message_hub.get_info('best_score') == 1.0
    # The losses before the interruption came out of the checkpoint, those after it repeat the run.
    assert len(history(resumed)) == 12
    np.testing.assert_allclose(history(resumed), history(whole), rtol=1e-6)
    assert torch.equal(resumed.model.linear.weight, whole.model.linear.weight)
    assert resumed.optim_wrapper.get_lr() == whole.optim_wrapper.get_lr()


def test_load_the_best_checkpoint(tmp_path, never_unsafe):
    """Its history holds the score as the metric returned it, a NumPy number."""
    compat.install()
    build(tmp_path, 2, 'trained').train()
    (best,) = tmp_path.glob('best_toy_score_epoch_*.pth')
    model = Model()
    checkpoint = load_checkpoint(model, str(best), strict=True)
    assert torch.equal(model.linear.weight, checkpoint['state_dict']['linear.weight'])
    assert checkpoint['message_hub']['runtime_info']['best_score'] == 1.0
