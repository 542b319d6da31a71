import csv
import json

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from video_files import coded_frames, write_video

from mmvim.datasets.video import (
    LoadVideo,
    PackVideo,
    RandomErasingVideo,
    RepeatAugment,
    ThreeCrop,
    VideoDataset,
    VideoSampleError,
    VideoTransform,
    at_regular_times,
    dense_indices,
    uniform_indices,
)


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    return str(write_video(tmp_path_factory.mktemp('clip') / 'a.mp4', coded_frames(30)))


def test_uniform_clips():
    # 33 frames in 8 segments of 4: clips at 1/3 and 2/3 of each segment, rounded down.
    np.testing.assert_array_equal(
        uniform_indices(33, 8, 2), [np.arange(0, 32, 4) + 1, np.arange(0, 32, 4) + 2]
    )
    assert uniform_indices(1, 4, 3).tolist() == [[0] * 4] * 3
    short = uniform_indices(3, 8, 1)[0]
    assert short.min() == 0
    assert short.max() <= 2
    assert (np.diff(short) >= 0).all()


def test_uniform_random_covers_each_segment():
    torch.manual_seed(0)
    draws = np.concatenate([uniform_indices(33, 8) for _ in range(400)])
    for i in range(8):
        assert set(draws[:, i]) == set(range(4 * i, 4 * i + 5))
    torch.manual_seed(1)
    a = uniform_indices(300, 8)
    torch.manual_seed(1)
    np.testing.assert_array_equal(a, uniform_indices(300, 8))
    assert uniform_indices(2, 8).max() <= 1


def test_dense_clips():
    assert dense_indices(100, 4, 8, 1).tolist() == [[37, 45, 53, 61]]
    assert dense_indices(100, 4, 8, 3)[:, 0].tolist() == [0, 37, 75]
    assert dense_indices(100, 4, 8, 3)[-1, -1] == 99
    assert dense_indices(5, 4, 2, 2).tolist() == [[0, 2, 4, 4]] * 2
    torch.manual_seed(0)
    starts = {int(dense_indices(12, 4, 3)[0, 0]) for _ in range(100)}
    assert starts == {0, 1, 2}


def test_regular_times():
    # Ten frames in the first second, then one a second.
    times = np.concatenate([np.arange(10) / 10, np.arange(1, 10)])
    indices = np.arange(19)
    even = at_regular_times(indices, times)
    assert even[0] == 0
    assert even[-1] == 18
    assert even[9] == 13  # 4.5 s: the frame of second 4
    np.testing.assert_array_equal(at_regular_times(indices, np.arange(19) / 25), indices)
    assert at_regular_times(np.array([0, 0]), np.zeros(1)).tolist() == [0, 0]


@pytest.mark.parametrize('kwargs', [{'num_frames': 0}, {'num_clips': 0}, {'num_frames': 2.5}])
def test_bad_numbers(kwargs):
    with pytest.raises(ValueError, match='positive integer'):
        LoadVideo(**kwargs)


def test_load(clip):
    out = LoadVideo(num_frames=8, num_clips=3)({'img_path': clip})
    assert out['frames'].shape == (3, 8, 3, 48, 64)
    assert out['total_frames'] == 30
    levels = out['frames'].float().mean((2, 3, 4)).numpy()
    np.testing.assert_allclose(levels, coded_frames(30)[out['frame_indices'], 0, 0, 0], atol=4)


def test_too_short_repeats_or_is_an_error(tmp_path):
    path = str(write_video(tmp_path / 'short.mp4', coded_frames(3)))
    for sampling, interval in (('uniform', 1), ('dense', 4)):
        load = LoadVideo(num_frames=8, sampling=sampling, interval=interval, num_clips=1)
        assert load({'img_path': path})['frames'].shape[1] == 8
    with pytest.raises(VideoSampleError, match=r'short\.mp4.* has 3 frames; min_frames=8'):
        LoadVideo(num_frames=8, min_frames=8)({'img_path': path})


def test_load_by_time(tmp_path):
    pts = np.concatenate([np.arange(20) * 10, 200 + np.arange(10) * 200])
    path = str(write_video(tmp_path / 'a.mp4', coded_frames(30), pts=pts))
    counted = LoadVideo(num_frames=4, num_clips=1)({'img_path': path})['frame_indices'][0]
    timed = LoadVideo(num_frames=4, num_clips=1, by_time=True)({'img_path': path})
    assert counted[1] < 20 < timed['frame_indices'][0, 1]


def test_errors_name_the_file(tmp_path):
    (tmp_path / 'broken.mp4').write_bytes(b'nothing')
    sample = {'img_path': str(tmp_path / 'broken.mp4')}
    with pytest.raises(VideoSampleError, match=r'broken\.mp4'):
        LoadVideo()(dict(sample))
    assert LoadVideo(on_error='skip')(dict(sample)) is None


def test_errors_of_a_worker_name_the_file_in_one_line(tmp_path):
    from torch.utils.data import DataLoader

    from mmvim.cli.diagnosis import explain

    (tmp_path / 'broken.mp4').write_bytes(b'nothing')
    (tmp_path / 'list.txt').write_text('broken.mp4 0\n')
    dataset = VideoDataset(
        'list.txt',
        data_root=str(tmp_path),
        pipeline=[dict(type='mmvim.LoadVideo'), dict(type='mmvim.PackVideo')],
    )
    loader = DataLoader(dataset, num_workers=1, collate_fn=list)
    with pytest.raises(VideoSampleError) as info:
        next(iter(loader))
    message = explain(info.value)
    assert 'broken.mp4' in message
    assert 'Traceback' not in message


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'sampling': 'random'}, "sampling='random'.*'uniform', 'dense'"),
        ({'on_error': 'ignore'}, "on_error='ignore'"),
        ({'interval': 2}, "no effect with sampling='uniform'"),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LoadVideo(**kwargs)


def constant_in_time(views=2, frames=5, height=40, width=56):
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (views, 1, 3, height, width), dtype=torch.uint8)
    return {'frames': picture.expand(-1, frames, -1, -1, -1).clone()}


@pytest.mark.parametrize(
    'step',
    [
        VideoTransform('RandomResizedCrop', size=(24, 32), scale=(0.3, 1), interpolation='bicubic'),
        VideoTransform('RandomHorizontalFlip'),
        VideoTransform('RandAugment', num_ops=4, magnitude=7, interpolation='bilinear'),
        VideoTransform('ColorJitter', brightness=0.5, hue=0.1),
        RandomErasingVideo(prob=0.0),
    ],
    ids=str,
)
def test_all_frames_alike(step):
    for seed in range(4):
        torch.manual_seed(seed)
        frames = step(constant_in_time())['frames']
        assert frames.dtype == torch.uint8
        assert type(frames) is torch.Tensor
        assert (frames == frames[:, :1]).all()


def test_erasing():
    torch.manual_seed(0)
    before = constant_in_time(views=1, height=64, width=64)
    original = before['frames'].clone()
    frames = RandomErasingVideo(prob=1.0)(before)['frames']
    changed = (frames != original).any(2)[0]
    rows, columns = changed.any(0).any(1), changed.any(0).any(0)
    share = rows.sum() * columns.sum() / 64**2
    assert 0.01 < share < 0.4
    # The same rectangle in all frames, with noise of its own in each.
    for mask in changed:
        assert (mask.any(1) == rows).all()
    assert not torch.equal(frames[0, 0], frames[0, 1])


def test_erased_rectangles_lie_and_stand():
    step = RandomErasingVideo(prob=1.0, area=(0.1, 0.1))
    ratios = []
    for _ in range(100):
        frames = step({'frames': torch.full((1, 1, 3, 64, 64), 255, dtype=torch.uint8)})['frames']
        erased = (frames[0, 0] != 255).any(0)
        ratios.append((erased.any(1).sum() / erased.any(0).sum()).log())
    ratios = torch.stack(ratios)
    assert 0.35 < (ratios > 0).float().mean() < 0.65
    assert ratios.abs().max() < torch.tensor(1 / 0.3).log() + 0.1


def test_erasing_noise_ends_at_black_and_white():
    before = {'frames': torch.full((1, 4, 3, 64, 64), 7, dtype=torch.uint8)}
    step = RandomErasingVideo(prob=1.0, area=(0.3, 0.3), mean=(250.0,) * 3, std=(200.0,) * 3)
    frames = step(before)['frames']
    noise = frames[frames != 7]
    # Half of this distribution lies above 255, a tenth below 0; wrapped around, nearly none is at
    # either.
    assert 0.4 < (noise == 255).float().mean() < 0.6
    assert 0.05 < (noise == 0).float().mean() < 0.2


@pytest.mark.parametrize(('height', 'width'), [(32, 50), (50, 32), (32, 32)])
def test_three_crop(height, width):
    sample = constant_in_time(2, 3, height, width)
    before = sample['frames']
    frames = ThreeCrop(32)(sample)['frames']
    assert frames.shape == (6, 3, 3, 32, 32)
    room = max(height, width) - 32
    for i, start in enumerate((0, room // 2, room)):
        y, x = (start, 0) if height > width else (0, start)
        for view in range(2):
            expected = before[view, ..., y : y + 32, x : x + 32]
            assert torch.equal(frames[3 * view + i], expected)
    with pytest.raises(ValueError, match='smaller than a crop'):
        ThreeCrop(64)({'frames': before})


def test_repetitions_draw_numbers_of_their_own():
    sample = constant_in_time(views=1)
    before = sample['frames'].clone()
    step = RepeatAugment([dict(type='mmvim.RandomErasingVideo', prob=1.0)], times=3)
    first, second, third = step(sample)['frames']
    for one, other in ((first, second), (first, third), (second, third), (first, before[0])):
        assert not torch.equal(one, other)


def test_repeat_and_pack(clip):
    init_default_scope('mmpretrain')
    repeat = RepeatAugment(
        [dict(type='mmvim.VideoTransform', name='RandomResizedCrop', size=16)], times=3
    )
    sample = LoadVideo(num_frames=4)({'img_path': clip, 'gt_label': 5, 'sample_idx': 7})
    sample = repeat(sample)
    assert sample['frames'].shape == (3, 4, 3, 16, 16)
    # The file's frames are grey.
    sample['frames'] = torch.randint(256, sample['frames'].shape, dtype=torch.uint8)
    packed = PackVideo()(sample)
    assert packed['inputs'].shape == (3, 3, 4, 16, 16)
    assert torch.equal(packed['inputs'], sample['frames'].transpose(1, 2))
    assert packed['data_samples'].gt_label.tolist() == [5]
    assert packed['data_samples'].sample_idx == 7
    assert packed['data_samples'].img_path == clip
    assert PackVideo()({'frames': sample['frames'][:1]})['inputs'].shape == (3, 4, 16, 16)


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: VideoTransform('Upside'), "name='Upside' is no transform"),
        (lambda: VideoTransform('functional'), 'is no transform'),
        (lambda: RandomErasingVideo(prob=2), 'prob=2'),
        (lambda: RandomErasingVideo(area=(0.5, 0.1)), 'area='),
        (lambda: ThreeCrop(0), 'size=0'),
        (lambda: RepeatAugment([], times=0), 'times=0'),
    ],
)
def test_bad_steps(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_plain_list(tmp_path):
    lines = ['a b/one.mp4 3', 'two.mp4 0', '', '/abs/three.mp4,12']
    (tmp_path / 'train.txt').write_text('\n'.join(lines))
    dataset = VideoDataset('train.txt', data_root=str(tmp_path), data_prefix='videos')
    items = [dataset.get_data_info(i) for i in range(len(dataset))]
    assert [item['gt_label'] for item in items] == [3, 0, 12]
    assert items[0]['img_path'] == str(tmp_path / 'videos/a b/one.mp4')
    assert items[2]['img_path'] == '/abs/three.mp4'
    assert dataset.CLASSES is None
    (tmp_path / 'bad.txt').write_text('one.mp4\n')
    with pytest.raises(ValueError, match=r'bad\.txt:1 is not "path label"'):
        VideoDataset('bad.txt', data_root=str(tmp_path))
    with pytest.raises(ValueError, match='label 12 is not below the 10 classes'):
        VideoDataset('train.txt', data_root=str(tmp_path), num_classes=10)


def kinetics(root, labels=('zumba', 'air drumming'), underscore=False):
    with open(root / 'val.csv', 'w', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(['label', 'youtube_id', 'time_start', 'time_end', 'split'])
        for i, label in enumerate(labels):
            rows.writerow([label, f'id-_{i}', 5 + i, 15 + i, 'val'])
            folder = root / 'videos_val' / (label.replace(' ', '_') if underscore else label)
            if label != 'gone':
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f'id-_{i}_{5 + i:06d}_{15 + i:06d}.mp4').touch()


@pytest.mark.parametrize('underscore', [False, True])
def test_kinetics(underscore, tmp_path):
    kinetics(tmp_path, ('zumba', 'air drumming', 'gone'), underscore)
    dataset = VideoDataset('val.csv', data_root=str(tmp_path), data_prefix='videos_val')
    assert dataset.CLASSES == ('air drumming', 'gone', 'zumba')
    assert [dataset.get_data_info(i)['gt_label'] for i in range(len(dataset))] == [2, 0]
    assert dataset.get_data_info(1)['img_path'].endswith('id-_1_000006_000016.mp4')


def test_kinetics_errors(tmp_path):
    kinetics(tmp_path)
    common = dict(ann_file='val.csv', data_root=str(tmp_path), data_prefix='videos_val')
    with pytest.raises(ValueError, match='2 classes are named and num_classes=400'):
        VideoDataset(**common, num_classes=400)
    (tmp_path / 'names.txt').write_text('air drumming\n')
    with pytest.raises(ValueError, match="the label 'zumba' is none of the classes"):
        VideoDataset(**common, label_file='names.txt')
    with pytest.raises(ValueError, match=r"layout='csv'.*'kinetics'"):
        VideoDataset(**common, layout='csv')
    with pytest.raises(ValueError, match=r'nowhere.* does not exist'):
        VideoDataset(**{**common, 'data_prefix': 'nowhere'})
    (tmp_path / 'none').mkdir()
    with pytest.raises(ValueError, match=r'none of the 2 videos.*id-_0_000005_000015'):
        VideoDataset(**{**common, 'data_prefix': 'none'})


def ssv2(root):
    # Not numbered in alphabetical order.
    labels = {'Dropping something onto something': '1', 'Holding something': '0'}
    entries = [
        {'id': '78687', 'label': 'holding a cup', 'template': 'Holding [something]',
         'placeholders': ['a cup']},
        {'id': '42', 'label': '', 'template': 'Dropping [something] onto [something]'},
    ]  # fmt: skip
    (root / 'labels.json').write_text(json.dumps(labels))
    (root / 'train.json').write_text(json.dumps(entries))
    (root / 'videos').mkdir()
    for name in ('78687', '42'):
        (root / f'videos/{name}.webm').touch()


def test_ssv2(tmp_path):
    ssv2(tmp_path)
    common = dict(ann_file='train.json', data_root=str(tmp_path), data_prefix='videos')
    dataset = VideoDataset(**common, label_file='labels.json', num_classes=2)
    assert dataset.CLASSES == ('Holding something', 'Dropping something onto something')
    assert [dataset.get_data_info(i)['gt_label'] for i in range(2)] == [0, 1]
    with pytest.raises(ValueError, match='ssv2 needs label_file'):
        VideoDataset(**common)
    (tmp_path / 'labels.json').write_text(json.dumps({'a': '1', 'b': '2'}))
    with pytest.raises(ValueError, match=r'not numbered 0 \.\. 1'):
        VideoDataset(**common, label_file='labels.json')


def test_names_resolve_in_mmpretrain(clip, tmp_path):
    init_default_scope('mmpretrain')
    (tmp_path / 'train.txt').write_text(f'{clip} 1\nmissing.mp4 0\n')
    dataset = DATASETS.build(
        dict(
            type='mmvim.VideoDataset',
            ann_file=str(tmp_path / 'train.txt'),
            pipeline=[
                dict(type='mmvim.LoadVideo', num_frames=4, on_error='skip'),
                dict(type='mmvim.PackVideo'),
            ],
        )
    )
    assert TRANSFORMS.get('mmvim.ThreeCrop') is ThreeCrop
    # In training another sample stands in for one that cannot be read.
    assert dataset[1]['data_samples'].gt_label.tolist() == [1]
    dataset.test_mode = True
    with pytest.raises(Exception, match='None'):
        dataset[1]
