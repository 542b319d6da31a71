"""Data that a run cannot use, or can use only in part: one line, or the run goes on."""

import json
from pathlib import Path

import pytest
import task_configs
import torch

from mmvim.cli.diagnosis import explain
from mmvim.cli.launcher import main_test, main_train
from mmvim.engine.hooks import data_check
from mmvim.errors import UserError


@pytest.fixture
def data(toy, request, monkeypatch):
    pytest.importorskip(request.param)
    work = toy / request.param
    work.mkdir()
    monkeypatch.chdir(work)
    return task_configs.write(work, request.param)


def of(task):
    return pytest.mark.parametrize('data', [task], indirect=True)


@of('mmdet')
def test_no_detection_beside_a_second_metric(data):
    Path('two.py').write_text(
        "_base_ = 'config.py'\n"
        'model = dict(test_cfg=dict(score_thr=1.1))\n'
        "val_evaluator = [_base_.val_evaluator, dict(type='VOCMetric')]\n"
        "default_hooks = dict(checkpoint=dict(save_best='coco/bbox_mAP'))\n"
        "param_scheduler = dict(type='ReduceOnPlateauLR', monitor='coco/bbox_mAP', rule='greater')"
    )
    runner = main_train(['two.py'])
    assert runner.message_hub.get_scalar('val/coco/bbox_mAP').current() == 0
    assert list(Path('work_dirs/two').glob('best_coco_bbox_mAP*'))


@of('mmdet')
def test_no_process_is_forked_for_an_evaluation(data, monkeypatch):
    """Of the threads that a training has by then, one may hold a lock that the child waits for."""
    monkeypatch.setattr('os.fork', lambda: pytest.fail('forked'))
    option = "val_evaluator=dict(_delete_=True, type='VOCMetric')"
    runner = main_train(['config.py', '--cfg-options', option])
    assert 0 <= runner.message_hub.get_scalar('val/pascal_voc/mAP').current() <= 1


@of('mmpretrain')
def test_a_metric_without_result(data, monkeypatch, capsys):
    from mmpretrain.evaluation import SingleLabelMetric

    monkeypatch.setattr(SingleLabelMetric, 'compute_metrics', lambda self, results: {})
    metrics = "val_evaluator=[dict(type='SingleLabelMetric'),dict(type='Accuracy')]"
    for best in ('auto', 'single-label/precision'):
        option = f'default_hooks.checkpoint.save_best={best}'
        assert main_train(['config.py', '--cfg-options', metrics, option]).iter == 1
        said = ''.join(capsys.readouterr())
        assert 'The metric single-label has no result this time: no checkpoint is saved' in said
    assert not list(Path('work_dirs/config').glob('best*'))


@of('mmdet')
@pytest.mark.parametrize('keys', ["'img_id', 'ori_shape'", "'img_id', 'img_shape', 'ori_shape'"])
def test_what_a_detector_needs_of_a_sample(data, fails, keys):
    Path('other.py').write_text(
        f"_base_ = 'config.py'\npack = dict(type='PackDetInputs', meta_keys=({keys}))\n"
        "load = dict(type='LoadImageFromFile')\n"
        'val_dataloader = dict(dataset=dict(pipeline=[load, pack]))\n'
        'test_dataloader = val_dataloader\n'
    )
    Path('x.pth').write_bytes(b'x')
    for line in (fails(main_train, 'other.py'), fails(main_test, 'other.py', 'x.pth')):
        assert '_dataloader.dataset.pipeline gives no ' in line
        assert 'scale_factor' in line


@of('mmpretrain')
def test_images_without_labels(data, fails, tmp_path):
    main_train(['config.py'])
    (data / 'test.txt').write_text('0.png\n1.png\n')
    test_set = "test_dataloader=dict(dataset=dict(ann_file='test.txt',with_label=False))"
    arguments = ['config.py', 'work_dirs/config/iter_1.pth']
    line = fails(main_test, *arguments, '--cfg-options', test_set)
    assert 'test_dataloader.dataset has no labels, with which Accuracy compares' in line
    out = tmp_path / 'out.pkl'
    assert main_test([*arguments, '--out', str(out), '--cfg-options', test_set]) == {}
    assert out.stat().st_size


@of('mmseg')
def test_images_without_maps(data, fails, tmp_path):
    main_train(['config.py'])
    steps = "[dict(type='LoadImageFromFile'),dict(type='PackSegInputs')]"
    folders = "data_prefix=dict(_delete_=True, img_path='images')"
    for name, change in (('step', f'pipeline={steps}'), ('folder', folders)):
        Path(f'{name}.py').write_text(
            f"_base_ = 'config.py'\ntest_dataloader = dict(dataset=dict({change}))\n"
        )
        arguments = [f'{name}.py', 'work_dirs/config/iter_1.pth']
        assert main_test([*arguments, '--out', str(tmp_path / name)]) == {}
        assert len(list((tmp_path / name).iterdir())) == 4
    line = fails(main_test, 'step.py', 'work_dirs/config/iter_1.pth')
    assert 'test_dataloader.dataset has no labels, with which IoUMetric compares' in line


@of('mmdet')
def test_annotation_files_without_boxes(data, fails):
    coco = json.loads((data / 'train.json').read_text())
    option = ['--cfg-options', 'train_dataloader.dataset.dataset.ann_file=other.json']
    (data / 'other.json').write_text(json.dumps({**coco, 'annotations': []}))
    line = fails(main_train, 'config.py', *option)
    assert 'has no box: its annotations name none of its images' in line
    (data / 'other.json').write_text('')
    assert "other.json': the file is empty" in fails(main_train, 'config.py', *option)


@of('mmdet')
def test_misspelt_class_of_xml_files(data, fails):
    for folder in ('Annotations', 'JPEGImages', 'ImageSets'):
        (data / 'voc' / folder).mkdir(parents=True)
    for i, name in enumerate('ab'):
        (data / 'images' / f'{i}.png').rename(data / 'voc' / 'JPEGImages' / f'{i}.jpg')
        box = '<bndbox><xmin>8</xmin><ymin>8</ymin><xmax>24</xmax><ymax>24</ymax></bndbox>'
        (data / 'voc' / 'Annotations' / f'{i}.xml').write_text(
            '<annotation><size><width>32</width><height>32</height></size>'
            f'<object><name>class {name}</name><difficult>0</difficult>{box}</object></annotation>'
        )
    (data / 'voc' / 'ImageSets' / 'train.txt').write_text('0\n1\n')
    template = (
        "_base_ = 'config.py'\ntrain_dataloader = dict(dataset=dict(dataset=dict(_delete_=True, "
        "type='XMLDataset', data_root={root!r}, ann_file='ImageSets/train.txt', "
        "data_prefix=dict(sub_data_root=''), metainfo=dict(classes={classes}), "
        'pipeline=_base_.pipeline)))\nval_cfg = val_dataloader = val_evaluator = None\n'
    )
    for classes, message in (
        (('class a', 'class b'), None),
        (
            ('class a', 'clas b'),
            "the class 'clas b' of metainfo.classes is in no annotation, whose",
        ),
        (('cat', 'dog'), 'has no box: its annotations name none of its images'),
    ):
        Path('voc.py').write_text(template.format(root=str(data / 'voc'), classes=classes))
        if message is None:
            assert main_train(['voc.py']).iter == 1
        else:
            assert message in fails(main_train, 'voc.py')


@of('mmpretrain')
@pytest.mark.parametrize('line', ['0.png a', '0.png,0', '0.png\t0', '0.png', 'path label'])
def test_lists_of_images(data, fails, line):
    (data / 'train.txt').write_text(f'1.png 1\n{line}\n')
    said = fails(main_train, 'config.py')
    assert f"train.txt': line 2 is {line!r}, and each must be a path, a space and the" in said


@of('mmpretrain')
@pytest.mark.parametrize('line', ['9.png 0', '"0.png" 0', '0.png  0', 'images/0.png 1'])
def test_listed_images_that_do_not_exist(data, fails, line):
    (data / 'other.txt').write_text(f'0.png 0\n1.png 1\n{line}\n')
    option = ['--cfg-options', 'val_dataloader.dataset.ann_file=other.txt']
    said = fails(main_train, 'config.py', *option)
    assert 'error: val_dataloader.dataset (CustomDataset): ' in said
    assert said.endswith('does not exist')
    assert not list(Path('work_dirs').glob('*/*.pth'))


@of('mmpretrain')
def test_absent_images_are_looked_for_in_long_lists(data):
    from mmpretrain.datasets import CustomDataset

    names = [f'{i % 4}.png 0' for i in range(50)] + ['8.png 0', '9.png 0'] * 50
    (data / 'other.txt').write_text('\n'.join(names))

    def check(*steps, **options):
        dataset = CustomDataset(
            str(data), 'images', 'other.txt', pipeline=[*steps, dict(type='PackInputs')]
        )
        data_check._check_files(dataset, 'train_dataloader.dataset', **options)

    load = dict(type='LoadImageFromFile')
    with pytest.raises(UserError, match=r'8.png. does not exist, like 99 other files; in mmvim'):
        check(load)
    with pytest.raises(UserError, match=r'like 9 other files of 15 that were looked at'):
        check(load, most=15)
    # Remote storage, and loaders that go on without a file.
    check(dict(load, ignore_empty=True))
    check(dict(load, backend_args=dict(backend='local')))


@of('mmseg')
def test_label_maps_that_do_not_exist(data, fails):
    (data / 'maps' / '2.png').unlink()
    said = fails(main_train, 'config.py')
    assert "maps/2.png' does not exist; in mmvim.SkipFailures it is left out" in said
    Path('skip.py').write_text(
        "_base_ = 'config.py'\ntrain_dataloader = dict(dataset=dict(_delete_=True, "
        "type='mmvim.SkipFailures', dataset=_base_.dataset))\n"
        'val_cfg = val_dataloader = val_evaluator = None\n'
    )
    assert main_train(['skip.py']).iter == 1


@of('mmseg')
def test_segmentation_of_two_classes(data, fails, capsys, recwarn):
    main_train(['config.py'])
    assert not [w for w in recwarn if 'binary segmentation' in str(w.message)]

    def line(option):
        return fails(main_train, 'config.py', '--cfg-options', option)

    one = 'model.decode_head.out_channels=1'
    assert 'model.decode_head has out_channels=1, for which its loss_decode (Cross' in line(one)
    sigmoid = 'model.decode_head.loss_decode.use_sigmoid=True'
    assert main_train(['config.py', '--cfg-options', one, sigmoid]).iter == 1
    said = line('val_dataloader.dataset.img_suffix=.jpg')
    assert "data/images' has no file that ends with img_suffix, '.jpg'" in said


@of('mmpretrain')
def test_a_listed_video_that_does_not_exist(data, fails):
    (data / 'empty.mp4').touch()
    (data / 'train.txt').write_text('0.mp4 0\n1.mp4 1\n')
    steps = "[dict(type='mmvim.LoadVideo',num_frames=2),dict(type='mmvim.PackVideo')]"
    kind = "_delete_=True, type='mmvim.VideoDataset', ann_file='train.txt'"
    kind += ", metainfo=dict(classes=('a', 'b'))"
    Path('video.py').write_text(
        f"_base_ = 'config.py'\n"
        f'dataset = dict({kind}, data_root={str(data)!r}, pipeline={steps})\n'
        'train_dataloader = val_dataloader = test_dataloader = dict(dataset=dataset)\n'
    )
    line = fails(main_train, 'video.py')
    assert "train_dataloader.dataset (VideoDataset): '" in line
    assert "0.mp4' does not exist, like 1 other files" in line
    (data / 'train.txt').write_text('empty.mp4 0\n')
    assert "empty.mp4' is empty; in mmvim" in fails(main_train, 'video.py')


@pytest.mark.parametrize('data', ['mmpretrain', 'mmseg'], indirect=True)
def test_labels_of_the_evaluation(data, fails):
    """Labels that count from 1 in the validation alone."""
    import numpy as np
    from PIL import Image

    if Path.cwd().name == 'mmpretrain':
        (data / 'other.txt').write_text('0.png 1\n1.png 2\n')
        change = "ann_file='other.txt'"
    else:
        (data / 'other').mkdir()
        for i in range(4):
            labels = np.asarray(Image.open(data / 'maps' / f'{i}.png')) + 1
            Image.fromarray(labels).save(data / 'other' / f'{i}.png')
        change = "data_prefix=dict(seg_map_path='other')"
    Path('other.py').write_text(
        f"_base_ = 'config.py'\nval_dataloader = dict(dataset=dict({change}))\n"
        'test_dataloader = val_dataloader\n'
    )
    for line in (
        fails(main_train, 'other.py'),
        fails(main_test, 'other.py', 'work_dirs/other/iter_1.pth'),
    ):
        assert 'error: label 2 of ' in line
        assert 'head.num_classes = 2; allowed: 0 to 1' in line


def test_parameters_without_gradient(tmp_path):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1
    )
    try:
        model = torch.nn.ModuleDict({'used': torch.nn.Linear(2, 2), 'norm': torch.nn.LayerNorm(2)})
        model['norm'].requires_grad_(True)
        model.forward = lambda x: model['used'](x)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped(torch.ones(1, 2)).sum().backward()
        with pytest.raises(RuntimeError) as error:
            wrapped(torch.ones(1, 2))
        line = explain(error.value)
    finally:
        torch.distributed.destroy_process_group()
    assert line.startswith('2 parameters get no gradient, those of (norm), and distributed')
    assert 'out_indices' in line
