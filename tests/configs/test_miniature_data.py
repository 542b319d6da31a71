"""The miniatures are laid out like the real data sets."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from config_harness import REPO, load_script
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

SCRIPT = 'tools/misc/make_miniature_data.py'
script = load_script(SCRIPT)


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()}


@pytest.mark.parametrize('name', script.DATASETS)
def test_same_arguments_same_bytes(name, tmp_path):
    make, _ = script.DATASETS[name]
    a, b, other = (
        make(tmp_path / which, 3, 1, long_side=64, seed=seed)
        for which, seed in (('a', 0), ('b', 0), ('c', 1))
    )
    assert files(a) == files(b)
    assert files(a) != files(other)


@pytest.mark.parametrize('flat_val', [False, True])
@pytest.mark.parametrize('with_meta', [False, True])
def test_imagenet_loads(flat_val, with_meta, tmp_path):
    import mmpretrain.datasets  # noqa: F401

    if flat_val and not with_meta:
        pytest.skip('a flat folder has no labels but those of the list')
    root = script.make_imagenet(tmp_path / 'imagenet', 8, 4, long_side=48, flat_val=flat_val)
    if not with_meta:
        for path in (root / 'meta').iterdir():
            path.unlink()
    init_default_scope('mmpretrain')
    for split, count in (('train', 8), ('val', 4)):
        dataset = DATASETS.build(dict(type='ImageNet', data_root=str(root), split=split))
        assert len(dataset) == count
        wnids = script.imagenet_wnids()
        for index in range(count):
            sample = dataset.get_data_info(index)
            assert Path(sample['img_path']).is_file()
            assert sample['gt_label'] == index * 1000 // count
            folder = Path(sample['img_path']).parent.name
            assert (
                folder == 'val'
                if flat_val and split == 'val'
                else folder == wnids[sample['gt_label']]
            )


def test_wnids_are_those_of_ilsvrc():
    wnids = script.imagenet_wnids()
    assert len(set(wnids)) == 1000
    assert wnids == sorted(wnids)
    assert all(len(wnid) == 9 and wnid[0] == 'n' and wnid[1:].isdigit() for wnid in wnids)
    # Tench, goldfish and toilet tissue are the first two classes and the last one.
    assert (wnids[0], wnids[1], wnids[-1]) == ('n01440764', 'n01443537', 'n15075141')


def test_coco_loads(tmp_path):
    import mmdet.datasets  # noqa: F401
    from pycocotools.coco import COCO

    root = script.make_coco(tmp_path / 'coco', 10, 4, long_side=96)
    init_default_scope('mmdet')
    for split in ('train2017', 'val2017'):
        annotations = root / f'annotations/instances_{split}.json'
        dataset = DATASETS.build(
            dict(
                type='CocoDataset',
                ann_file=str(annotations),
                data_prefix=dict(img=str(root / split)),
            )
        )
        categories = [c['name'] for c in json.loads(annotations.read_text())['categories']]
        assert tuple(categories) == dataset.METAINFO['classes']
        coco = COCO(str(annotations))
        identifiers = coco.getCatIds()
        assert len(identifiers) == 80
        assert max(identifiers) == 90
        for image in coco.dataset['images']:
            with Image.open(root / split / image['file_name']) as picture:
                assert picture.size == (image['width'], image['height'])
        for annotation in coco.dataset['annotations']:
            mask = coco.annToMask(annotation)
            assert mask.sum() > 0
            x, y, width, height = annotation['bbox']
            rows, columns = np.nonzero(mask)
            assert x - 1 <= columns.min()
            assert columns.max() <= x + width + 1
            assert y - 1 <= rows.min()
            assert rows.max() <= y + height + 1
            if annotation['iscrowd']:
                assert mask.sum() == annotation['area']
    crowds = [a for a in coco.dataset['annotations'] if a['iscrowd']]
    assert crowds
    assert isinstance(crowds[0]['segmentation']['counts'], list)
    train = COCO(str(root / 'annotations/instances_train2017.json'))
    assert not train.getAnnIds(imgIds=train.dataset['images'][7]['id'])


def test_ade20k_loads(tmp_path):
    import mmseg.datasets  # noqa: F401

    root = script.make_ade20k(tmp_path / 'ADEChallengeData2016', 5, 2, long_side=96)
    init_default_scope('mmseg')
    seen = set()
    for split, count in (('training', 5), ('validation', 2)):
        dataset = DATASETS.build(
            dict(
                type='ADE20KDataset',
                data_root=str(root),
                data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'annotations/{split}'),
                pipeline=[],
            )
        )
        assert len(dataset) == count
        for index in range(count):
            sample = dataset.get_data_info(index)
            labels = np.asarray(Image.open(sample['seg_map_path']))
            with Image.open(sample['img_path']) as picture:
                assert picture.size == labels.shape[::-1]
            assert labels.dtype == np.uint8
            seen |= set(np.unique(labels).tolist())
    assert 0 in seen
    assert max(seen) <= 150


def test_kinetics400_loads(tmp_path):
    from mmvim.datasets.video import VideoDataset, VideoReader

    root = script.make_kinetics400(tmp_path / 'kinetics400', 5, 2, long_side=64)
    for split, count in (('train', 5), ('val', 2)):
        dataset = VideoDataset(
            f'annotations/kinetics_{split}.csv',
            data_root=str(root),
            data_prefix=f'videos_{split}',
            num_classes=400,
        )
        assert len(dataset) == count
        assert tuple(script._lines('kinetics400_classes.txt')) == dataset.CLASSES
        for index in range(count):
            info = dataset.get_data_info(index)
            folder = Path(info['img_path']).parent.name
            assert folder == dataset.CLASSES[info['gt_label']]
            with VideoReader(info['img_path']) as video:
                assert 20 <= len(video) < 40
                assert max(video.frames([0]).shape[2:]) == 64


def test_sthv2_loads(tmp_path):
    from mmvim.datasets.video import VideoDataset, VideoReader

    root = script.make_sthv2(tmp_path / 'sthv2', 5, 2, long_side=64)
    labels = set()
    for split, count in (('train', 5), ('validation', 2)):
        file = f'annotations/something-something-v2-{split}.json'
        dataset = VideoDataset(
            file,
            data_root=str(root),
            data_prefix='videos',
            label_file='annotations/something-something-v2-labels.json',
            num_classes=174,
        )
        assert len(dataset) == count
        for entry, index in zip(json.loads((root / file).read_text()), range(count), strict=True):
            info = dataset.get_data_info(index)
            labels.add(info['gt_label'])
            assert Path(info['img_path']).name == f'{entry["id"]}.webm'
            assert len(entry['placeholders']) == entry['template'].count('[')
            with VideoReader(info['img_path']) as video:
                assert len(video.timestamps) == len(video) >= 20
    assert len(labels) > 2


@pytest.mark.parametrize(('name', 'classes'), [('breakfast', 10), ('coin', 180)])
def test_video_lists_load(name, classes, tmp_path):
    from mmvim.datasets.video import VideoDataset, VideoReader

    write, folder = script.DATASETS[name]
    root = write(tmp_path / folder, 5, 2, long_side=64)
    for split, count in (('train', 5), ('val', 2)):
        dataset = VideoDataset(
            f'annotations/{split}.csv',
            data_root=str(root),
            data_prefix='videos',
            num_classes=classes,
        )
        infos = [dataset.get_data_info(index) for index in range(len(dataset))]
        assert [info['gt_label'] for info in infos] == [i * classes // count for i in range(count)]
        for info in infos:
            with VideoReader(info['img_path']) as video:
                assert len(video) >= 20


def test_leaves_existing_data_alone(tmp_path):
    root = script.make_ade20k(tmp_path / 'mini', 1, 1, long_side=48)
    with pytest.raises(FileExistsError, match='--force'):
        script.make_ade20k(root, 1, 1, long_side=48)
    script.make_ade20k(root, 2, 1, long_side=48, force=True)
    assert len(list((root / 'images/training').iterdir())) == 2

    real = tmp_path / 'real'
    real.mkdir()
    (real / 'precious.jpg').write_bytes(b'1')
    with pytest.raises(FileExistsError, match='not generated by this script'):
        script.make_coco(real, 1, 1, long_side=48, force=True)
    assert (real / 'precious.jpg').read_bytes() == b'1'


def test_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(script, '_save_jpeg', lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.make_coco(tmp_path / 'coco', 1, 1, long_side=48)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path):
    command = [
        sys.executable,
        str(REPO / SCRIPT),
        '--out',
        str(tmp_path),
        '--only',
        'coco',
        'ade20k',
    ]
    command += ['--images', '2', '--long-side', '48']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'ade/ADEChallengeData2016/images/training/ADE_train_00000001.jpg').is_file()
    assert len(list((tmp_path / 'coco/train2017').iterdir())) == 2
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith('error: ')
    assert '--force' in again.stderr
