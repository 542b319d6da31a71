"""Images in, pictures and plain data out, for each task."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from script_runner import run_script

from mmvim.apis.inferencers import make_inferencer
from mmvim.apis.inferencers.common import _config_meta, find_images
from mmvim.apis.model_zoo import build_model, load_config
from mmvim.errors import CheckpointError, SampleError

CONFIGS = {task: f'configs/quickstart/vim_digits_{task}.py' for task in ('cls', 'det', 'seg')}
KEYS = {'cls': 'classes', 'det': 'objects', 'seg': 'areas'}


@pytest.fixture
def photos(tmp_path):
    """Images of three sizes, one of them twice."""
    folder = tmp_path / 'photos'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (('a', (40, 60)), ('b', (40, 60)), ('c', (64, 48))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f'{name}.png')
    (folder / 'notes.txt').write_text('no image')
    return folder


@pytest.fixture(scope='module')
def root():
    from pathlib import Path

    return Path(__file__).parents[2]


@pytest.mark.parametrize('task', KEYS)
def test_predict(task, photos, root, tmp_path):
    cfg = Config.fromfile(root / CONFIGS[task])
    torch.manual_seed(0)
    weights = tmp_path / 'x.pth'
    model = build_model(cfg)
    meta = {'dataset_meta': {'classes': tuple('abcdefghijk')}}
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, weights)
    inferencer = make_inferencer(cfg, weights, 'cpu')
    if task == 'det':
        inferencer.score_threshold = 0.0
    results = list(inferencer.predict(photos, batch_size=2))
    assert [result.name for result in results] == [str(photos / f'{n}.png') for n in 'abc']
    for result in results:
        (found,) = (result.prediction[KEYS[task]],)
        assert found
        assert {item['class'] for item in found} <= set('abcdefghijk')
        assert json.dumps(result.prediction)
        picture = inferencer.draw(result)
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        if task != 'cls':
            assert picture.shape == result.image.shape
        if task == 'seg':
            assert inferencer.label_map(result).shape == result.image.shape[:2]
            assert sum(item['share'] for item in found) == pytest.approx(1, abs=1e-4)
    # Batching changes nothing, and arrays are as good as files.
    alone = next(inferencer.predict(results[1].image)).prediction[KEYS[task]]
    value = 'share' if task == 'seg' else 'score'
    assert alone[0]['class'] == results[1].prediction[KEYS[task]][0]['class']
    assert alone[0][value] == pytest.approx(results[1].prediction[KEYS[task]][0][value], abs=1e-4)


def test_the_library_inferencers_are_the_base(root):
    from mmpretrain.apis import ImageClassificationInferencer

    inferencer = make_inferencer(root / CONFIGS['cls'], device='cpu')
    assert isinstance(inferencer, ImageClassificationInferencer)
    (result,) = inferencer(np.zeros((32, 32, 3), np.uint8))
    assert result['pred_class'] in '0123456789'


def test_a_part_of_a_model_is_refused(root, tmp_path):
    """A classifier's checkpoint has a segmentor's backbone, and its head would be random."""
    classifier = build_model(Config.fromfile(root / CONFIGS['cls']))
    weights = tmp_path / 'x.pth'
    torch.save({'state_dict': classifier.backbone.state_dict(prefix='backbone.')}, weights)
    with pytest.raises(CheckpointError, match=r'it lacks 2 of its parameters: head\.fc\.bias'):
        make_inferencer(root / CONFIGS['cls'], weights, 'cpu')


def test_colours_of_classes_that_nobody_gave_any(root, tmp_path):
    cfg = Config.fromfile(root / CONFIGS['seg'])
    weights = tmp_path / 'x.pth'
    meta = {'dataset_meta': {'classes': tuple('abcdefghijk'), 'palette': [[0, 0, 0]]}}
    torch.save({'state_dict': build_model(cfg).state_dict(), 'meta': meta}, weights)
    inferencer = make_inferencer(cfg, weights, 'cpu')
    assert len(inferencer.model.dataset_meta['palette']) == 11
    result = next(inferencer.predict(np.zeros((64, 64, 3), np.uint8)))
    assert inferencer.draw(result).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ('name', 'count', 'first'),
    [
        ('vim-tiny_3rdparty_in1k', 1000, 'tench, Tinca tinca'),
        ('mask-rcnn_vim-tiny_simplefpn_1x_coco', 80, 'person'),
        ('vim-tiny_upernet_8xb2-160k_ade20k-512x512', 150, 'wall'),
    ],
)
def test_names_of_the_classes_are_those_of_the_data(name, count, first):
    classes = _config_meta(load_config(name))['classes']
    assert (len(classes), classes[0]) == (count, first)


def test_find_images(photos):
    names = [str(photos / f'{name}.png') for name in 'abc']
    assert find_images(photos) == names
    assert find_images(str(photos / '[ab].png')) == names[:2]
    assert find_images([photos / 'c.png', photos]) == [names[2], *names]
    with pytest.raises(SampleError, match='no file matches'):
        find_images(str(photos / '*.tiff'))
    with pytest.raises(SampleError, match='does not exist'):
        find_images(photos / 'd.png')
    for path in photos.glob('*.png'):
        path.unlink()
    with pytest.raises(SampleError, match='no image in the folder'):
        find_images(photos)


def demo(root, *args):
    config = root / CONFIGS['cls']
    return run_script('demo/image_demo.py', config, *args, '--device', 'cpu', '--no-progress')


def test_demo(photos, root, tmp_path):
    out = tmp_path / 'out'
    result = demo(root, photos, photos / 'a.png', '--out-dir', out, '--batch-size', 3)
    assert result.returncode == 0, result.stderr
    assert '4 images:' in result.stdout
    assert sorted(p.name for p in (out / 'vis').iterdir()) == [
        'a.png', 'a_2.png', 'b.png', 'c.png',
    ]  # fmt: skip
    predictions = json.loads((out / 'predictions.json').read_text())
    assert [len(p['classes']) for p in predictions] == [5] * 4
    assert min(Image.open(out / 'vis' / 'a.png').size) >= 224


def test_demo_names_what_is_wrong(photos, root, tmp_path):
    assert "no file matches 'no*.png'" in demo(root, 'no*.png').stderr
    assert '--batch-size must be at least 1' in demo(root, photos, '--batch-size', 0).stderr
    (photos / 'd.png').write_bytes(b'no image')
    result = demo(root, photos / 'd.png', '--out-dir', tmp_path / 'out')
    assert result.returncode == 2
    assert 'd.png' in result.stderr
    assert not (tmp_path / 'out').exists()
    missing = demo(root, photos, '--weights', tmp_path / 'x.pth')
    assert missing.returncode == 2
    assert missing.stderr == f"error: checkpoint '{tmp_path / 'x.pth'}' does not exist\n"
    config = root / CONFIGS['cls']
    device = run_script('demo/image_demo.py', config, photos, '--device', 'gpu')
    assert device.returncode == 2
    assert "--device 'gpu' cannot be used" in device.stderr
