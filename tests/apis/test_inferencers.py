"""Images in, pictures and plain data out, for each task."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from script_runner import run_script

from mmvim.apis.inferencers import make_inferencer
from mmvim.apis.inferencers.common import find_images
from mmvim.apis.inferencers.pipeline import _config_meta
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
    names = tuple('abcdefghijk' if task == 'seg' else 'abcdefghij')
    meta = {'dataset_meta': {'classes': names}}
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


@pytest.mark.parametrize('task', KEYS)
def test_pictures_are_rgb(task, root, tmp_path):
    cfg = Config.fromfile(root / CONFIGS[task])
    weights = tmp_path / 'x.pth'
    meta = {'classes': tuple('abcdefghijk'), 'palette': [[128, 128, 128]] * 11}
    content = {'state_dict': build_model(cfg).state_dict(), 'meta': {'dataset_meta': meta}}
    torch.save(content, weights)
    inferencer = make_inferencer(cfg, weights, 'cpu')
    if task == 'det':
        inferencer.score_threshold = 2.0
    image = np.full((256, 256, 3), (90, 30, 200), np.uint8)  # BGR
    given = tmp_path / 'x.png'
    Image.fromarray(image[..., ::-1]).save(given)
    for source in (image, given):
        (result,) = inferencer.predict(source)
        assert np.array_equal(result.image, image)
        red, green, blue = np.median(inferencer.draw(result).reshape(-1, 3), axis=0)
        assert red > blue > green
        if task != 'seg':
            assert (red, green, blue) == (200, 30, 90)


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


CLASSIFIER = """
_base_ = {base!r}
loader = dict(type='LoadImageFromFile', **{options!r})
test_pipeline = [loader, dict(type='ResizeEdge', scale=32, edge='short'),
                 dict(type='CenterCrop', crop_size=32), dict(type='PackInputs')]
model = dict(
    data_preprocessor=dict(_delete_=True, type='ClsDataPreprocessor', mean={mean!r}, std={mean!r}),
    backbone=dict(in_channels={channels}))
test_dataloader = dict(dataset=dict(
    _delete_=True, type='CustomDataset', data_root={folder!r}, pipeline=test_pipeline,
    test_mode=True))
"""


def write_images(folder, kind):
    """Two classes of images of a kind that a plain reading changes or refuses."""
    rng = np.random.default_rng(0)
    for name in 'ab':
        (folder / name).mkdir(parents=True)
        pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
        if kind == 'turned':
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.fromarray(pixels).save(folder / name / 'x.jpg', exif=exif)
        elif kind == 'grey':
            Image.fromarray(pixels[..., 0]).save(folder / name / 'x.png')
        elif kind == 'deep':
            deep = pixels[..., 0].astype(np.uint16) * 100 + 7
            Image.fromarray(deep).save(folder / name / 'x.tif')
        else:
            four = np.concatenate([pixels, 255 - pixels[..., :1]], axis=-1)
            Image.fromarray(four, 'RGBA').save(folder / name / 'x.png')


@pytest.mark.parametrize(
    ('kind', 'options', 'channels'),
    [
        ('turned', dict(color_type='color_ignore_orientation'), 3),
        ('turned', dict(), 3),
        ('grey', dict(color_type='grayscale'), 1),
        ('deep', dict(color_type='unchanged', to_float32=True), 1),
        ('bands', dict(color_type='unchanged'), 4),
    ],
)
def test_images_are_read_as_in_the_test(kind, options, channels, root, tmp_path):
    """Predictions are those of the config's own data set, whatever its loader does."""
    write_images(tmp_path / 'data', kind)
    file = tmp_path / 'config.py'
    mean = [100.0 + i for i in range(channels)]
    text = CLASSIFIER.format(
        base=str(root / CONFIGS['cls']), options=options, mean=mean, channels=channels,
        folder=str(tmp_path / 'data'),
    )  # fmt: skip
    if kind == 'deep':
        # Loaders give such images without a channel.
        text = text.replace("loader, dict(type='R", "loader, dict(type='AddChannel'), dict(type='R")
    file.write_text(text)
    from mmpretrain.registry import TRANSFORMS

    @TRANSFORMS.register_module(name='AddChannel', force=True)
    def add_channel():
        return lambda results: {**results, 'img': np.atleast_3d(results['img'])}

    torch.manual_seed(0)
    inferencer = make_inferencer(str(file), device='cpu')
    results = list(inferencer.predict(tmp_path / 'data' / 'a'))
    results += inferencer.predict([tmp_path / 'data' / 'b' / f'x.{s}' for s in ('jpg', 'png', 'tif')
                                   if (tmp_path / 'data' / 'b' / f'x.{s}').is_file()])  # fmt: skip
    from mmengine.registry import DATASETS, DefaultScope

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(inferencer.model.cfg.test_dataloader.dataset)
    for result, data in zip(results, dataset, strict=True):
        (expected,) = inferencer.model.test_step(
            {'inputs': [data['inputs']], 'data_samples': [data['data_samples']]}
        )
        torch.testing.assert_close(result.sample.pred_score, expected.pred_score)
        ignored = options.get('color_type') == 'color_ignore_orientation'
        height, width = (60, 40) if kind == 'turned' and not ignored else (40, 60)
        assert result.image.shape == (height, width, 3)
        assert result.image.dtype == np.uint8
        assert inferencer.draw(result).ndim == 3


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize('channels', [None, 1, 2, 3, 4, 13])
def test_displayable(channels, dtype):
    from mmvim.apis.inferencers.pipeline import displayable

    rng = np.random.default_rng(0)
    pixels = rng.random((5, 7, channels or 1)) * (255 if dtype == np.uint8 else 3000)
    pixels = pixels.astype(dtype) if channels else pixels[..., 0].astype(dtype)
    shown = displayable(pixels)
    assert shown.shape == (5, 7, 3)
    assert shown.dtype == np.uint8
    first = np.atleast_3d(pixels)[..., 0].astype(float)
    assert np.corrcoef(first.ravel(), shown[..., 0].ravel().astype(float))[0, 1] > 0.999
    if dtype == np.uint8:
        assert np.array_equal(first, shown[..., 0])
    else:
        assert shown.max() == 255


@pytest.mark.parametrize('task', KEYS)
def test_random_weights_are_named(task, photos, root, tmp_path):
    """On the picture and in the text; nothing of it with a checkpoint."""
    image = photos / 'a.png'
    arguments = ('demo/image_demo.py', root / CONFIGS[task], image, '--no-progress')
    assert '(random weights: it means nothing)' in run_script(*arguments).stdout
    cfg = Config.fromfile(root / CONFIGS[task])
    torch.save({'state_dict': build_model(cfg).state_dict()}, tmp_path / 'x.pth')
    trained = run_script(*arguments, '--weights', tmp_path / 'x.pth').stdout
    assert 'random weights' not in trained
    assert str(image) in trained
    inferencer = make_inferencer(cfg, device='cpu')
    (result,) = inferencer.predict(image)
    marked = inferencer.draw(result)
    inferencer.model.has_random_weights = False
    plain = inferencer.draw(result)
    assert marked.shape == plain.shape
    red = (marked != plain).any(-1) & (marked[..., 0] > 200) & (marked[..., 1] < 100)
    assert red.sum() > 20


@pytest.mark.parametrize('task', KEYS)
def test_class_names_of_any_script(task, photos, root):
    """Letters that are no ASCII are drawn: other names give other pictures."""
    inferencer = make_inferencer(Config.fromfile(root / CONFIGS[task]), device='cpu')
    if task == 'det':
        inferencer.score_threshold = 0.0
    drawn = []
    for names in (['ёж'] * 11, ['ňú'] * 11, ['ёж'] * 11):
        inferencer.model.dataset_meta['classes'] = names
        inferencer.classes = names
        (result,) = inferencer.predict(photos / 'c.png')
        if task == 'seg':
            result.prediction['areas'] = result.prediction['areas'][:2]
        drawn.append(inferencer.draw(result))
    assert not np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], drawn[2])


def test_the_largest_area_comes_first(photos):
    pytest.importorskip('mmseg')
    inferencer = make_inferencer(CONFIGS['seg'])
    labels = torch.zeros(1, 6, 6, dtype=torch.long)
    labels[0, 0], labels[0, 1, :2] = 4, 7
    sample = SimpleNamespace(pred_sem_seg=SimpleNamespace(data=labels))
    areas = inferencer._plain(sample)['areas']
    assert [area['label'] for area in areas] == [0, 4, 7]
    assert [area['share'] for area in areas] == [0.777778, 0.166667, 0.055556]


def test_fonts(caplog):
    from mmvim.apis.inferencers.text import font_files

    assert len(font_files(frozenset('aéñßЖΩ'))) == 1
    unknown = font_files(frozenset('a\U0010fffd'))
    assert len(unknown) == 1
