"""A file's metadata suffice to get from a picture to the scores of ``tools/test.py``."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from PIL import Image
from script_runner import run_script

from mmvim.apis.inferencers.common import make_model
from mmvim.apis.videos import VideoWriter
from mmvim.export.formats import METADATA, read_metadata

sys.path.insert(0, str(Path(__file__).parents[1] / 'tools'))
import task_configs

PILLOW = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}
OPENCV = {'bilinear': cv2.INTER_LINEAR, 'bicubic': cv2.INTER_CUBIC}
READ = {
    'color': cv2.IMREAD_COLOR,
    'grayscale': cv2.IMREAD_GRAYSCALE,
    'unchanged': cv2.IMREAD_UNCHANGED,
}


class Consumer:
    """A user of a file who knows its metadata, NumPy, OpenCV, Pillow and torchvision only."""

    def __init__(self, path: Path) -> None:
        files = {METADATA: ''}
        self.run = torch.jit.load(str(path), _extra_files=files)
        self.about = json.loads(files[METADATA])

    def scores(self, path: Path) -> list[np.ndarray]:
        """Outputs after the activation; views, if any, are averaged."""
        pictures = self.read(path)
        inputs = torch.from_numpy(np.stack([self.normalised(p) for p in pictures]))
        outputs = self.run(inputs)
        if self.about['output'] != 'logits':
            return [x.numpy() for x in outputs]
        activation = {'softmax': lambda x: x.softmax(1), 'sigmoid': torch.sigmoid}
        return [activation[self.about['activation']](outputs).mean(0).numpy()]

    def read(self, path: Path) -> list[np.ndarray]:
        """Pictures (height, width, channels) or clips (frames, height, width, channels)."""
        first, *steps = self.about['pipeline']
        pictures = getattr(self, first['type'])(path, **first)
        for step in steps:
            pictures = [
                y for x in pictures for y in np.atleast_1d(getattr(self, step['type'])(x, **step))
            ]
        return pictures

    def normalised(self, picture: np.ndarray) -> np.ndarray:
        """Channels in order, normalised and padded: ([channels, frames,] height, width)."""
        is_clip = picture.ndim == 4
        if self.about['channels'] == 'RGB' and not is_clip:
            picture = picture[..., ::-1]
        mean, std = (np.array(self.about[key], np.float32) for key in ('mean', 'std'))
        picture = np.moveaxis((picture - mean) / std, -1, 0).astype(np.float32)
        pad = self.about.get('pad', {'divisor': 1, 'value': 0})
        missing = [-side % pad['divisor'] for side in picture.shape[-2:]]
        if 'size' in pad:
            missing = [a - b for a, b in zip(pad['size'], picture.shape[-2:], strict=True)]
        widths = [(0, 0)] * (picture.ndim - 2) + [(0, side) for side in missing]
        return np.pad(picture, widths, constant_values=pad['value'])

    def LoadImageFromFile(self, path, color_type, **_):
        picture = cv2.imread(str(path), READ[color_type])
        return [picture if picture.ndim == 3 else picture[..., None]]

    def ResizeEdge(self, picture, scale, edge, backend, interpolation, **_):
        assert (edge, backend) == ('short', 'pillow')
        height, width = picture.shape[:2]
        size = (scale, int(scale * height / width))
        if height < width:
            size = (int(scale * width / height), scale)
        resized = Image.fromarray(picture).resize(size, PILLOW[interpolation])
        out = np.empty(1, object)
        out[0] = np.asarray(resized)
        return out

    def CenterCrop(self, picture, crop_size, **_):
        top, left = (round((side - crop_size) / 2) for side in picture.shape[:2])
        out = np.empty(1, object)
        out[0] = picture[top : top + crop_size, left : left + crop_size]
        return out

    def Resize(self, picture, scale, keep_ratio, interpolation, **_):
        scale = (scale, scale) if isinstance(scale, int) else tuple(scale)
        if keep_ratio:
            height, width = picture.shape[:2]
            ratio = min(
                max(scale) / max(height, width),
                min(scale) / min(height, width),
            )
            scale = int(width * ratio + 0.5), int(height * ratio + 0.5)
        resized = cv2.resize(picture, scale, interpolation=OPENCV[interpolation])
        out = np.empty(1, object)
        out[0] = resized if resized.ndim == 3 else resized[..., None]
        return out

    def LoadVideo(self, path, num_frames, num_clips, sampling, **_):
        import av

        assert sampling == 'uniform'
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)]
        size = (len(frames) - 1) / num_frames
        starts = np.round(size * np.arange(num_frames)).astype(int)
        offsets = [int(size / (num_clips + 1) * (k + 1)) for k in range(num_clips)]
        return [np.stack([frames[min(i + o, len(frames) - 1)] for i in starts]) for o in offsets]

    def VideoTransform(self, clip, name, size, interpolation, **_):
        from torchvision.transforms import InterpolationMode, v2

        assert name == 'Resize'
        resize = v2.Resize(size, InterpolationMode(interpolation))
        out = np.empty(1, object)
        out[0] = resize(torch.from_numpy(clip).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
        return out

    def ThreeCrop(self, clip, size, **_):
        height, width = clip.shape[1:3]
        assert height == size < width
        out = np.empty(3, object)
        for i, left in enumerate((0, (width - size) // 2, width - size)):
            out[i] = clip[:, :, left : left + size]
        return out


def prepare(tmp_path: Path, scope: str, change) -> tuple[Config, Path, object]:
    """A config of one of the libraries, its weights, and the model that test.py would test."""
    task_configs.write(tmp_path, scope)
    cfg = Config.fromfile(tmp_path / 'config.py')
    change(cfg)
    cfg.dump(tmp_path / 'changed.py')
    torch.manual_seed(0)
    model = make_model('', cfg, None)
    for parameter in model.parameters():
        # Scores that hang on every pixel.
        torch.nn.init.normal_(parameter, std=0.6)
    weights = tmp_path / 'x.pth'
    torch.save({'state_dict': model.state_dict()}, weights)
    return cfg, weights, model


def exported(tmp_path: Path, weights: Path, *options) -> Consumer:
    out = tmp_path / 'm.ts'
    config = tmp_path / 'changed.py'
    result = run_script('export/export.py', config, out, '--weights', weights, *options)
    assert result.returncode == 0, result.stderr
    assert read_metadata(out) == Consumer(out).about
    return Consumer(out)


def predictions(cfg: Config, model) -> list:
    """The test data's samples with the predictions, as ``tools/test.py`` gets them."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.no_grad():
        loader = Runner.build_dataloader({**cfg.test_dataloader, 'batch_size': 1})
        return [sample for data in loader for sample in model.test_step(data)]


@pytest.mark.parametrize(
    ('channels', 'multi_label'), [(3, False), (3, True), (1, False), (4, False)]
)
def test_classifier(channels, multi_label, tmp_path):
    def change(cfg):
        kind = {3: 'color', 1: 'grayscale', 4: 'unchanged'}[channels]
        cfg.model.backbone.in_channels = channels
        mean, std = [120.0, 110.0, 100.0, 90.0], [50.0, 60.0, 70.0, 80.0]
        cfg.model.data_preprocessor = dict(mean=mean[:channels], std=std[:channels], to_rgb=True)
        if multi_label:
            cfg.model.head = dict(type='MultiLabelLinearClsHead', num_classes=2, in_channels=8)
        resize = [
            dict(type='ResizeEdge', scale=48, backend='pillow', interpolation='bicubic'),
            dict(type='CenterCrop', crop_size=40),
        ]
        if channels != 3:
            resize = [dict(type='Resize', scale=(40, 40))]
        pipeline = [dict(type='LoadImageFromFile', color_type=kind), *resize]
        cfg.test_dataloader.dataset.pipeline = [*pipeline, dict(type='PackInputs')]

    cfg, weights, model = prepare(tmp_path, 'mmpretrain', change)
    root = Path(cfg.test_dataloader.dataset.data_root)
    rng = np.random.default_rng(1)
    for i, size in enumerate(((50, 80), (70, 44), (32, 32), (90, 60))):
        shape = size if channels == 1 else (*size, channels)
        colour = rng.integers(0, 200, (1, 1, channels)[: len(shape)])
        pixels = (colour + rng.integers(0, 55, shape)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f'images/{i}.png')
    consumer = exported(tmp_path, weights)
    assert consumer.about['shape'] == [channels, 40, 40]
    assert consumer.about['channels'] == {3: 'RGB', 1: 'grey', 4: 'BGRA'}[channels]
    assert consumer.about['classes'] == ['a', 'b']
    expected = [sample.pred_score.numpy() for sample in predictions(cfg, model)]
    assert np.ptp([x[0] for x in expected]) > 0.01
    for i, score in enumerate(expected):
        (given,) = consumer.scores(root / f'images/{i}.png')
        np.testing.assert_allclose(given, score, atol=1e-4)


def test_video_classifier_with_default_means(tmp_path):
    """Clips are RGB and have means though the config says neither."""
    pytest.importorskip('av')
    rng = np.random.default_rng(0)
    lines = []
    for i in range(2):
        with VideoWriter(tmp_path / f'{i}.mp4', 10) as video:
            for _ in range(9 + i):
                colour = np.array([200, 30 + 150 * i, 0])
                blocks = (colour + rng.integers(0, 55, (3, 4, 3))).astype(np.uint8)
                video.write(np.kron(blocks, np.ones((16, 16, 1), np.uint8)))
        lines.append(f'{i}.mp4 {i}')
    (tmp_path / 'list.txt').write_text('\n'.join(lines))

    def change(cfg):
        cfg.model = dict(
            type='mmvim.VideoClassifier',
            backbone=dict(
                type='mmvim.VideoMamba',
                arch=dict(embed_dims=8, depth=1, d_state=2),
                img_size=32,
                num_frames=4,
            ),
            head=dict(type='LinearClsHead', num_classes=2, in_channels=8),
        )
        cfg.test_dataloader.dataset = dict(
            type='mmvim.VideoDataset',
            ann_file='list.txt',
            data_root=str(tmp_path),
            test_mode=True,
            metainfo=dict(classes=('a', 'b')),
            pipeline=[
                dict(type='mmvim.LoadVideo', num_frames=4, num_clips=2),
                dict(type='mmvim.VideoTransform', name='Resize', size=32),
                dict(type='mmvim.ThreeCrop', size=32),
                dict(type='mmvim.PackVideo'),
            ],
        )

    cfg, weights, model = prepare(tmp_path, 'mmpretrain', change)
    consumer = exported(tmp_path, weights)
    assert consumer.about['shape'] == [3, 4, 32, 32]
    assert consumer.about['channels'] == 'RGB'
    assert consumer.about['mean'] == [123.675, 116.28, 103.53]
    assert consumer.about['classes'] == ['a', 'b']
    expected = [sample.pred_score.numpy() for sample in predictions(cfg, model)]
    assert np.ptp([x[0] for x in expected]) > 0.01
    for i, score in enumerate(expected):
        (given,) = consumer.scores(tmp_path / f'{i}.mp4')
        np.testing.assert_allclose(given, score, atol=1e-4)


def test_segmentor(tmp_path):
    def change(cfg):
        cfg.model.data_preprocessor.update(
            mean=[120.0, 110.0, 100.0],
            std=[50.0, 60.0, 70.0],
            bgr_to_rgb=True,
            pad_val=3,
            test_cfg=dict(size_divisor=64),
        )
        cfg.model.decode_head.norm_cfg = dict(type='BN')
        cfg.test_dataloader.dataset.pipeline.insert(
            1, dict(type='Resize', scale=(48, 48), keep_ratio=True)
        )

    cfg, weights, model = prepare(tmp_path, 'mmseg', change)
    root = Path(cfg.test_dataloader.dataset.data_root)
    consumer = exported(tmp_path, weights, '--dynamic', 'size')
    assert consumer.about['pad'] == {'divisor': 64, 'value': 3}
    assert consumer.about['classes'] == ['a', 'b']
    samples = predictions(cfg, model)
    assert len(samples) == 4
    for i, sample in enumerate(samples):
        path = root / f'images/{i}.png'
        (picture,) = consumer.read(path)
        logits = consumer.run(torch.from_numpy(consumer.normalised(picture))[None])
        assert not consumer.about['align_corners']

        def resized(x, size):
            return torch.nn.functional.interpolate(x, size=tuple(size), mode='bilinear')

        # To the padded input, cut to the picture, to the file's size.
        height, width = picture.shape[:2]
        padded = consumer.normalised(picture).shape[-2:]
        logits = resized(resized(logits, padded)[..., :height, :width], (32, 32))[0]
        torch.testing.assert_close(logits, sample.seg_logits.data, atol=1e-4, rtol=1e-4)


def test_detector(tmp_path):
    def change(cfg):
        cfg.model.data_preprocessor.update(
            mean=[120.0, 110.0, 100.0], std=[50.0, 60.0, 70.0], bgr_to_rgb=False, pad_value=2
        )
        pipeline = cfg.test_dataloader.dataset.pipeline
        next(step for step in pipeline if step['type'] == 'Resize')['scale'] = (48, 40)

    cfg, weights, model = prepare(tmp_path, 'mmdet', change)
    root = Path(cfg.test_dataloader.dataset.data_root)
    consumer = exported(tmp_path, weights, '--dynamic', 'size')
    assert consumer.about['channels'] == 'BGR'
    assert consumer.about['pad'] == {'divisor': 32, 'value': 2}
    assert consumer.about['output'] == 'feature maps'
    samples = predictions(cfg, model)
    assert len(samples) == 4
    for sample in samples:
        maps = consumer.scores(root / 'images' / Path(sample.img_path).name)
        features = tuple(
            torch.from_numpy(x)[None] if x.ndim == 3 else torch.from_numpy(x) for x in maps
        )
        with torch.no_grad():
            (found,) = model.bbox_head.predict(features, [sample], rescale=True)
        torch.testing.assert_close(found.scores, sample.pred_instances.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.bboxes, sample.pred_instances.bboxes, atol=1e-2, rtol=0)
