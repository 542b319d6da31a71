"""Short runs of a MESA classifier on random images, also as a program for several processes."""

import sys
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import all_gather, get_rank
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmvim.cli import distributed

ARCH = dict(
    depths=(1, 1, 2, 1), embed_dims=4, stem_dims=4, num_heads=(2, 4), window_sizes=(2, 1),
    d_state=2, drop_path_rate=0.3,
)  # fmt: skip


class RandomImages(Dataset):
    """Eight images of three classes."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        from mmpretrain.structures import DataSample

        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8)
        return dict(inputs=image, data_samples=DataSample().set_gt_label(index % 3))


def model_config(kind: str = 'mmvim.MesaClassifier', **kwargs: Any) -> dict:
    """A small classifier."""
    return dict(
        type=kind,
        data_preprocessor=dict(num_classes=3, mean=[127.5] * 3, std=[127.5] * 3),
        backbone=dict(type='mmvim.MambaVision', arch=ARCH),
        head=dict(
            type='LinearClsHead',
            num_classes=3,
            in_channels=32,
            loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        ),
        **kwargs,
    )


def make_runner(work_dir: Path, **changes: Any) -> Runner:
    """A runner of four epochs of two iterations; MESA's start is in the middle."""
    model = changes.pop('model', model_config(mesa_weight=25.0))
    start = changes.pop('start', 0.5)
    options = dict(
        model=model,
        work_dir=str(work_dir),
        default_scope='mmpretrain',
        train_dataloader=dict(
            batch_size=4,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=RandomImages(),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=4),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[
            dict(type='EMAHook', momentum=0.5, update_buffers=True),
            dict(type='mmvim.MesaHook', start=start),
        ],
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=1),
        ),
        randomness=dict(seed=0),
        log_level='ERROR',
        experiment_name=str(work_dir).replace('/', '_'),
        visualizer=dict(type='Visualizer', vis_backends=[], name=str(work_dir)),
    )
    return Runner(**{**options, **changes})


def mesa_losses(runner: Runner) -> list[float]:
    """The distillation losses that were logged."""
    scalars = runner.message_hub.log_scalars
    if 'train/loss_mesa' not in scalars:
        return []
    return [float(value) for value in scalars['train/loss_mesa'].data[0]]


def main(work_dir: str) -> None:
    """Train in each of several processes and compare them."""
    cfg = Config(dict(model=model_config(mesa_weight=25.0)))
    distributed.prepare(cfg, 'pytorch', [])
    runner = make_runner(
        Path(work_dir),
        launcher='pytorch',
        env_cfg=cfg.env_cfg,
        cfg=cfg,
        custom_hooks=[
            dict(type='EMAHook', momentum=0.5, update_buffers=True),
            dict(type='mmvim.MesaHook', start=0.5),
            dict(type='SyncBuffersHook'),
        ],
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=RandomImages(),
            collate_fn=dict(type='default_collate'),
        ),
    )
    assert type(runner.model).__name__ == 'MMDistributedDataParallel'
    runner.train()
    assert len(mesa_losses(runner)) == 2, mesa_losses(runner)
    weights = torch.cat([p.detach().flatten() for p in runner.model.parameters()])
    buffers = torch.cat([b.flatten().float() for b in runner.model.buffers()])
    for values in (weights, buffers):
        first, second = all_gather(values)
        assert torch.equal(first, second)
    sys.stdout.write(f'rank {get_rank()} agrees\n')


if __name__ == '__main__':
    main(sys.argv[1])
