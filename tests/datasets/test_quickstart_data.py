"""The quickstart data: honest splits, right annotations, real formats, whole or not at all."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('sklearn')
pytest.importorskip('skimage')

from PIL import Image

from mmvim.datasets import quickstart
from mmvim.datasets.quickstart import (
    DIGIT_CLASSES,
    PHOTOS,
    SEG_CLASSES,
    SEG_PALETTE,
    QuickstartDataError,
    SceneGenerator,
    build,
    errors,
    load_digits,
    prepare,
    writers,
)

SIZES = {'train': 12, 'val': 4, 'test': 5}


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('quickstart')
    for task in quickstart.TASKS:
        assert prepare(task, out, sizes=SIZES)
    return out


@pytest.fixture(scope='module')
def scenes() -> dict[str, list[quickstart.Scene]]:
    return {
        split: [generate(i) for i in range(SIZES[split])]
        for split, generate in ((s, SceneGenerator(s)) for s in SIZES)
    }


def test_digits_are_split_once_and_by_class():
    splits = load_digits()
    assert {k: len(v.labels) for k, v in splits.items()} == quickstart.SPLIT_SIZES
    indices = np.concatenate([v.indices for v in splits.values()])
    assert sorted(indices) == list(range(1797))
    for split in splits.values():
        share = np.bincount(split.labels, minlength=10) / len(split.labels)
        assert share.min() > 0.08
        assert share.max() < 0.12
        assert split.images.min() == 0
        assert split.images.max() == 1
    np.testing.assert_array_equal(splits['test'].indices, load_digits()['test'].indices)


def test_photographs_are_held_out():
    names = [name for split in PHOTOS.values() for name in split]
    assert len(names) == len(set(names))


def test_scenes_use_only_their_splits_digits_and_photographs(scenes):
    digits = load_digits()
    sources = {}
    for split, made in scenes.items():
        assert {scene.photo for scene in made} <= set(PHOTOS[split])
        sources[split] = {d.source for scene in made for d in scene.digits}
        assert sources[split] <= set(digits[split].indices)
    assert not sources['train'] & (sources['val'] | sources['test'])


def test_scenes_are_deterministic_and_independent_of_order(scenes):
    generate = SceneGenerator('test')
    for index in (3, 0):
        scene = generate(index)
        np.testing.assert_array_equal(scene.image, scenes['test'][index].image)
        assert [d.box for d in scene.digits] == [d.box for d in scenes['test'][index].digits]
    assert (generate(0).image != SceneGenerator('test', seed=1)(0).image).any()


def test_boxes_enclose_the_drawn_digits(scenes):
    labels = {split: load_digits()[split] for split in scenes}
    heights = []
    for split, made in scenes.items():
        by_source = dict(zip(labels[split].indices, labels[split].labels, strict=True))
        for scene in made:
            assert 1 <= len(scene.digits) <= 7
            covered = np.zeros(scene.alpha.shape, bool)
            for digit in scene.digits:
                x1, y1, x2, y2 = digit.box
                assert 0 <= x1 < x2 <= 128
                assert 0 <= y1 < y2 <= 128
                assert digit.label == by_source[digit.source]
                window = scene.alpha[y1:y2, x1:x2]
                np.testing.assert_array_equal(window, digit.alpha)
                ink = window >= 0.5
                assert ink.any(0)[[0, -1]].all()
                assert ink.any(1)[[0, -1]].all()
                assert set(scene.labels[y1:y2, x1:x2][ink]) == {digit.label}
                assert not covered[y1:y2, x1:x2].any()
                covered[y1:y2, x1:x2] = True
                heights.append(y2 - y1)
            assert not (scene.alpha >= 0.5)[~covered].any()
    assert max(heights) > 1.5 * min(heights)


def test_digits_contrast_with_the_photograph(scenes):
    for scene in scenes['test']:
        grey = scene.image.mean(-1)
        for digit in scene.digits:
            x1, y1, x2, y2 = digit.box
            ink = digit.alpha >= 0.99
            around = digit.alpha == 0
            window = grey[y1:y2, x1:x2]
            assert abs(window[ink].mean() - np.median(window[around])) > 25


def test_unknown_split():
    with pytest.raises(ValueError, match="'training'"):
        SceneGenerator('training')


def test_mmpretrain_loads_the_class_folders(root):
    mmpretrain = pytest.importorskip('mmpretrain.datasets')
    total = 0
    for split, size in SIZES.items():
        data = mmpretrain.CustomDataset(
            data_root=str(root / 'cls'), data_prefix=split, metainfo={'classes': DIGIT_CLASSES}
        )
        assert len(data) == size
        digits = load_digits()[split]
        labels = dict(zip(digits.indices, digits.labels, strict=True))
        for i in range(size):
            info = data.get_data_info(i)
            assert info['gt_label'] == labels[int(Path(info['img_path']).stem)]
        total += size
    image = Image.open(info['img_path'])
    assert image.size == (32, 32)
    assert image.mode == 'L'
    assert total == sum(SIZES.values())


def test_mmdet_loads_the_coco_tree(root, scenes):
    datasets = pytest.importorskip('mmdet.datasets')
    for split, size in SIZES.items():
        data = datasets.CocoDataset(
            data_root=str(root / 'det'),
            ann_file=f'annotations/instances_{split}.json',
            data_prefix={'img': f'{split}/'},
            metainfo={'classes': DIGIT_CLASSES},
            test_mode=True,
            pipeline=[],
        )
        assert len(data) == size
        for i in range(size):
            info = data.get_data_info(i)
            scene = scenes[split][i]
            found = [(x['bbox_label'], tuple(x['bbox'])) for x in info['instances']]
            assert found == [(d.label, d.box) for d in scene.digits]
            picture = np.asarray(Image.open(info['img_path']), int)
            assert np.abs(picture - scene.image).mean() < 5


def test_coco_polygons_are_the_digits(root, scenes):
    coco = pytest.importorskip('pycocotools.coco')
    data = coco.COCO(str(root / 'det' / 'annotations' / 'instances_train.json'))
    for scene, image_id in zip(scenes['train'], sorted(data.imgs), strict=True):
        annotations = data.imgToAnns[image_id]
        for digit, annotation in zip(scene.digits, annotations, strict=True):
            x1, y1, x2, y2 = digit.box
            drawn = np.zeros((128, 128), bool)
            drawn[y1:y2, x1:x2] = digit.alpha >= 0.5
            assert annotation['area'] == drawn.sum()
            mask = data.annToMask(annotation).astype(bool)
            # Polygons have no holes, so the ink must lie inside and open digits must agree.
            assert (mask & drawn).sum() > 0.85 * drawn.sum()
            if digit.label in (1, 2, 3, 5, 7):
                assert (mask & drawn).sum() > 0.75 * (mask | drawn).sum()


def test_mmseg_loads_the_ade_tree(root, scenes):
    datasets = pytest.importorskip('mmseg.datasets')
    for split, size in SIZES.items():
        folder = writers.ADE_FOLDERS[split]
        data = datasets.BaseSegDataset(
            data_root=str(root / 'seg'),
            data_prefix={
                'img_path': f'images/{folder}',
                'seg_map_path': f'annotations/{folder}',
            },
            metainfo={'classes': SEG_CLASSES, 'palette': SEG_PALETTE},
            img_suffix='.jpg',
            seg_map_suffix='.png',
            reduce_zero_label=True,
            pipeline=[
                {'type': 'mmseg.LoadImageFromFile'},
                {'type': 'mmseg.LoadAnnotations', 'reduce_zero_label': True},
            ],
        )
        assert len(data) == size
        for i in range(size):
            item = data[i]
            scene = scenes[split][i]
            truth = item['gt_seg_map']
            assert item['img'].shape == (128, 128, 3)
            rim = (scene.alpha > 0) & (scene.alpha < 0.75)
            assert (truth[rim] == 255).all()
            assert (truth[scene.alpha == 0] == 0).all()
            ink = scene.alpha >= 0.75
            np.testing.assert_array_equal(truth[ink], scene.labels[ink] + 1)


def test_palette_and_classes_fit():
    assert len(SEG_CLASSES) == len(SEG_PALETTE) == 11
    assert len(set(SEG_PALETTE)) == 11


def test_complete_data_is_left_alone_and_incomplete_data_made_again(tmp_path):
    sizes = {'train': 2, 'val': 1, 'test': 1}
    assert prepare('det', tmp_path, sizes=sizes)
    first = tmp_path / 'det' / 'train' / '000000000001.jpg'
    before = first.read_bytes()
    first.write_bytes(b'touched')
    assert not prepare('det', tmp_path, sizes=sizes)
    assert prepare('det', tmp_path, sizes=sizes, force=True)
    assert first.read_bytes() == before
    first.unlink()
    assert prepare('det', tmp_path, sizes=sizes)
    assert first.read_bytes() == before
    assert prepare('det', tmp_path, sizes={**sizes, 'train': 3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['det']


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare('cls', tmp_path, sizes=SIZES, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_progress_reaches_the_end(tmp_path):
    for task in quickstart.TASKS:
        seen = []
        prepare(task, tmp_path, sizes=SIZES, progress=lambda *x, seen=seen: seen.append(x))
        total = seen[-1][1]
        assert seen == [(i, total) for i in range(seen[0][0], total + 1, seen[0][0])]
        manifest = json.loads((tmp_path / task / 'manifest.json').read_text())
        assert manifest['files'] == total


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / 'cls').mkdir()
    (tmp_path / 'cls' / 'mine.txt').write_text('mine')
    with pytest.raises(QuickstartDataError, match='is no quickstart data'):
        prepare('cls', tmp_path, sizes=SIZES)
    assert (tmp_path / 'cls' / 'mine.txt').read_text() == 'mine'


@pytest.mark.parametrize(
    ('code', 'hint'),
    [
        (errno.ENOSPC, 'disk is full'),
        (errno.EROFS, 'cannot be written'),
        (errno.EIO, 'left behind'),
    ],
)
def test_write_errors_say_what_to_do(tmp_path, monkeypatch, code, hint):
    def fail(*args):
        raise OSError(code, 'no')

    monkeypatch.setitem(build._WRITERS, 'cls', fail)
    with pytest.raises(QuickstartDataError, match=hint):
        prepare('cls', tmp_path)
    assert not list(tmp_path.iterdir())


def test_too_little_space(tmp_path, monkeypatch):
    monkeypatch.setitem(build._NEEDED_MIB, 'cls', 10**9)
    with pytest.raises(QuickstartDataError, match='MiB free'):
        prepare('cls', tmp_path)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(QuickstartDataError, match='in the way'):
        prepare('cls', tmp_path / 'file', sizes=SIZES)


@pytest.mark.parametrize(
    'sizes', [{'train': 1}, {'train': 1, 'val': 1, 'test': 0}, {'train': 1258, 'val': 1, 'test': 1}]
)
def test_bad_sizes(tmp_path, sizes):
    with pytest.raises(ValueError, match='sizes'):
        prepare('cls', tmp_path, sizes=sizes)


def test_unknown_task(tmp_path):
    with pytest.raises(ValueError, match="'pose'"):
        prepare('pose', tmp_path)


def test_a_missing_package_names_the_extra():
    with pytest.raises(QuickstartDataError, match=r'mmvim\[quickstart\]'):
        errors.require('no_such_module_here')


def test_import_needs_no_optional_package():
    code = (
        'import sys\n'
        'for name in ("sklearn", "skimage", "PIL", "scipy"):\n'
        '    sys.modules[name] = None\n'
        'import mmvim.datasets.quickstart as q\n'
        'try:\n'
        '    q.prepare("cls", "unused")\n'
        'except q.QuickstartDataError as error:\n'
        '    print(error)\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert 'needs pillow' in done.stdout
