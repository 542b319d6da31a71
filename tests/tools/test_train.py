"""``tools/train.py``: flags, resuming, checkpoints, and what bad input gets."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from toy import ToyBackbone

from mmvim.checkpoints.training import candidates
from mmvim.cli import flags
from mmvim.cli.launcher import main_train
from mmvim.engine import CheckpointHook, DataCheckHook
from mmvim.layers import DropPath

WORK_DIR = Path('work_dirs/config')


def option(*pairs: str) -> list[str]:
    return ['--cfg-options', *pairs]


def hook(runner, kind: str | type):
    names = [kind, getattr(kind, '__name__', kind)]
    return next(h for h in runner.hooks if type(h) is kind or type(h).__name__ in names)


def test_unknown_task_trains_and_resumes(toy):
    runner = main_train(
        [
            'config.py',
            '--auto-scale-lr',
            *option(
                'train_cfg.max_epochs=1',
                'default_hooks.checkpoint.save_best=accuracy',
                "custom_hooks=[dict(type='EMAHook',momentum=0.1)]",
                "visualizer.vis_backends=[dict(type='TensorboardVisBackend')]",
            ),
        ]
    )
    assert runner.optim_wrapper.get_lr()['lr'] == [pytest.approx(0.1 * 4 / 8)]
    assert type(hook(runner, CheckpointHook)) is CheckpointHook
    assert type(hook(runner, DataCheckHook)) is DataCheckHook
    saved = torch.load(WORK_DIR / 'epoch_1.pth', weights_only=False)
    assert 'ema_state_dict' in saved
    assert len(list(WORK_DIR.glob('best_accuracy_epoch_1.pth'))) == 1
    assert list(WORK_DIR.glob('*/vis_data/events.out.tfevents.*'))
    dumped = Config.fromfile(WORK_DIR / 'config.py')
    assert dumped.default_hooks.checkpoint.type == 'CheckpointHook'

    runner = main_train(['config.py', '--resume', *option('train_cfg.max_epochs=3')])
    assert runner.epoch == 3
    assert runner.iter == 12
    logs = [path.read_text() for path in WORK_DIR.glob('*/*.log')]
    assert any('resumed epoch: 1, iter: 4' in log for log in logs)

    again = main_train(
        ['config.py', '--resume', str(WORK_DIR / 'epoch_1.pth'), *option('train_cfg.max_epochs=3')]
    )
    assert again.epoch == 3
    for name, value in runner.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_resume_without_checkpoint_keeps_load_from(toy):
    main_train(['config.py', '--no-validate', *option('train_cfg.max_epochs=1')])
    weights = str(WORK_DIR / 'epoch_1.pth')
    runner = main_train(
        ['config.py', '--resume', '--work-dir', 'fresh', *option(f'load_from={weights}')]
    )
    assert runner.epoch == 2
    log = next(Path('fresh').glob('*/*.log')).read_text()
    assert f'Load checkpoint from {weights}' in log
    assert 'No checkpoint in fresh to resume' in log


@pytest.mark.parametrize('flag', [['--amp'], ['--amp-dtype', 'bfloat16']])
def test_mixed_precision_on_cpu(toy, flag):
    if torch.cuda.is_available():
        pytest.skip('the CPU path')
    runner = main_train(['config.py', *flag, '--no-validate', *option('train_cfg.max_epochs=1')])
    assert runner.model.seen_dtypes == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in runner.model.parameters())


def test_amp_keeps_configured_dtype_and_user_wins(toy):
    from mmvim.cli.flags import apply_options, apply_train_flags, load_config
    from mmvim.cli.parsers import build_train_parser

    def wrapper(*args: str) -> dict:
        parsed = build_train_parser().parse_args(['config.py', *args])
        cfg = load_config(parsed)
        apply_train_flags(cfg, parsed)
        apply_options(cfg, parsed)
        return {k: v for k, v in cfg.optim_wrapper.items() if k != 'optimizer'}

    assert wrapper('--amp') == {'type': 'AmpOptimWrapper', 'loss_scale': 'dynamic'}
    unscaled = {'type': 'AmpOptimWrapper', 'loss_scale': {'enabled': False}, 'dtype': 'bfloat16'}
    assert wrapper('--amp-dtype', 'bfloat16') == unscaled
    path = Path('config.py')
    path.write_text(path.read_text() + "optim_wrapper['dtype'] = 'bfloat16'\n")
    assert wrapper('--amp') == unscaled
    scaled = wrapper('--amp', *option('optim_wrapper.loss_scale=512.0'))
    assert scaled['loss_scale'] == 512.0


def test_max_keep_and_best_leave_complete_files(toy):
    WORK_DIR.mkdir(parents=True)
    (WORK_DIR / 'epoch_9.pth.1a2b3c4d.mmvim-tmp').touch()  # of a run that was killed
    main_train(
        [
            'config.py',
            *option(
                'train_cfg.max_epochs=3',
                'default_hooks.checkpoint.max_keep_ckpts=1',
                'default_hooks.checkpoint.save_best=accuracy',
            ),
        ]
    )
    names = sorted(path.name for path in WORK_DIR.glob('*.pth*'))
    assert 'epoch_3.pth' in names
    assert all(name.endswith('.pth') for name in names)
    assert len([name for name in names if name.startswith('epoch_')]) == 1
    assert len([name for name in names if name.startswith('best_')]) == 1
    assert (WORK_DIR / 'last_checkpoint').read_text().endswith('epoch_3.pth')


def test_crash_while_writing_keeps_the_old_checkpoint(toy, monkeypatch, fails):
    """The disk fills up while the second of at most one kept checkpoints is written."""
    arguments = option('default_hooks.checkpoint.max_keep_ckpts=1')
    replace, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if str(target).endswith('epoch_2.pth'):
            raise OSError(28, 'No space left on device')
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', full)
        line = fails(main_train, 'config.py', '--no-validate', *arguments)
    assert 'No space left on device' in line
    assert 'epoch_2.pth' in line
    assert sorted(path.name for path in WORK_DIR.glob('*.pth*')) == ['epoch_1.pth']
    assert [Path(path).name for path in candidates(str(WORK_DIR))] == ['epoch_1.pth']


def test_order_of_checkpoints(tmp_path):
    def tried() -> list[int]:
        return [int(Path(path).stem.rpartition('_')[2]) for path in candidates(str(tmp_path))]

    assert tried() == []
    # A former run in the same directory came as far as epoch 9.
    for time, number in enumerate((8, 9, 1, 2, 3)):
        (tmp_path / f'epoch_{number}.pth').touch()
        os.utime(tmp_path / f'epoch_{number}.pth', (time, time))
    pointer = tmp_path / 'last_checkpoint'
    pointer.write_text('/elsewhere/epoch_3.pth')
    assert tried() == [3, 2, 1, 9, 8]
    # The run was killed before it could write that file for epoch 3.
    pointer.write_text(str(tmp_path / 'epoch_2.pth'))
    assert tried() == [3, 2, 1, 9, 8]
    for broken in ('', '/elsewhere/epoch_7.pth'):
        pointer.write_text(broken)
        assert tried() == [3, 2, 1, 9, 8]


BAD_OPTIONS = {
    'misspelt backbone key': (
        ['model.backbone.archh=tiny'],
        ["model.backbone: ToyBackbone has no argument 'archh'", "'arch'", 'allowed: arch, depth'],
    ),
    'unknown arch': (['model.backbone.arch=huge'], ["arch must be 'tiny' or 'small', not 'huge'"]),
    'unknown type': (
        ['model.backbone.type=ToyBackbon'],
        ["model.backbone.type is 'ToyBackbon'", "did you mean 'ToyBackbone'"],
    ),
    'unknown package': (
        ['model.backbone.type=nopackage.Net'],
        ["'nopackage.Net'", "no package 'nopackage' installed"],
    ),
    'unknown optimizer': (
        ['optim_wrapper.optimizer.type=AdamWW'],
        ["optim_wrapper.optimizer.type is 'AdamWW'", "'AdamW'"],
    ),
    'missing data root': (
        ['train_dataloader.dataset.data_root=nowhere'],
        ["train_dataloader.dataset.data_root: the directory 'nowhere' does not exist"],
    ),
    'missing annotations': (
        ['val_dataloader.dataset.ann_file=other.json'],
        ['val_dataloader.dataset.ann_file', "data/other.json' does not exist"],
    ),
    'missing images': (
        ['train_dataloader.dataset.data_prefix.img_path=pictures'],
        ['train_dataloader.dataset.data_prefix.img_path', "data/pictures' does not exist"],
    ),
    'wrapped data set': (
        [
            "train_dataloader.dataset={'_delete_':True,'type':'RepeatDataset','times':2,'dataset':"
            "{'type':'ConcatDataset','datasets':[{'type':'ToyDataset','data_root':'nowhere'}]}}"
        ],
        ['train_dataloader.dataset.dataset.datasets.0.data_root', "'nowhere'"],
    ),
    'wrong type': (['train_cfg=5'], ['train_cfg must be dict, not 5 (int)']),
    'half a validation': (['val_cfg=None'], ['val_dataloader, val_evaluator', 'no val_cfg']),
    'no training': (['train_cfg=None'], ['no train_cfg', 'training needs']),
    'unknown option': (['optim_wraper.type=x'], ["'optim_wraper'", "did you mean 'optim_wrapper'"]),
    'missing weights': (['load_from=gone.pth'], ["load_from: the checkpoint 'gone.pth'"]),
    'missing pretrained': (
        ["model.init_cfg=dict(type='Pretrained',checkpoint='gone.pth')"],
        ["model.init_cfg.checkpoint: the checkpoint 'gone.pth' does not exist"],
    ),
    'missing library': (['model.backbone.type=mmseg.X'], ['mmseg', 'model.backbone.type']),
    'misspelt loop': (['train_cfg.max_epoch=3'], ['train_cfg', "'max_epoch'", "'max_epochs'"]),
    'unknown save_best': (
        ['default_hooks.checkpoint.save_best=top1'],
        ["save_best is 'top1'", 'allowed: accuracy'],
    ),
    'bad precision': (['optim_wrapper.type=OptimWrapperr'], ["'OptimWrapperr'", "'OptimWrapper'"]),
    'unknown collate': (['train_dataloader.collate_fn.type=x'], ["collate_fn.type is 'x'"]),
}


@pytest.mark.parametrize('case', BAD_OPTIONS)
def test_bad_config_gets_one_line(toy, fails, case, monkeypatch):
    options, expected = BAD_OPTIONS[case]
    if case == 'missing library':
        monkeypatch.setitem(sys.modules, 'mmseg', None)
    line = fails(main_train, 'config.py', *option(*options))
    for part in expected:
        assert part in line
    if case != 'unknown save_best':
        assert not list(WORK_DIR.glob('*.pth*'))


def test_bad_flags_get_one_line(toy, fails, capsys):
    assert "'gone.py' does not exist" in fails(main_train, 'gone.py')
    assert '--resume: the checkpoint' in fails(main_train, 'config.py', '--resume', 'gone.pth')
    line = fails(main_train, 'config.py', '--launcher', 'slurm')
    assert 'SLURM_PROCID' in line
    if not torch.cuda.is_available():
        line = fails(main_train, 'config.py', '--amp-dtype', 'float16')
        assert '--amp-dtype float16 needs a GPU' in line
    deepspeed = option('optim_wrapper.type=DeepSpeedOptimWrapper')
    Path('other.py').write_text(
        "_base_ = 'config.py'\noptim_wrapper = dict(type='DeepSpeedOptimWrapper')\n"
        'auto_scale_lr = dict(_delete_=True)\n'
    )
    assert 'DeepSpeedOptimWrapper' in fails(main_train, 'other.py', '--amp', *deepspeed)
    assert 'base_batch_size' in fails(main_train, 'other.py', '--auto-scale-lr')
    Path('broken.py').write_text('model = dict(\n')
    assert 'broken.py' in fails(main_train, 'broken.py')
    with pytest.raises(SystemExit):
        main_train(['config.py', '--cfg-options', 'key'])
    assert 'expected KEY=VALUE' in capsys.readouterr().err


def test_bad_data_gets_one_line(toy, fails):
    annotations = toy / 'data' / 'train.json'
    good = annotations.read_text()
    for bad, reason in (
        ('{"samples": [', 'JSONDecodeError'),
        ('{"other": []}', "something in it has no 'samples'"),
    ):
        annotations.write_text(bad)
        line = fails(main_train, 'config.py')
        assert f"cannot use annotation file '{annotations}'" in line
        assert 'train_dataloader.dataset (ToyDataset): ' in line
        assert reason in line
    lazy = option('train_dataloader.dataset.lazy_init=True')
    assert str(annotations) in fails(main_train, 'config.py', *lazy)
    annotations.write_text('{"samples": []}')
    assert 'train_dataloader.dataset (ToyDataset) is empty' in fails(main_train, 'config.py')
    plain = option('train_dataloader.dataset.serialize_data=False')
    line = fails(main_train, 'config.py', '--no-validate', *plain)
    assert 'train_dataloader.dataset (ToyDataset) is empty' in line
    annotations.write_text(good)

    broken = toy / 'data' / 'vectors' / '3.npy'
    broken.write_bytes(b'not numpy')
    for workers in (0, 1):
        line = fails(main_train, 'config.py', *option(f'train_dataloader.num_workers={workers}'))
        assert f"cannot load image '{broken}' (LoadVector)" in line
    assert not list(WORK_DIR.glob('*.pth*'))


def test_bad_checkpoint_gets_one_line(toy, fails):
    main_train(['config.py', '--no-validate', *option('train_cfg.max_epochs=1')])
    saved = WORK_DIR / 'epoch_1.pth'

    wider = option('model.backbone.arch=small')
    line = fails(main_train, 'config.py', '--resume', *wider)
    assert 'epoch_1.pth' in line
    assert 'is of another model' in line
    assert 'has shape [8, 4] in it and [12, 4] in the model' in line

    torch.save({'state_dict': {'other.weight': torch.zeros(1)}}, 'other.pth')
    line = fails(main_train, 'config.py', *option('load_from=other.pth'))
    assert "'other.pth' is of another model: none of its weights fits" in line
    pretrained = "model.init_cfg=dict(type='Pretrained',checkpoint='other.pth')"
    assert "'other.pth' is of another model" in fails(main_train, 'config.py', *option(pretrained))

    weights = torch.load(saved, weights_only=False)['state_dict']
    torch.save({'state_dict': weights}, 'weights.pth')
    line = fails(main_train, 'config.py', '--resume', 'weights.pth')
    assert "'weights.pth'" in line
    assert "it has no 'meta'" in line

    Path('cut.pth').write_bytes(saved.read_bytes()[: saved.stat().st_size // 2])
    Path('text.pth').write_text('hello')
    Path('empty.pth').touch()
    for name in ('cut.pth', 'text.pth'):
        line = fails(main_train, 'config.py', '--resume', name)
        assert f"checkpoint '{name}' cannot be read: it is damaged or not a PyTorch" in line
    assert "'empty.pth' is empty" in fails(main_train, 'config.py', '--resume', 'empty.pth')

    # Fine-tuning with another head is what load_from is for.
    finetuned = main_train(
        ['config.py', '--work-dir', 'tuned', *option(f'load_from={saved}', 'model.num_classes=5')]
    )
    assert finetuned.epoch == 2


def test_bugs_keep_their_traceback(toy, monkeypatch):
    import toy as task

    def broken(self, *args, **kwargs):
        return self.no_such_attribute

    monkeypatch.setattr(task.ToyBackbone, 'forward', broken)
    with pytest.raises(AttributeError, match='no_such_attribute'):
        main_train(['config.py', '--no-validate'])


def test_debug_shows_the_traceback(toy, fails, monkeypatch, capsys):
    monkeypatch.setenv('MMVIM_DEBUG', '1')
    with pytest.raises(SystemExit):
        main_train(['gone.py'])
    assert 'Traceback' in capsys.readouterr().err


def test_script_runs_anywhere_and_reports(toy, run_script):
    """One process of the real script: any directory, not installed, one line, no traceback."""
    (toy / 'elsewhere').mkdir()
    done = run_script(
        'train.py',
        '../config.py',
        '--work-dir',
        'out',
        *option('train_dataloader.dataset.data_root=gone'),
        cwd=toy / 'elsewhere',
    )
    assert done.returncode == 2
    assert done.stderr.count('error: ') == 1
    assert 'train_dataloader.dataset.data_root' in done.stderr
    assert 'Traceback' not in done.stderr + done.stdout


def test_script_without_mmengine(toy, run_script):
    hidden = toy / 'hidden' / 'mmengine'
    hidden.mkdir(parents=True)
    (hidden / '__init__.py').write_text(
        "raise ModuleNotFoundError(\"No module named 'mmengine'\", name='mmengine')\n"
    )
    done = run_script('train.py', 'config.py', cwd=toy, PYTHONPATH=str(hidden.parent))
    assert done.returncode != 0
    assert done.stderr.startswith('error: ')
    assert 'mmengine' in done.stderr
    assert 'pip install' in done.stderr
    assert 'Traceback' not in done.stderr


def test_workers_options_without_workers(toy):
    runner = main_train(
        [
            'config.py',
            '--no-pin-memory',
            '--no-validate',
            *option(
                'train_dataloader.persistent_workers=True',
                'train_dataloader.prefetch_factor=2',
                'train_cfg.max_epochs=1',
            ),
        ]
    )
    assert not runner.train_dataloader.persistent_workers
    assert not runner.train_dataloader.pin_memory


def test_memory_is_pinned_for_a_gpu_only():
    loaders = {'train_dataloader': {'pin_memory': True}, 'val_dataloader': {'num_workers': 0}}
    cfg = Config(loaders)
    flags.fit_to_cpu(cfg, [])
    assert cfg.to_dict() == {**loaders, 'train_dataloader': {'pin_memory': False}}


@pytest.mark.parametrize('key', ['persistent_workers', 'pin_memory'])
def test_flags_of_all_dataloaders(toy, key):
    from mmvim.cli.flags import apply_options, apply_train_flags, load_config
    from mmvim.cli.parsers import build_train_parser

    settings = {'num_workers': 1, 'persistent_workers': True, 'pin_memory': True}
    names = [f'{loop}_dataloader' for loop in ('train', 'val', 'test')]
    text = ''.join(f'{name}.update({settings})\n' for name in names)
    Path('config.py').write_text(Path('config.py').read_text() + text)
    args = build_train_parser().parse_args(['config.py', f'--no-{key.replace("_", "-")}'])
    cfg = load_config(args)
    apply_train_flags(cfg, args)
    apply_options(cfg, args)
    for name in names:
        assert {k: cfg[name][k] for k in settings} == {**settings, key: False}, name


def test_custom_imports_of_the_command_line(toy, fails, monkeypatch):
    monkeypatch.syspath_prepend('.')
    Path('of_the_user.py').write_text(
        'from mmengine.hooks import Hook\n'
        'from mmengine.registry import HOOKS\n'
        '@HOOKS.register_module()\n'
        'class OfTheUser(Hook):\n'
        '    pass\n'
    )
    imports = "custom_imports=dict(imports=['of_the_user'], allow_failed_imports=False)"
    hook = "custom_hooks=[dict(type='OfTheUser')]"
    runner = main_train(['config.py', *option('train_cfg.max_epochs=1', imports, hook)])
    assert 'OfTheUser' in [type(hook).__name__ for hook in runner.hooks]
    message = fails(main_train, 'config.py', *option(imports.replace('of_the_user', 'of_nobody')))
    assert 'custom_imports must be' in message
    assert 'Failed to import of_nobody' in message


def compiled(runner):
    return runner.model.backbone._compiled_call_impl is not None


@pytest.mark.parametrize(
    ('backend', 'flags'),
    [('eager', ()), ('aot_eager', ('--amp',))],
    ids=['eager', 'aot_eager, amp'],
)
def test_compile_leaves_the_results_as_they_are(toy, backend, flags):
    changes = (
        'train_cfg.max_epochs=2',
        "custom_hooks=[dict(type='EMAHook',momentum=0.1)]",
        'optim_wrapper.accumulative_counts=2',
        'randomness.seed=0',
        'train_cfg.max_epochs=3',
    )
    plain = main_train(['config.py', *flags, *option(*changes)])
    changes = (*changes, f"compile=dict(backend='{backend}')")
    runner = main_train(['config.py', '--work-dir', 'compiled', *flags, *option(*changes)])
    assert compiled(runner)
    assert not compiled(plain)
    average = hook(runner, 'EMAHook').ema_model.module
    assert average.backbone._compiled_call_impl is None
    expected = hook(plain, 'EMAHook').ema_model.module.state_dict()
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert list(runner.model.state_dict()) == list(plain.model.state_dict())


def test_compile_is_what_a_resumed_run_does_too(toy):
    first = option('train_cfg.max_epochs=1', "compile=dict(backend='eager')")
    main_train(['config.py', *first])
    config = Config.fromfile(WORK_DIR / 'config.py')
    assert config.custom_hooks[-1] == dict(type='mmvim.CompileHook', backend='eager')
    more = option('train_cfg.max_epochs=2', "compile=dict(backend='eager')")
    assert compiled(main_train(['config.py', '--resume', *more]))


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        ("dict(mod='x')", "CompileHook: unknown 'mod'; allowed: fullgraph, dynamic"),
        ("dict(mode='fast')", 'fast'),
        ('3', 'compile'),
    ],
)
def test_bad_compile_options(toy, capsys, value, message):
    with pytest.raises(SystemExit) as exit_:
        main_train(['config.py', *option(f'compile={value}')])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_graph_runs_without_where_there_is_no_gpu(toy, caplog):
    changes = ('train_cfg.max_epochs=2', 'randomness.seed=0')
    plain = main_train(['config.py', *option(*changes)])
    for value in ('True', 'dict(max_shapes=2)'):
        runner = main_train(
            ['config.py', '--work-dir', 'graph', *option(*changes, f'graph={value}')]
        )
        assert hook(runner, 'GraphHook').max_shapes == (2 if '2' in value else 8)
        log = next(Path('graph').glob('*/*.log')).read_text()
        if torch.cuda.is_available():
            assert 'backbone is recorded for' in log
        else:
            assert log.count('backbone runs without CUDA graphs: it is on cpu') == 1
            for name, value in runner.model.state_dict().items():
                assert torch.equal(value, plain.model.state_dict()[name])
        shutil.rmtree('graph')


def test_a_resumed_run_says_which_schedules_of_its_config_do_not_count(toy):
    main_train(['config.py', *option('train_cfg.max_epochs=1')])
    for count, changes, expected in (
        (1, ('train_cfg.max_epochs=1',), None),
        (2, ('train_cfg.max_epochs=2',), 'MultiStepLR.end=2 (there 1)'),
        (3, ('train_cfg.max_epochs=3', 'param_scheduler.gamma=0.1'), 'gamma=0.1 (there 0.5)'),
        (4, ('train_cfg.max_epochs=4', 'param_scheduler=None'), None),
    ):
        main_train(['config.py', '--resume', *option(*changes)])
        newest = max(WORK_DIR.glob('*/*.log'), key=lambda path: path.stat().st_mtime_ns)
        said = [line for line in newest.read_text().splitlines() if 'Schedules continue' in line]
        assert len(said) == (expected is not None), count
        assert not said or expected in said[0]


@MODELS.register_module(force=True)
class RandomBackbone(ToyBackbone):
    """Drops samples at random in training."""

    def __init__(self, **options):
        super().__init__(**options)
        self.drop_path = DropPath(0.5)

    def forward(self, x):
        return self.drop_path(super().forward(x))


@pytest.mark.gpu
def test_graph_with_averages_accumulation_and_resuming(toy):
    changes = (
        'model.backbone.type=RandomBackbone',
        "custom_hooks=[dict(type='EMAHook',momentum=0.1)]",
        'optim_wrapper.accumulative_counts=2',
        'randomness.seed=0',
        'train_cfg.max_epochs=3',
    )
    plain = main_train(['config.py', *option(*changes)])
    changes = option(*changes, 'graph=True')
    whole = main_train(['config.py', '--work-dir', 'whole', *changes])
    first = ('--resume', 'whole/epoch_1.pth')
    resumed = main_train(['config.py', '--work-dir', 'resumed', *first, *changes])
    for path in (*Path('whole').glob('*/*.log'), *Path('resumed').glob('*/*.log')):
        log = path.read_text()
        assert 'backbone is recorded for' in log
        assert 'runs without CUDA graphs' not in log
    for runner in (whole, resumed):
        for given, expected in (
            (runner.model, plain.model),
            (hook(runner, 'EMAHook').ema_model, hook(plain, 'EMAHook').ema_model),
        ):
            expected = expected.state_dict()
            for name, value in given.state_dict().items():
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (('graph=3',), 'graph'),
        (('graph=dict(shapes=3)',), "graph has no option 'shapes'; allowed: max_shapes"),
        (('graph=dict(max_shapes=0)',), 'max_shapes must be at least 1'),
        (('graph=True', 'compile=True'), 'compile and graph exclude each other'),
    ],
)
def test_bad_graph_options(toy, capsys, changes, message):
    with pytest.raises(SystemExit) as exit_:
        main_train(['config.py', *option(*changes)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_time_between_kernels(toy):
    """Groups are joined, losses deferred, averages quick, and the log says so."""
    changes = (
        'optim_wrapper.paramwise_cfg=dict(norm_decay_mult=0.0)',
        'optim_wrapper.optimizer.weight_decay=0.1',
        'optim_wrapper.clip_grad=dict(max_norm=1.0)',
        "custom_hooks=[dict(type='EMAHook',momentum=0.1)]",
    )
    runner = main_train(['config.py', *option(*changes)])
    groups = runner.optim_wrapper.optimizer.param_groups
    assert sorted(len(group['params']) for group in groups) == [2, 8]
    log = next(WORK_DIR.glob('*/*.log')).read_text()
    assert 'Optimizer: SGD' in log
    assert '2 parameter groups (10 with equal settings joined)' in log
    assert hook(runner, 'EMAHook').ema_model.__class__.__module__.startswith('mmvim.')
    saved = torch.load(WORK_DIR / 'epoch_2.pth', weights_only=False)
    assert len(saved['optimizer']['param_groups']) == 10
    for name in ('train/loss', 'train/grad_norm'):
        history = runner.message_hub.get_scalar(name)
        assert len(history.data[0]) == runner.iter
        assert type(saved['message_hub']['log_scalars'][name]).__module__.startswith('mmengine')
    resumed = main_train(['config.py', '--resume', *option('train_cfg.max_epochs=3', *changes)])
    assert resumed.iter == runner.iter * 3 // 2


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        (dict(type='AdamW', lr=1), dict(fused=True)),
        (dict(type='SGD', lr=1), dict(fused=True)),
        (dict(type='AdamW', lr=1, fused=False), {}),
        (dict(type='AdamW', lr=1, foreach=True), {}),
        (dict(type='RMSprop', lr=1), {}),
        (dict(type='Lamb', lr=1), dict(type='mmvim.Lamb')),
        (dict(type='mmpretrain.Lamb', lr=1), dict(type='mmvim.Lamb')),
    ],
)
def test_optimizer_on_a_gpu(before, after, monkeypatch):
    for device, expected in (('cuda', {**before, **after}), ('cpu', before)):
        monkeypatch.setattr('mmvim.cli.flags.get_device', lambda device=device: device)
        cfg = Config(dict(optim_wrapper=dict(optimizer=dict(before))))
        flags.use_fast_training(cfg)
        assert cfg.optim_wrapper.optimizer == expected
        added = [hook['type'] for hook in cfg.custom_hooks]
        assert added == ['mmvim.ParameterGroupsHook', 'mmvim.RunAheadHook']
        flags.use_fast_training(cfg)
        assert len(cfg.custom_hooks) == 2
