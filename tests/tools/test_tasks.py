"""Flags that differ between the task libraries, on real models of each with a Vim backbone."""

import json
from pathlib import Path

import mmengine
import numpy as np
import pure_python
import pytest
import task_configs
import torch
from mmengine.hooks import EMAHook, LoggerHook
from PIL import Image

from mmvim.apis.inferencers import make_inferencer
from mmvim.cli.launcher import main_test, main_train
from mmvim.engine import loops
from mmvim.engine.hooks import CheckpointHook
from mmvim.engine.optim import ExponentialMovingAverage

CHECKPOINT = 'work_dirs/config/iter_1.pth'


@pytest.fixture
def task(toy, request):
    """The current directory, with a trained checkpoint of the task that the test is for."""
    pytest.importorskip(request.param)
    work = toy / request.param
    work.mkdir()
    root = task_configs.write(work, request.param)
    request.getfixturevalue('monkeypatch').chdir(work)
    main_train(['config.py'])
    return root


def painted(directory: str) -> list[Path]:
    return [path for kind in ('*.png', '*.jpg') for path in Path(directory).rglob(kind)]


@pytest.mark.parametrize('task', ['mmpretrain'], indirect=True)
def test_classification(task, fails):
    metrics = main_test(
        ['config.py', CHECKPOINT, '--out', 'o/p.pkl', '--show-dir', 'shown', '--interval', '2']
    )
    predictions = mmengine.load('o/p.pkl')
    assert len(predictions) == 4
    right = [int(p['pred_label']) == int(p['gt_label']) for p in predictions]
    assert metrics['accuracy/top1'] == pytest.approx(100 * np.mean(right))
    assert len(painted('shown')) == 2
    plain = np.stack([p['pred_score'] for p in predictions])

    def scores(*flags: str) -> np.ndarray:
        main_test(['config.py', CHECKPOINT, *flags, '--out', 'scores.pkl'])
        return np.stack([p['pred_score'].float() for p in mmengine.load('scores.pkl')])

    augmented = scores('--tta')
    assert augmented.shape == plain.shape
    assert np.isfinite(scores('--tta', '--amp')).all()
    for path in (task / 'images').glob('*.png'):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    # An image and its mirror image are averaged.
    mirrored = scores()
    assert np.abs(mirrored - plain).max() > 1e-4
    np.testing.assert_allclose(scores('--tta'), augmented, atol=1e-6)
    np.testing.assert_allclose(augmented, (plain + mirrored) / 2, atol=1e-6)

    line = fails(main_test, 'config.py', CHECKPOINT, '--cfg-options', 'model.head.num_classes=3')
    assert 'model.head.num_classes is 3' in line
    assert 'test_dataloader.dataset (CustomDataset) has 2 classes (a, b)' in line
    line = fails(main_test, 'config.py', CHECKPOINT, '--out', 'p.json')
    assert "--out must end with .pkl or .pickle for predictions, not 'p.json'" in line
    line = fails(main_train, 'config.py', '--cfg-options', 'model.backbone.arhc=tiny')
    assert "model.backbone: mmvim.Vim has no argument 'arhc' (did you mean 'arch'?)" in line
    line = fails(main_train, 'config.py', '--cfg-options', 'model.backbone.discretization=euler')
    assert 'model.backbone (mmvim.Vim)' in line
    assert "'euler'" in line
    assert 'zoh' in line

    (task / 'train.txt').write_text('0.png 0\n1.png 2\n2.png 1\n3.png 0')
    line = fails(main_train, 'config.py')
    assert "label 2 of '" in line  # the first that is too high
    assert "images/1.png' does not fit model.head.num_classes = 2; allowed: 0 to 1" in line
    (task / 'train.txt').write_text('0.png zero')
    assert 'cannot use annotation file' in fails(main_train, 'config.py')
    (task / 'train.txt').write_text('0.png 0\n1.png 1\n2.png 1\n3.png 0')
    (task / 'images' / '2.png').write_bytes(b'')
    assert "images/2.png' is empty" in fails(main_train, 'config.py')
    (task / 'images' / '2.png').write_bytes(b'no image')
    line = fails(main_train, 'config.py')
    assert "cannot load image '" in line
    assert "images/2.png' (LoadImageFromFile)" in line
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(task / 'images' / '2.png')
    line = fails(main_train, 'config.py')
    assert 'different sizes ([3, 32, 32] at entry 0 and [3, 8, 8] at entry 2)' in line
    one = ['--cfg-options', 'train_dataloader.batch_size=1', 'train_cfg.max_iters=4']
    line = fails(main_train, 'config.py', '--no-validate', *one)
    assert '8' in line
    assert 'patch' in line


@pytest.mark.parametrize('task', ['mmdet'], indirect=True)
def test_detection(task, fails):
    arguments = ['--out', 'p.pkl', '--show-dir', 'shown', '--interval', '3']
    main_test(['config.py', CHECKPOINT, *arguments])
    predictions = mmengine.load('p.pkl')
    assert [p['img_id'] for p in predictions] == [0, 1, 2, 3]
    assert len(painted('shown')) == 2
    main_test(['config.py', CHECKPOINT, '--tta', '--out', 'tta.pkl'])
    mirrored = mmengine.load('tta.pkl')
    counts = [
        [len(p['pred_instances']['scores']) for p in each] for each in (predictions, mirrored)
    ]
    assert max(counts[1]) > max(counts[0])

    line = fails(main_train, 'config.py', '--cfg-options', 'model.bbox_head.num_classes=80')
    assert 'model.bbox_head.num_classes is 80' in line
    assert 'has 2 classes' in line
    missing = 'train_dataloader.dataset.dataset.data_prefix.img=gone'
    line = fails(main_train, 'config.py', '--cfg-options', missing)
    assert 'train_dataloader.dataset.dataset.data_prefix.img: the directory' in line
    line = fails(main_train, 'config.py', '--cfg-options', 'val_evaluator.ann_file=gone.json')
    assert "val_evaluator.ann_file: the annotation file 'gone.json' does not exist" in line
    (task / 'train.json').write_text(json.dumps({'images': []}))
    line = fails(main_train, 'config.py')
    assert 'train_dataloader.dataset.dataset' in line
    assert 'train.json' in line


@pytest.mark.parametrize('task', ['mmseg'], indirect=True)
def test_segmentation(task, fails):
    arguments = ['--out', 'maps', '--show-dir', 'shown', '--interval', '2']
    metrics = main_test(['config.py', CHECKPOINT, *arguments])
    assert 'mIoU' in metrics
    maps = sorted(Path('maps').glob('*.png'))
    assert [path.name for path in maps] == ['0.png', '1.png', '2.png', '3.png']
    assert set(np.unique(np.asarray(Image.open(maps[0])))) <= {0, 1}
    assert len(painted('shown')) == 2
    assert 'mIoU' in main_test(['config.py', CHECKPOINT, '--tta'])

    line = fails(main_train, 'config.py', '--cfg-options', 'model.decode_head.num_classes=3')
    assert 'model.decode_head.num_classes is 3' in line
    Image.fromarray(np.full((32, 32), 9, np.uint8)).save(task / 'maps' / '1.png')
    line = fails(main_train, 'config.py')
    assert 'label 9 of' in line
    assert 'images/1.png' in line
    assert 'allowed: 0 to 1 and 255 (ignored)' in line
    (task / 'maps' / '1.png').write_text('no picture')
    line = fails(main_train, 'config.py')
    assert "cannot load annotation '" in line
    assert "maps/1.png' (LoadAnnotations)" in line


@pytest.mark.parametrize('task', ['mmpretrain', 'mmdet', 'mmseg'], indirect=True)
def test_pure_python_config(task, fails):
    """Types are classes and there is no default_scope; all works as with names."""
    with open('config.py', 'a') as file:
        file.write("custom_hooks = [dict(type='EMAHook', ema_type='ExponentialMovingAverage')]\n")
    pure_python.write(Path('config.py'), Path('pure.py'))
    text = Path('pure.py').read_text()
    assert "'type': '" not in text.replace("'type': 'nms'", '')
    assert 'default_scope' not in text
    runner = main_train(['pure.py', '--amp', '--cfg-options', 'train_cfg.max_iters=2'])
    assert runner.cfg.default_scope == Path.cwd().name
    assert isinstance(runner.train_loop, loops.IterBasedTrainLoop)
    kinds = [type(hook) for hook in runner.hooks]
    assert kinds.count(CheckpointHook) == 1
    assert {'ParameterGroupsHook', 'RunAheadHook'} <= {kind.__name__ for kind in kinds}
    ema = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
    assert isinstance(ema.ema_model, ExponentialMovingAverage)
    assert type(runner.optim_wrapper).__name__ == 'CPUAmpOptimWrapper'
    resumed = main_train(['pure.py', '--resume', '--cfg-options', 'train_cfg.max_iters=3'])
    assert resumed.iter == 3
    checkpoint = 'work_dirs/pure/iter_3.pth'
    out = {'mmseg': 'maps'}.get(Path.cwd().name, 'p.pkl')
    plain = main_test(['pure.py', checkpoint, '--out', out, '--show-dir', 'shown'])
    assert plain
    assert Path(out).exists()
    assert len(painted('shown')) == 4
    assert main_test(['pure.py', checkpoint, '--tta'])
    inferencer = make_inferencer('pure.py', checkpoint, 'cpu')
    image = next((task / 'images').glob('*.png'))
    assert list(inferencer.predict(str(image)))
    assert list(inferencer.class_names) == ['a', 'b']


@pytest.mark.parametrize('task', ['mmseg'], indirect=True)
def test_types_with_a_prefix(task):
    text = Path('config.py').read_text()
    for name in ('IterBasedTrainLoop', 'CheckpointHook'):
        text = text.replace(f"'{name}'", f"'mmengine.{name}'")
    for name in ('IoUMetric', 'LoadAnnotations', 'PackSegInputs', 'EncoderDecoder'):
        text = text.replace(f"'{name}'", f"'mmseg.{name}'")
    Path('config.py').write_text(text)
    runner = main_train(['config.py'])
    assert isinstance(runner.train_loop, loops.IterBasedTrainLoop)
    assert [type(hook) for hook in runner.hooks].count(CheckpointHook) == 1
    assert 'mIoU' in main_test(['config.py', CHECKPOINT, '--tta', '--out', 'maps'])
    assert len(list(Path('maps').iterdir())) == 4


def nest(task, scope):
    """Move the images (and maps) into two folders that share file names."""
    for kind in ('images', 'maps'):
        for i in range(4):
            target = task / kind / 'ab'[i // 2] / f'{i % 2}.png'
            target.parent.mkdir(exist_ok=True)
            (task / kind / f'{i}.png').rename(target)
    if scope == 'mmdet':
        coco = json.loads((task / 'train.json').read_text())
        for i, image in enumerate(coco['images']):
            image['file_name'] = f'{"ab"[i // 2]}/{i % 2}.png'
        (task / 'train.json').write_text(json.dumps(coco))
    if scope == 'mmpretrain':
        (task / 'train.txt').write_text('a/0.png 0\na/1.png 1\nb/0.png 0\nb/1.png 1')


@pytest.mark.parametrize('task', ['mmpretrain', 'mmdet', 'mmseg'], indirect=True)
def test_equal_names_in_different_folders(task):
    scope = Path.cwd().name
    nest(task, scope)
    out = [] if scope != 'mmseg' else ['--out', 'maps']
    main_test(['config.py', CHECKPOINT, '--show-dir', 'shown', *out])
    assert len(painted('shown')) == 4
    if scope == 'mmpretrain':
        assert {path.relative_to('shown').parts[0] for path in painted('shown')} == {'a', 'b'}
        assert {len(path.relative_to('shown').parts) for path in painted('shown')} == {2}
    if out:
        names = {str(path.relative_to('maps')) for path in Path('maps').rglob('*.png')}
        assert names == {'a/0.png', 'a/1.png', 'b/0.png', 'b/1.png'}


@pytest.mark.parametrize('task', ['mmseg'], indirect=True)
def test_equal_names_of_other_suffixes(task):
    Image.open(task / 'images' / '1.png').save(task / 'images' / '0.bmp')
    text = Path('config.py').read_text()
    text += "test_dataloader = dict(batch_size=1, dataset=dict(type='ConcatDataset', datasets=["
    text += "dataset, dict(dataset, img_suffix='.bmp')]), **loop)\n"
    Path('two.py').write_text(text)
    main_test(['two.py', CHECKPOINT, '--out', 'maps'])
    names = sorted(path.name for path in Path('maps').iterdir())
    assert names == ['0.bmp.png', '0.png', '1.png', '2.png', '3.png']


@pytest.mark.parametrize('task', ['mmseg'], indirect=True)
def test_label_maps(task, fails):
    text = Path('config.py').read_text()
    # Label maps written without annotations.
    bare = text.replace("dict(type='LoadAnnotations'),", '')
    Path('bare.py').write_text(bare)
    main_test(['bare.py', CHECKPOINT, '--out', 'bare'])
    assert len(list(Path('bare').iterdir())) == 4

    # More classes than 8 bits hold, in and out.
    many = text.replace('num_classes=2', 'num_classes=300, ignore_index=-100')
    many = many.replace("classes=('a', 'b'), palette=[[0, 0, 0], [255, 0, 0]]", 'classes=NAMES')
    many = many.replace("type='IoUMetric'", "type='IoUMetric', ignore_index=-100")
    many = many.replace('seg_pad_val=255', 'seg_pad_val=-100').replace('NAMES', 'list("x" * 300)')
    many = many.replace('list("x" * 300)', str([f'c{i}' for i in range(300)]))
    Path('many.py').write_text(many)
    wide = np.full((32, 32), 290, np.uint16)
    wide[0, 0] = 255
    for path in (task / 'maps').glob('*.png'):
        Image.fromarray(wide).save(path)
    seen = []

    def labels(self, runner, batch_idx, data_batch=None):
        seen.extend(
            sample.gt_sem_seg.data.unique().tolist() for sample in data_batch['data_samples']
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoggerHook, 'before_train_iter', labels)
        main_train(['many.py'])
    assert seen == [[255, 290]] * 4
    state = torch.load('work_dirs/many/iter_1.pth', weights_only=False)
    state['state_dict']['decode_head.conv_seg.bias'][290] = 1e6
    torch.save(state, 'biased.pth')
    main_test(['many.py', 'biased.pth', '--out', 'wide'])
    assert set(np.unique(np.asarray(Image.open('wide/0.png')))) == {290}
    line = fails(
        main_train, 'many.py', '--cfg-options', 'model.decode_head.ignore_index=255',
        'model.data_preprocessor.seg_pad_val=255',
    )  # fmt: skip
    assert 'ignore_index, 255, is the label of a class' in line
    assert 'label 290 of' in fails(main_train, 'config.py', '--cfg-options', 'resume=False')
    reduced = ['train_dataloader.dataset.reduce_zero_label=True']
    assert 'has the label 290; 255 is' in fails(main_train, 'config.py', '--cfg-options', *reduced)

    for i, path in enumerate(sorted((task / 'maps').glob('*.png'))):
        mask = np.zeros((32, 32), np.uint8)
        mask[:8] = 255 * (i % 2)
        Image.fromarray(mask).save(path)
    line = fails(main_train, 'config.py')
    assert 'hold [0, 255] only' in line
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(task / 'maps' / '1.png')
    assert 'a picture in colours' in fails(main_train, 'config.py')
