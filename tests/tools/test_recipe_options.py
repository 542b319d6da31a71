"""The options that docs/user_guides/train_test.md names, on a small MambaVision classifier."""

import json
import re
import time
from pathlib import Path

import pytest
import task_configs
import torch

pytest.importorskip('mmpretrain')

from mmvim.cli.launcher import main_test, main_train

WORK_DIR = Path('work_dirs/config')
GUIDE = Path(__file__).parents[2] / 'docs' / 'user_guides' / 'train_test.md'
MODEL = """
model['backbone'] = dict(
    type='mmvim.MambaVision',
    arch=dict(
        depths=(1, 1, 2, 1), embed_dims=4, stem_dims=4, num_heads=(2, 4), window_sizes=(2, 1),
        d_state=2))
model['head']['in_channels'] = 32
"""


@pytest.fixture
def classifier(toy, monkeypatch):
    """The current directory, with ``config.py`` of a classifier on four images."""
    work = toy / 'mmpretrain'
    work.mkdir()
    task_configs.write(work, 'mmpretrain')
    with open(work / 'config.py', 'a') as file:
        file.write(MODEL)
    monkeypatch.chdir(work)
    return work


def train(*options, flags=()):
    return main_train(['config.py', *flags, '--cfg-options', *options])


def documented(text):
    """An option, which the guide must have, with the short name of the metric or count changed."""
    assert text in GUIDE.read_text(), text
    return text


def test_gradient_checkpointing(classifier, monkeypatch):
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        'mmvim.layers.recomputation.checkpoint',
        lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs),
    )
    train(documented('model.backbone.with_cp=True'))
    assert len(calls) == 5


def test_best_checkpoint_and_metrics(classifier):
    train(documented('default_hooks.checkpoint.save_best=accuracy/top1'))
    (best,) = WORK_DIR.glob('best_accuracy_top1_iter_*.pth')
    entries = [json.loads(line) for line in next(WORK_DIR.glob('*/vis_data/scalars.json')).open()]
    assert any('accuracy/top1' in entry for entry in entries)
    metrics = main_test(['config.py', str(best)])
    assert 0 <= metrics['accuracy/top1'] <= 100


def test_mixed_precision(classifier):
    runner = train(
        'work_dir=amp', flags=[documented('--amp-dtype bfloat16').split()[0], 'bfloat16']
    )
    assert type(runner.optim_wrapper).__name__ in ('CPUAmpOptimWrapper', 'AmpOptimWrapper')
    assert all(p.isfinite().all() for p in runner.model.parameters())


def test_wandb_offline(classifier, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    option = (
        "visualizer.vis_backends=[dict(type='WandbVisBackend',init_kwargs=dict(project='mmvim'))]"
    )
    train(documented(option))
    wandb.finish()
    (record,) = WORK_DIR.rglob('*.wandb')
    # A process of wandb writes the file, and on a busy machine finish() does not wait for it.
    until = time.monotonic() + 30
    while b'accuracy/top1' not in record.read_bytes() and time.monotonic() < until:
        time.sleep(0.2)
    content = record.read_bytes()
    assert b'accuracy/top1' in content
    assert b'loss' in content


def test_accumulation_average_and_distillation(classifier):
    assert 'mmvim.MesaClassifier' in GUIDE.read_text()
    runner = train(
        'model.type=mmvim.MesaClassifier',
        'model.mesa_weight=25.0',
        'train_cfg.max_iters=6',
        'train_cfg.val_interval=6',
        'train_dataloader.batch_size=2',
        documented('optim_wrapper.accumulative_counts=4').replace('4', '2'),
        "custom_hooks=[dict(type='EMAHook',momentum=0.1),dict(type='mmvim.MesaHook',start=0.3)]",
    )
    losses = runner.message_hub.get_scalar('train/loss_mesa').data[0]
    assert 0 < len(losses) <= 4
    resumed = main_train(['config.py', '--resume', '--cfg-options', 'train_cfg.max_iters=6'])
    assert resumed.iter == 6


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['model.backbone.arch=huge'], r"model\.backbone .*arch='huge'.*'tiny', 'tiny2', 'small'"),
        (
            ['model.backbone.window_sizes=(14,7,3)'],
            r'model\.backbone .*window_sizes=.*14, 7, 3.* must be two values',
        ),
        (['model.backbone.window_sizes=(0,7)'], r'model\.backbone .*window_sizes=0'),
        (
            ['model.backbone.in_channels=1'],
            r'images must be \(batch, 1, height, width\), got \(\d, 3',
        ),
        (['model.head.in_channels=640'], r'model\.head\.fc \(Linear\) wants 640 .* and gets 32'),
        (['model.backbone.depth=50'], r"mmvim\.MambaVision has no argument 'depth'"),
        (
            ['model.type=mmvim.MesaClassifier', 'model.mesa_weight=-1'],
            r'model .*mesa_weight=-1 must be a positive number',
        ),
        (
            ["custom_hooks=[dict(type='mmvim.MesaHook')]"],
            r"MesaHook needs a model of type 'mmvim\.MesaClassifier', not 'ImageClassifier'",
        ),
    ],
)
def test_bad_input_gets_one_line(classifier, fails, options, message):
    line = fails(main_train, 'config.py', '--no-validate', '--cfg-options', *options)
    assert re.search(message, line), line


def test_checkpoint_of_another_size(classifier, fails):
    train('work_dir=small')
    wider = ['model.backbone.arch.embed_dims=8', 'model.head.in_channels=64']
    line = fails(main_train, 'config.py', '--cfg-options', 'load_from=small/iter_1.pth', *wider)
    assert re.search(r'does not fit this MambaVision \(embed_dims=8.* there and .* here', line), (
        line
    )
    deeper = 'model.backbone.arch.depths=(1,1,3,1)'
    line = fails(main_test, 'config.py', 'small/iter_1.pth', '--cfg-options', deeper)
    assert re.search(r'its depths are \(1, 1, 2, 1\)', line), line
