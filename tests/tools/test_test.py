"""``tools/test.py`` on a task that no library knows."""

import json
from pathlib import Path

import pytest
import torch

from mmvim.cli.launcher import main_test, main_train
from mmvim.cli.parsers import build_test_parser

WORK_DIR = Path('work_dirs/config')
CHECKPOINT = str(WORK_DIR / 'epoch_1.pth')


@pytest.fixture
def trained(toy):
    main_train(['config.py', '--cfg-options', 'train_cfg.max_epochs=1'])
    return toy


def test_metrics_work_for_any_task(trained):
    path = Path('config.py')
    path.write_text(
        path.read_text()
        + "resume = True\nrunner_type = 'Runner'\n"
        + 'train_cfg = train_dataloader = optim_wrapper = param_scheduler = None\n'
    )
    metrics = main_test(
        ['config.py', CHECKPOINT, '--out', 'new/m.json', '--out-item', 'metrics', '--work-dir', 'w']
    )
    assert json.loads(Path('new/m.json').read_text()) == metrics
    assert 0 < metrics['accuracy'] <= 1
    assert list(Path('w').glob('*/*.json'))


def test_mixed_precision(trained):
    if torch.cuda.is_available():
        pytest.skip('the CPU path')
    import toy as task

    seen = set()
    forward = task.ToyBackbone.forward

    def spy(self, x):
        out = forward(self, x)
        seen.add(self.embed(x).dtype)
        return out

    task.ToyBackbone.forward = spy
    try:
        main_test(['config.py', CHECKPOINT, '--amp-dtype', 'bfloat16'])
    finally:
        task.ToyBackbone.forward = forward
    assert seen == {torch.bfloat16}


def test_flags_that_need_a_known_task(trained, fails):
    for flags in (['--out', 'p.pkl'], ['--show-dir', 'd'], ['--show'], ['--tta']):
        line = fails(main_test, 'config.py', CHECKPOINT, *flags)
        assert line.startswith(f'error: {flags[0]} is known for the default_scope mmdet, ')
        assert "not for 'toytask'" in line


def test_bad_flags(trained, fails):
    assert '--out-item needs --out' in fails(
        main_test, 'config.py', CHECKPOINT, '--out-item', 'metrics'
    )
    line = fails(
        main_test, 'config.py', CHECKPOINT, '--out', 'm.txt', '--out-item', 'metrics'
    )  # fmt: skip
    assert "for metrics, not 'm.txt'" in line
    assert '--interval must be at least 1' in fails(
        main_test, 'config.py', CHECKPOINT, '--interval', '0'
    )
    line = fails(main_test, 'config.py', CHECKPOINT, '--cfg-options', 'test_evaluator=None')
    assert 'no test_evaluator, which testing needs' in line


def test_checkpoints_must_fit(trained, fails):
    assert "the checkpoint 'gone.pth' does not exist" in fails(main_test, 'config.py', 'gone.pth')
    line = fails(
        main_test, 'config.py', CHECKPOINT, '--cfg-options', 'model.backbone.arch=small'
    )  # fmt: skip
    assert 'is of another model' in line
    assert '[12, 4] in the model' in line
    line = fails(main_test, 'config.py', CHECKPOINT, '--cfg-options', 'model.backbone.depth=3')
    assert f'checkpoint {CHECKPOINT!r} is of another model: it lacks 2 of' in line
    assert 'backbone.blocks.2.bias' in line
    # More than the model needs is no harm, and neither is a missing buffer.
    weights = torch.load(CHECKPOINT, weights_only=False)['state_dict']
    weights['more.weight'] = torch.zeros(1)
    del weights['backbone.norm.running_mean']
    torch.save({'state_dict': weights}, 'more.pth')
    assert 'accuracy' in main_test(['config.py', 'more.pth'])


def test_help_says_what_out_writes():
    text = ' '.join(build_test_parser().format_help().split())
    assert 'mmdet: a pickle of all predictions' in text
    assert 'mmseg: a directory of PNG label maps' in text


@pytest.mark.parametrize('with_hook', [False, True])
def test_averaged_weights(trained, fails, monkeypatch, with_hook):
    import toy as task

    own = torch.load(CHECKPOINT, weights_only=False)['state_dict']

    def weights(value):
        return {k: torch.full_like(v, value) if k == 'head.bias' else v for k, v in own.items()}

    trained_weights = {f'module.{k}': v for k, v in weights(1.0).items()}
    torch.save(
        {
            'state_dict': weights(2.0),
            'ema_state_dict': {'steps': torch.tensor(3), **trained_weights},
        },
        'ours.pth',
    )
    torch.save({'model': weights(3.0), 'model_ema': weights(4.0)}, 'theirs.pth')
    seen = set()
    forward = task.ToyModel.forward

    def spy(self, *args, **kwargs):
        seen.add(float(self.head.bias[0].detach()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(task.ToyModel, 'forward', spy)
    hook = ['--cfg-options', "custom_hooks=[dict(type='EMAHook')]"] if with_hook else []
    for file, flags, value in (
        ('ours.pth', [], 2),
        ('ours.pth', ['--ema'], 2),
        ('ours.pth', ['--no-ema'], 1),
        ('theirs.pth', [], 3),
        ('theirs.pth', ['--ema'], 4),
        ('theirs.pth', ['--no-ema'], 3),
    ):
        seen.clear()
        main_test(['config.py', file, *flags, *hook])
        assert seen == {value}, (file, flags)
    line = fails(main_test, 'config.py', CHECKPOINT, '--ema')
    assert "epoch_1.pth' has no averaged weights" in line
