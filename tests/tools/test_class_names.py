"""Class names that do not agree: one line before anything is trained or tested."""

import json
import shutil
from pathlib import Path

import pytest
import task_configs

from mmvim.apis.inferencers import make_inferencer
from mmvim.cli.launcher import main_test, main_train
from mmvim.engine.class_names import difference, displacement


@pytest.fixture
def data(toy, request, monkeypatch):
    pytest.importorskip(request.param)
    work = toy / request.param
    work.mkdir()
    monkeypatch.chdir(work)
    return task_configs.write(work, request.param)


def test_lists():
    assert difference('abc', 'abc') is None
    assert difference('abc', 'abd') == "class 2 is 'c' and 'd'"
    assert difference('abc', 'ab') == 'there are 3 and 2 classes'
    assert displacement('abc', 'abd') is None
    assert displacement(['n1', 'n2'], ['tench', 'goldfish']) is None
    assert (
        displacement(['Big dog', 'cat'], ['cat', 'big_dog']) == "'Big dog' is class 0 and class 1"
    )
    assert displacement(['crane', 'x', 'crane'], ['crane', 'X', 'crane']) is None
    assert displacement('abc', 'acd') == "'c' is class 2 and class 1"


def detector(metainfo):
    """Write a config of other classes."""
    text = Path('config.py').read_text()
    old = "metainfo=dict(classes=('a', 'b'))"
    assert text.count(old) == 1
    Path('other.py').write_text(text.replace(old, metainfo))
    return 'other.py'


@pytest.mark.parametrize('data', ['mmdet'], indirect=True)
@pytest.mark.parametrize(
    ('metainfo', 'message'),
    [
        ("metainfo=dict(classes=('a'))", "not the string 'a': one class is ('a',), with a comma"),
        ("metainfo=dict(classes=('b', 'a'))", "is in another order than the categories of '"),
        ("metainfo=dict(classes=('a', 'bb'))", "the class 'bb' of metainfo.classes is none of"),
        ("metainfo=dict(classes=('a', 'b', 'c'))", "the class 'c' of metainfo.classes is none of"),
        ("metainfo=dict(classes=('a', 'b', 'a'))", "metainfo.classes has the name 'a' twice"),
        ('metainfo=dict(classes=dict(a=0, b=1))', "whose order numbers the classes, not {'a': 0"),
        (
            "metainfo=dict(CLASSES=('a', 'b'))",
            "metainfo.CLASSES is not read: its name is 'classes'",
        ),
        ('metainfo=dict()', "none of the categories of '"),
    ],
)
def test_annotation_file(data, fails, metainfo, message):
    line = fails(main_train, detector(metainfo))
    assert message in line
    assert 'no-checks' not in line
    if metainfo == 'metainfo=dict()':
        assert "(a, b) is among the data set's classes (person, bicycle" in line


@pytest.mark.parametrize('data', ['mmdet'], indirect=True)
def test_a_part_of_the_categories_in_their_order(data):
    one = ['--cfg-options', 'model.bbox_head.num_classes=1']
    assert main_train([detector("metainfo=dict(classes=('b', ))"), *one]).iter == 1


@pytest.mark.parametrize('data', ['mmdet'], indirect=True)
def test_evaluator_reads_another_file(data, fails, capsys):
    coco = json.loads((data / 'train.json').read_text())

    def evaluated_on(images, categories=coco['categories']):
        kept = {image['id'] for image in images}
        boxes = [box for box in coco['annotations'] if box['image_id'] in kept]
        content = {'images': images, 'annotations': boxes, 'categories': categories}
        (data / 'other.json').write_text(json.dumps(content))
        return ['config.py', '--cfg-options', f'val_evaluator.ann_file={data}/other.json']

    images = coco['images']
    renamed = [{**image, 'file_name': f'x{image["file_name"]}'} for image in images]
    for strange in (images[1:], renamed, [{**image, 'id': image['id'] + 7} for image in images]):
        line = fails(main_train, *evaluated_on(strange))
        assert 'val_evaluator (CocoMetric) and val_dataloader.dataset (CocoDataset) read' in line
    line = fails(main_train, *evaluated_on(images, coco['categories'][::-1]))
    assert 'is in another order than' in line
    more = [*images, {**images[0], 'id': 99, 'file_name': 'more.png'}]
    main_train(evaluated_on(more))
    assert 'has 4 of the 5 images' in ''.join(capsys.readouterr())


@pytest.mark.parametrize('data', ['mmpretrain'], indirect=True)
def test_folders(data, fails):
    for split, folders in (('train', 'abc'), ('val', 'acd')):
        for i, folder in enumerate(folders):
            (data / split / folder).mkdir(parents=True)
            shutil.copy(data / 'images' / f'{i}.png', data / split / folder / f'{i}.png')
    text = Path('config.py').read_text()
    text = text.replace("ann_file='train.txt', data_prefix='images',", "data_prefix='train',")
    text = text.replace("metainfo=dict(classes=('a', 'b')),", 'CLASSES')
    text = text.replace('num_classes=2', 'num_classes=3')
    Path('other.py').write_text(text.replace('CLASSES', ''))
    # The config's three loaders share their data set.
    assert main_train(['other.py']).iter == 1
    Path('third.py').write_text(
        "_base_ = 'other.py'\nval_dataloader = dict(dataset=dict(data_prefix='val'))\n"
    )
    line = fails(main_train, 'third.py')
    assert "have different classes: class 1 is 'b' and 'c'" in line
    Path('other.py').write_text(text.replace('CLASSES', "metainfo=dict(classes=('c', 'a', 'b')),"))
    line = fails(main_train, 'other.py')
    assert "'c' is class 0 and class 2" in line
    named = text.replace('CLASSES', "metainfo=dict(classes=('cat', 'dog', 'bird')),")
    Path('other.py').write_text(named)
    assert main_train(['other.py']).iter == 1


@pytest.mark.parametrize('data', ['mmpretrain'], indirect=True)
def test_counts_of_a_classifier(data, fails):
    def line(option):
        return fails(main_train, 'config.py', '--cfg-options', option)

    found = line('model.data_preprocessor.num_classes=1000')
    assert 'model.data_preprocessor.num_classes is 1000, but model.head.num_classes is 2' in found
    assert 'val_evaluator (Accuracy) has topk=(1, 5)' in line('val_evaluator.topk=(1,5)')
    several = "[dict(type='SingleLabelMetric',num_classes=3)]"
    assert 'val_evaluator (SingleLabelMetric).num_classes is 3' in line(f'val_evaluator={several}')
    assert 'model.head has topk=(1, 5)' in fails(
        main_train, 'config.py', '--cfg-options', 'model.head.cal_acc=True', 'model.head.topk=(1,5)'
    )


@pytest.mark.parametrize('data', ['mmpretrain', 'mmseg'], indirect=True)
def test_classes_of_losses(data, fails):
    def line(*options):
        return fails(main_train, 'config.py', '--cfg-options', *options)

    if Path.cwd().name == 'mmseg':
        found = line('model.decode_head.loss_decode.class_weight=[1.0,2.0,3.0]')
        assert 'model.decode_head.loss_decode.class_weight has 3 numbers, but' in found
        return
    smooth = "dict(type='LabelSmoothLoss',label_smooth_val=0.1,num_classes=1000)"
    assert 'model.head.loss.num_classes is 1000, but model.head.num_classes is 2' in line(
        f'model.head.loss={smooth}'
    )
    found = line("model.head.loss=dict(type='CrossEntropyLoss',class_weight=[1.0])")
    assert 'class_weight has 1 numbers, but model.head.num_classes is 2' in found
    mix = "model.train_cfg=dict(augments=[dict(type='Mixup',alpha=0.8)])"
    assert 'has no num_classes, which Mixup and CutMix need: 2' in line(mix)
    named = 'model.data_preprocessor.num_classes=2'
    assert main_train(['config.py', '--cfg-options', mix, named]).iter == 1


def test_difference_of_lists():
    assert difference(['a', 'b'], ['a', 'c']) == "class 1 is 'b' and 'c'"
    assert difference(['a'], ['a', 'b']) == 'there are 1 and 2 classes'
    assert difference(['a', 'b'], ['a']) == 'there are 2 and 1 classes'
    assert difference(['a'], ['a']) is None


@pytest.mark.parametrize('data', ['mmpretrain'], indirect=True)
def test_names_of_a_checkpoint_and_of_demos(data, fails):
    main_train(['config.py'])
    checkpoint = 'work_dirs/config/iter_1.pth'
    text = Path('config.py').read_text()
    Path('other.py').write_text(text.replace("classes=('a', 'b')", "classes=('b', 'a')"))
    line = fails(main_test, 'other.py', checkpoint)
    assert "trained on (a, b), and test_dataloader.dataset has (b, a): 'a' is class 0" in line
    line = fails(main_train, 'other.py', '--resume', checkpoint)
    assert 'trained on (a, b), and train_dataloader.dataset has (b, a)' in line
    Path('other.py').write_text(text.replace("classes=('a', 'b')", "classes=('Anna', 'Bert')"))
    assert main_test(['other.py', checkpoint])

    with pytest.raises(ValueError, match=r'as many names as model.head.num_classes, 2, not 1'):
        make_inferencer('config.py', checkpoint).__class__('config.py', checkpoint, classes=['a'])
    Path('other.py').write_text(text.replace('num_classes=2', 'num_classes=3'))
    inferencer = make_inferencer('other.py')
    best = next(inferencer.predict(str(data / 'images' / '0.png'))).prediction['classes'][0]
    assert best['class'] == str(best['label'])


@pytest.mark.parametrize('data', ['mmseg'], indirect=True)
def test_ignored_label(data, fails):
    def line(option):
        return fails(main_train, 'config.py', '--cfg-options', option)

    found = line('val_evaluator.ignore_index=0')
    assert 'has ignore_index=0, but model.decode_head.ignore_index is 255' in found
    found = line('model.data_preprocessor.seg_pad_val=0')
    assert 'seg_pad_val is 0, but model.decode_head.ignore_index is 255' in found
    main_train(['config.py'])
    options = ('--cfg-options', 'test_evaluator.ignore_index=0')
    for more in ((), ('--tta',)):
        found = fails(main_test, 'config.py', 'work_dirs/config/iter_1.pth', *more, *options)
        assert 'has ignore_index=0, but model.decode_head.ignore_index is 255' in found


@pytest.mark.parametrize('data', ['mmdet'], indirect=True)
def test_strides(data, fails):
    """The pyramid's strides are those of the anchors, or nothing is trained."""
    text = Path('config.py').read_text().replace('strides=[16]', 'strides=[8, 16, 32, 64, 128]')
    neck = "neck=dict(type='mmvim.SimpleFPN', in_channels=8, out_channels=8, num_outs=5, MORE),"
    text = text.replace('    bbox_head=dict(\n', f'    {neck}\n    bbox_head=dict(\n')
    # Enough pixels for five strides to differ.
    text = text.replace('img_size=32', 'img_size=256').replace('(32, 32)', '(256, 256)')
    Path('wrong.py').write_text(text.replace('MORE', ''))
    line = fails(main_train, 'wrong.py')
    assert 'model.bbox_head (RetinaHead) is made for maps of the strides 8, 16, 32, 64, 128' in line
    assert 'gets maps of the strides 4, 8, 16, 32, 64' in line
    Path('right.py').write_text(text.replace('MORE', 'start_level=1'))
    assert main_train(['right.py']).iter == 1
    other = Path('right.py').read_text().replace('[8, 16, 32, 64, 128]', '[4, 8, 16, 32, 64]')
    Path('wrong.py').write_text(other)
    line = fails(main_test, 'wrong.py', 'work_dirs/right/iter_1.pth')
    assert 'made for maps of the strides 4, 8, 16, 32, 64, and gets maps of the strides 8' in line


@pytest.mark.parametrize('data', ['mmpretrain'], indirect=True)
def test_averages_of_a_short_run(data, capsys, fails):
    hook = "custom_hooks=[dict(type='EMAHook',momentum={},evaluate_on_origin=True)]"
    steps, distance = ['train_cfg.max_iters=20', 'optim_wrapper.optimizer.lr=1.0'], {}
    for warmup in ('None', 'False'):
        option = hook.format('4e-5').replace('momentum', f'warmup={warmup},momentum')
        runner = main_train(['config.py', '--cfg-options', *steps, option])
        assert ('100% of the averages' in ''.join(capsys.readouterr())) == (warmup == 'None')
        average = next(h.ema_model for h in runner.hooks if hasattr(h, 'ema_model'))
        pairs = zip(runner.model.parameters(), average.module.parameters(), strict=True)
        distance[warmup] = sum(float((a - b).detach().norm()) for a, b in pairs)
    assert distance['None'] < distance['False'] / 2
    main_train(['config.py', '--cfg-options', hook.format('0.98')])
    assert 'of the averages' not in ''.join(capsys.readouterr())
    metric = "val_evaluator=[dict(type='SingleLabelMetric',average=None)]"
    line = fails(main_train, 'config.py', '--cfg-options', hook.format('0.9'), metric)
    assert 'cannot record the results of each class' in line


@pytest.mark.parametrize('data', ['mmpretrain'], indirect=True)
def test_settings_for_a_million_pictures(data, fails, capsys):
    full = ['--cfg-options', 'train_dataloader.drop_last=True', 'train_dataloader.batch_size=16']
    Path('epochs.py').write_text(
        "_base_ = 'config.py'\ntrain_cfg = dict(_delete_=True, by_epoch=True, max_epochs=1)\n"
    )
    for config in ('config.py', 'epochs.py'):
        line = fails(main_train, config, *full)
        assert 'train_dataloader has no batch: it has 4 samples, batch_size is 16, and' in line
    assert main_train(['config.py', *full, 'train_dataloader.sampler.type=InfiniteSampler']).iter
    full = ['val_dataloader.drop_last=True', 'val_dataloader.batch_size=5']
    assert 'val_dataloader has no batch' in fails(main_train, 'config.py', '--cfg-options', *full)
    capsys.readouterr()
    main_train(['config.py', '--cfg-options', 'train_dataloader.sampler.type=RepeatAugSampler'])
    assert 'epoch has a random 33 % of the images' in ''.join(capsys.readouterr())


@pytest.mark.parametrize('data', ['mmpretrain'], indirect=True)
def test_keys_of_a_base(data, fails):
    Path('base.py').write_text(
        Path('config.py').read_text().replace("type='CustomDataset',", "type='ImageNet', split='',")
    )
    for change, key in (
        ("train_dataloader = dict(dataset=dict(type='CustomDataset'))", 'split'),
        ("model = dict(backbone=dict(type='mmvim.VMamba'))", 'img_size'),
    ):
        Path('own.py').write_text(f"_base_ = 'base.py'\n{change}\n")
        line = fails(main_train, 'own.py')
        assert f"has no argument '{key}'" in line
        assert f"'{key}' comes from a base config: _delete_=True in the dict keeps" in line
    wrong = ['--cfg-options', 'model.backbone.splt=1']
    assert 'comes from a base' not in fails(main_train, 'config.py', *wrong)
    Path('own.py').write_text("_base_ = 'base.py'\nval_cfg = dict(type=dict(a=1))\nwork_dir = {}\n")
    Path('more.py').write_text("_base_ = 'own.py'\ndefault_scope = dict(a=1)\n")
    for main, *more in ((main_train,), (main_test, 'x.pth')):
        line = fails(main, 'more.py', *more)
        assert "the config file 'more.py' cannot be read: TypeError: default_scope=" in line


@pytest.mark.parametrize('data', ['mmpretrain'], indirect=True)
def test_parts_of_a_data_set_are_no_classes(data, fails):
    for split in ('train', 'val'):
        (data / 'pictures' / split / 'a').mkdir(parents=True)
        shutil.copy(data / 'images' / '0.png', data / 'pictures' / split / 'a' / '0.png')
    text = Path('config.py').read_text().replace("metainfo=dict(classes=('a', 'b')),", '')
    whole = "ann_file='train.txt', data_prefix='images'"
    Path('config.py').write_text(text.replace(whole, "data_prefix='pictures'"))
    line = fails(main_train, 'config.py')
    assert 'would take the folders (train, val) of' in line
    assert "such as data_prefix='train'" in line


@pytest.mark.parametrize('data', ['mmdet'], indirect=True)
def test_annotations_that_cannot_be_evaluated(data, fails):
    coco = json.loads((data / 'train.json').read_text())
    del coco['annotations'][2]['iscrowd']
    (data / 'train.json').write_text(json.dumps(coco))
    line = fails(main_train, 'config.py')
    assert (
        'val_evaluator (CocoMetric) needs iscrowd of each annotation, and annotation 3 of' in line
    )


@pytest.mark.parametrize('data', ['mmdet'], indirect=True)
def test_categories_that_a_file_numbers_otherwise(data, fails):
    coco = json.loads((data / 'train.json').read_text())
    for box in coco['annotations']:
        box['category_id'] -= 1
    (data / 'train.json').write_text(json.dumps(coco))
    line = fails(main_train, 'config.py')
    assert "train.json' has the category_id 0, and the categories there are numbered (1, 2)" in line
    coco['categories'].append(dict(id=0, name='a'))
    (data / 'train.json').write_text(json.dumps(coco))
    assert "train.json' has categories of the name 'a' twice" in fails(main_train, 'config.py')
    coco['images'][1]['id'] = 0
    (data / 'train.json').write_text(json.dumps(coco | dict(categories=coco['categories'][:2])))
    assert "train.json' has 4 images and 3 different ids" in fails(main_train, 'config.py')


@pytest.mark.parametrize('data', ['mmdet'], indirect=True)
def test_what_a_metric_cannot_do(data, fails, capsys):
    def line(option):
        return fails(main_train, 'config.py', '--cfg-options', option)

    assert 'and model (SingleStageDetector) predicts no masks' in line('val_evaluator.metric=segm')
    assert "(CocoMetric): metric should be one of 'bbox'" in line('val_evaluator.metric=mAP')
    coco = json.loads((data / 'train.json').read_text())
    coco['annotations'][2]['id'] = 0
    (data / 'train.json').write_text(json.dumps(coco))
    main_train(['config.py'])
    assert 'has an annotation of the id 0, which val_evaluator' in ''.join(capsys.readouterr())


@pytest.mark.parametrize('data', ['mmdet', 'mmpretrain'], indirect=True)
def test_flags_that_do_not_fit(data, fails):
    Path('x.pth').write_bytes(b'x')
    mask = ['--cfg-options', "model.roi_head=dict(mask_head=dict(type='FCNMaskHead'))"]
    if Path.cwd().name == 'mmdet':
        line = fails(main_test, 'config.py', 'x.pth', '--tta', '--no-checks', *mask)
        assert '--tta merges boxes, and the model predicts masks too' in line
    else:
        text = Path('config.py').read_text()
        Path('video.py').write_text(text.replace("'LoadImageFromFile'", "'mmvim.LoadVideo'"))
        line = fails(main_test, 'video.py', 'x.pth', '--show-dir', 'shown')
        assert 'the test pipeline reads videos: tools/demo/video_demo.py' in line


@pytest.mark.parametrize('data', ['mmpretrain'], indirect=True)
def test_tta_of_several_data_sets(data):
    main_train(['config.py'])
    text = Path('config.py').read_text()
    text += "test_dataloader = dict(batch_size=4, dataset=dict(type='ConcatDataset', datasets=["
    Path('several.py').write_text(f'{text}dataset, dict(**dataset)]), **loop)\n')
    assert main_test(['several.py', 'work_dirs/config/iter_1.pth', '--tta'])
