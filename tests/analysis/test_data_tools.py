"""Pictures of batches, and confusion matrices."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from script_runner import run_script

from mmvim.analysis.batches import browse
from mmvim.apis import build_model

sys.path.insert(0, str(Path(__file__).parents[1] / 'tools'))
import task_configs


@pytest.fixture(params=task_configs.TASKS)
def task(request, tmp_path):
    root = task_configs.write(tmp_path, request.param)
    for i in range(4):  # a colour for each, to see the order of channels
        colour = np.array([200, 20 + 40 * i, 60], np.uint8)
        Image.fromarray(np.tile(colour, (32, 32, 1))).save(root / f'images/{i}.png')
    return request.param, Config.fromfile(tmp_path / 'config.py')


def test_samples(task):
    scope, cfg = task
    normalise = dict(mean=[120.0, 110.0, 100.0], std=[50.0, 60.0, 70.0])
    swap = {'to_rgb': True} if scope == 'mmpretrain' else {'bgr_to_rgb': True}
    cfg.model.data_preprocessor.update(**normalise, **swap)
    samples = list(browse(cfg))
    assert len(samples) == (8 if scope == 'mmdet' else 4)
    for i, sample in enumerate(samples[:4]):
        assert sample.picture.dtype == np.uint8
        np.testing.assert_allclose(sample.picture[5, 5], [200, 20 + 40 * i, 60], atol=1)
        if scope == 'mmpretrain':
            assert sample.title == 'ab'[i % 2]
        elif scope == 'mmdet':
            assert sample.boxes.tolist() == [[8, 8, 24, 24]]
            assert list(sample.names) == ['ab'[i % 2]]
        else:
            assert sample.labels.shape == (32, 32)
            assert sample.labels[16, 16] == i % 2


def test_mixed_samples(tmp_path):
    task_configs.write(tmp_path, 'mmpretrain')
    cfg = Config.fromfile(tmp_path / 'config.py')
    cfg.model.data_preprocessor.num_classes = 2
    cfg.model.train_cfg = dict(augments=dict(type='Mixup', alpha=5.0))
    mixed = [sample.title for sample in browse(cfg, seed=1)]
    assert any('%' in title and ', ' in title for title in mixed)
    # Without mixing each sample is of one class.
    assert {sample.title for sample in browse(cfg, 'val')} == {'a 100%', 'b 100%'}


def test_browser(task, tmp_path):
    config, out = tmp_path / 'config.py', tmp_path / 'batch.png'
    result = run_script('analysis/browse_batches.py', config, '--out', out, '--count', 3)
    assert result.returncode == 0, result.stderr
    assert '3 samples' in result.stdout
    assert np.asarray(Image.open(out)).std() > 5
    again = run_script('analysis/browse_batches.py', config, '--out', out)
    assert again.returncode == 2
    assert '--overwrite replaces it' in again.stderr
    other = tmp_path / 'other.png'
    options = ('--out', other, '--cfg-options', 'train_dataloader=None')
    assert (
        'no train_dataloader' in run_script('analysis/browse_batches.py', config, *options).stderr
    )
    assert not other.exists()


def test_browser_of_videos(tmp_path):
    from mmvim.apis.videos import VideoWriter

    pytest.importorskip('av')
    for i in range(2):
        with VideoWriter(tmp_path / f'{i}.mp4', 10) as video:
            for _ in range(9):
                video.write(np.full((32, 32, 3), (200, 100 * i, 40), np.uint8))
    (tmp_path / 'list.txt').write_text('0.mp4 0\n1.mp4 1')
    task_configs.write(tmp_path, 'mmpretrain')
    cfg = Config.fromfile(tmp_path / 'config.py')
    backbone = dict(type='mmvim.VideoMamba', arch=dict(embed_dims=8, depth=1), num_frames=4)
    head = dict(type='LinearClsHead', num_classes=2, in_channels=8)
    cfg.model = dict(type='mmvim.VideoClassifier', backbone=backbone, head=head)
    cfg.train_dataloader.dataset = dict(
        type='mmvim.VideoDataset',
        ann_file='list.txt',
        data_root=str(tmp_path),
        pipeline=[dict(type='mmvim.LoadVideo', num_frames=4), dict(type='mmvim.PackVideo')],
    )
    cfg.test_dataloader = cfg.train_dataloader
    for i, sample in enumerate(browse(cfg)):
        assert sample.picture.shape == (32, 96, 3)
        np.testing.assert_allclose(sample.picture.mean((0, 1)), [200, 100 * i, 40], atol=8)


def test_confusion_matrix(tmp_path):
    task_configs.write(tmp_path, 'mmpretrain')
    config, weights, out = (tmp_path / name for name in ('config.py', 'x.pth', 'm.png'))
    model = build_model(Config.fromfile(config))
    torch.nn.init.zeros_(model.head.fc.weight)
    model.head.fc.bias.data = torch.tensor([0.0, 1.0])  # all is taken for b
    torch.save(model.state_dict(), weights)
    result = run_script('analysis/confusion_matrix.py', config, weights, '--out', out, '--values')
    assert result.returncode == 0, result.stderr
    assert '4 samples, 50.00% right' in result.stdout
    assert '2 x a taken for b' in result.stdout
    assert 'b taken for a' not in result.stdout
    assert np.asarray(Image.open(out)).std() > 5
    torch.save({'x': torch.zeros(1)}, weights)
    wrong = run_script('analysis/confusion_matrix.py', config, weights, '--out', out, '--overwrite')
    assert wrong.returncode == 2
    assert 'does not fit this Vim' in wrong.stderr
