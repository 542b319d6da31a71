"""Videos as folders of pictures."""

import json

import numpy as np
import pytest
from PIL import Image
from script_runner import run_script

from mmvim.apis.videos import find_videos
from mmvim.datasets import VideoDataset
from mmvim.datasets.video import FrameFolder, LoadVideo, VideoSampleError


def write_frames(folder, count=12, name='img_{:05}.jpg', first=1, size=(40, 32)):
    """Frames whose grey level is ten times their number from zero."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new('RGB', size, (10 * i,) * 3).save(folder / name.format(first + i))
    return folder


@pytest.mark.parametrize(
    ('name', 'first'),
    [('img_{:05}.jpg', 1), ('{:06d}.png', 0), ('frame{}.png', 7), ('a1_{:02}_b2.png', 3)],
)
def test_templates(name, first, tmp_path):
    folder = write_frames(tmp_path / 'v', name=name, first=first)
    # Other pictures, such as optical flow, are none of the template's frames.
    Image.new('RGB', (8, 8)).save(folder / 'flow_x_00001.jpg')
    (folder / 'notes.txt').write_text('no frame')
    video = FrameFolder(folder, name)
    assert len(video) == 12
    frames = video.frames([11, 0, 5, 5])
    assert frames.shape == (4, 3, 32, 40)
    np.testing.assert_allclose(frames.float().mean((1, 2, 3)), [110, 0, 50, 50], atol=1)
    levels = [frame.mean() for frame in video]
    np.testing.assert_allclose(levels, 10 * np.arange(12), atol=1)
    out = LoadVideo(num_frames=4, num_clips=1, frame_template=name)({'img_path': str(folder)})
    levels = out['frames'].float().mean((0, 2, 3, 4))
    np.testing.assert_allclose(levels, 10 * out['frame_indices'][0], atol=1)
    assert out['total_frames'] == 12
    assert out['ori_shape'] == (32, 40)


def test_order_is_that_of_the_numbers(tmp_path):
    folder = write_frames(tmp_path / 'v', name='f{}.png', first=8)
    assert [round(float(f.mean())) for f in FrameFolder(folder)] == list(range(0, 120, 10))


def test_frames_of_several_sizes(tmp_path):
    folder = write_frames(tmp_path / 'v', 2)
    Image.new('L', (20, 16), 200).save(folder / 'img_00003.jpg')
    assert FrameFolder(folder).frames([2, 0]).shape == (2, 3, 32, 40)


def test_what_is_wrong(tmp_path):
    folder = write_frames(tmp_path / 'v')
    for template in ('img.jpg', '{}_{}.jpg', 'a/{}.jpg', '{x}.jpg', '{:5q}.jpg', 'img_%05d.jpg'):
        with pytest.raises(ValueError, match=r'frame_template=.* one place for the number'):
            LoadVideo(frame_template=template)
    with pytest.raises(VideoSampleError, match='has no frames named'):
        FrameFolder(folder, 'x_{:05}.jpg')
    with pytest.raises(VideoSampleError, match='does not exist'):
        FrameFolder(tmp_path / 'none')
    (folder / 'img_00004.jpg').unlink()
    with pytest.raises(VideoSampleError, match=r'lacks frame 4 of 1 \.\. 12'):
        FrameFolder(folder, 'img_{:05}.jpg')
    write_frames(folder)
    (folder / 'img_00002.jpg').write_bytes(b'no picture')
    with pytest.raises(VideoSampleError, match=r'img_00002\.jpg.* cannot be read'):
        FrameFolder(folder).frames([1])
    assert LoadVideo(12, 'dense', num_clips=1, on_error='skip')({'img_path': str(folder)}) is None
    with pytest.raises(IndexError):
        FrameFolder(folder).frames([12])
    Image.new('RGB', (8, 8)).save(folder / 'flow_00001.jpg')
    with pytest.raises(VideoSampleError, match=r'several kinds.*frame_template'):
        FrameFolder(folder)
    with pytest.raises(VideoSampleError, match='has no number'):
        FrameFolder(write_frames(tmp_path / 'w', 1, name='cover.png'))


def test_data_sets(tmp_path):
    for i in range(3):
        write_frames(tmp_path / 'videos' / f'{i}')
    (tmp_path / 'list.txt').write_text('\n'.join(f'{i} {i}' for i in range(3)))
    (tmp_path / 'labels.json').write_text(json.dumps({'a': 0, 'b': 1}))
    entries = [{'id': str(i), 'template': 'ab'[i % 2]} for i in range(3)]
    (tmp_path / 'list.json').write_text(json.dumps(entries))
    pipeline = [dict(type='mmvim.LoadVideo', num_frames=4, frame_template='img_{:05}.jpg')]
    options = dict(data_root=str(tmp_path), data_prefix='videos', pipeline=pipeline)
    for extra in (
        dict(ann_file='list.txt'),
        dict(ann_file='list.json', label_file='labels.json'),
    ):
        data = VideoDataset(**extra, **options)
        assert len(data) == 3
        assert data[2]['frames'].shape == (1, 4, 3, 32, 40)


def test_demo(tmp_path):
    pytest.importorskip('mmpretrain')
    from pathlib import Path

    for name in 'ab':
        write_frames(tmp_path / 'videos' / name)
    both = [str(tmp_path / 'videos' / name) for name in 'ab']
    assert find_videos(tmp_path / 'videos') == both
    assert find_videos(both[0]) == both[:1]
    assert find_videos(str(tmp_path / 'videos' / '*')) == both
    config = Path(__file__).parents[2] / 'configs/quickstart/videomamba_digits_video.py'
    options = ('--out-dir', tmp_path / 'out', '--cfg-options', 'model.backbone.arch.depth=1')
    options += ('test_dataloader.dataset.pipeline.0.frame_template=img_{:05}.jpg',)
    result = run_script('demo/video_demo.py', config, tmp_path / 'videos', *options)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'out/a.mp4').stat().st_size
    found = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert [entry['video'] for entry in found] == both
