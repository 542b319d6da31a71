"""Checkpoints as official projects write them, loaded by a run with an averaged model."""

import argparse

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmvim.checkpoints.loading import checked_loading
from mmvim.errors import CheckpointError


class Zeros(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {'inputs': torch.zeros(3)}


class Linear(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, inputs, mode='tensor'):
        return list(self.linear(inputs))


class Mean(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.extend(float(x) for x in data_samples)

    def compute_metrics(self, results):
        return {'value': sum(results) / len(results)}


def run(tmp_path, name, checkpoint):
    path = tmp_path / f'{name}.pth'
    torch.save(checkpoint, path)
    runner = Runner(
        model=Linear(),
        work_dir=str(tmp_path / 'work'),
        test_dataloader=dict(
            batch_size=1,
            num_workers=0,
            dataset=Zeros(),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        test_cfg=dict(),
        test_evaluator=Mean(),
        custom_hooks=[dict(type='EMAHook')],
        load_from=str(path),
        experiment_name=f'loading_{name}',
    )
    with checked_loading(runner, complete=True):
        return runner.test()['value']


WEIGHTS = {'linear.weight': torch.ones(1, 3), 'linear.bias': torch.full((1,), 0.75)}


@pytest.mark.parametrize(
    ('name', 'checkpoint'),
    [
        ('ours', {'state_dict': WEIGHTS}),
        ('model', {'model': WEIGHTS, 'epoch': 3, 'args': argparse.Namespace(lr=1.0)}),
        ('bare', WEIGHTS),
    ],
)
def test_averaged_model_reads_official_files(tmp_path, name, checkpoint):
    assert run(tmp_path, name, checkpoint) == 0.75


def test_incomplete_official_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r'linear\.bias'):
        run(tmp_path, 'incomplete', {'model': {'linear.weight': torch.ones(1, 3)}})
