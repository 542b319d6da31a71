"""Videos in; drawn videos, pictures and plain data out."""

import json
from pathlib import Path

import numpy as np
import pytest
from script_runner import run_script

pytest.importorskip('av')

from mmvim.apis.inferencers import VideoInferencer, make_inferencer
from mmvim.apis.outputs import OutputFolder
from mmvim.apis.videos import VideoWriter, find_videos
from mmvim.datasets.video import VideoReader, VideoSampleError

QUICKSTART = Path(__file__).parents[2] / 'configs' / 'quickstart'
FRAMES = 6


@pytest.fixture
def videos(tmp_path):
    """Two videos of a square that moves, of two sizes."""
    folder = tmp_path / 'videos'
    folder.mkdir()
    for name, (height, width) in (('a', (32, 32)), ('b', (48, 65))):
        with VideoWriter(folder / f'{name}.mp4', 5) as writer:
            for i in range(FRAMES):
                frame = np.zeros((height, width, 3), np.uint8)
                frame[8:24, 4 * i : 4 * i + 8] = (250, 40, 40)
                writer.write(frame)
    (folder / 'notes.txt').write_text('no video')
    return folder


def demo(config, *args):
    return run_script(
        'demo/video_demo.py', QUICKSTART / config, *args, '--device', 'cpu', '--no-progress'
    )


def test_written_videos_are_what_was_given(videos):
    with VideoReader(videos / 'a.mp4') as video:
        frames = list(video)
        assert len(frames) == len(video) == FRAMES
        assert np.diff(video.timestamps) == pytest.approx(0.2, abs=1e-3)
        assert [int(frame[16, :, 0].argmax()) // 4 for frame in frames] == list(range(FRAMES))
        assert np.array_equal(frames[3], video.frames([3])[0].permute(1, 2, 0).numpy())
    with VideoReader(videos / 'b.mp4') as video:
        assert next(iter(video)).shape == (48, 66, 3)


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_frame_by_frame(task, videos, tmp_path):
    out = tmp_path / 'out'
    options = ('--out-dir', out, '--batch-size', 2, '--every', 2, '--pictures')
    result = demo(f'vim_digits_{task}.py', videos / 'b.mp4', *options)
    assert result.returncode == 0, result.stderr
    (video,) = json.loads((out / 'predictions.json').read_text())
    assert video['video'] == str(videos / 'b.mp4')
    assert [frame['frame'] for frame in video['frames']] == [0, 2, 4]
    assert [frame['time'] for frame in video['frames']] == [0, 0.4, 0.8]
    key = {'cls': 'classes', 'det': 'objects', 'seg': 'areas'}[task]
    assert all(key in frame for frame in video['frames'])
    with VideoReader(out / 'b.mp4') as drawn:
        assert len(drawn) == 3
        assert drawn.timestamps[-1] == pytest.approx(0.8, abs=1e-2)
    assert sorted(p.name for p in (out / 'vis' / 'b').iterdir()) == [
        '000000.png', '000002.png', '000004.png',
    ]  # fmt: skip


def test_pictures_are_rgb(tmp_path):
    with VideoWriter(tmp_path / 'x.mp4', 5) as writer:
        for _ in range(FRAMES):
            writer.write(np.full((64, 64, 3), (200, 30, 90), np.uint8))
    inferencer = make_inferencer(QUICKSTART / 'videomamba_digits_video.py', device='cpu')
    (result,) = inferencer.predict(tmp_path / 'x.mp4')
    colours = np.median(inferencer.draw(result).reshape(-1, 3), axis=0)
    assert colours == pytest.approx((200, 30, 90), abs=12)  # after compression
    frame = np.full((64, 64, 3), (10, 200, 50), np.uint8)
    colours = np.median(inferencer.draw(result, frame).reshape(-1, 3), axis=0)
    assert tuple(colours) == (10, 200, 50)


def test_whole_videos(videos, tmp_path):
    out = tmp_path / 'out'
    classes = tmp_path / 'classes.txt'
    classes.write_text('\n'.join(f'class {i}' for i in range(40)))
    options = ('--out-dir', out, '--classes', classes, '--batch-size', 2)
    result = demo('videomamba_digits_video.py', videos, *options)
    assert result.returncode == 0, result.stderr
    found = json.loads((out / 'predictions.json').read_text())
    assert [Path(video['video']).name for video in found] == ['a.mp4', 'b.mp4']
    for video in found:
        assert len(video['classes']) == 5
        assert all(x['class'] == f'class {x["label"]}' for x in video['classes'])
        with VideoReader(video['drawn']) as drawn:
            assert len(drawn) == FRAMES
    assert not list(out.glob('.*'))


def test_batches_of_videos_change_nothing(videos):
    inferencer = make_inferencer(QUICKSTART / 'videomamba_digits_video.py', device='cpu')
    assert isinstance(inferencer, VideoInferencer)
    scores = [
        [result.sample.pred_score for result in inferencer.predict([videos / 'a.mp4'] * 3, size)]
        for size in (1, 2)
    ]
    for one, other in zip(*scores, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    with pytest.raises(ValueError, match='does not begin with'):
        VideoInferencer(QUICKSTART / 'vim_digits_cls.py', device='cpu')


def test_find_videos(videos):
    names = [str(videos / f'{name}.mp4') for name in 'ab']
    assert find_videos(videos) == names
    assert find_videos([videos / 'b.mp4', str(videos / '*.mp4')]) == [names[1], *names]
    for name in ('A.MP4', 'a.txt'):
        (videos / name).touch()
    assert find_videos(videos) == [str(videos / 'A.MP4'), *names]
    (videos / 'A.MP4').unlink()
    with pytest.raises(VideoSampleError, match='no file matches'):
        find_videos(str(videos / '*.mkv'))
    with pytest.raises(VideoSampleError, match='does not exist'):
        find_videos(videos / 'c.mp4')
    for path in videos.glob('*.mp4'):
        path.unlink()
    with pytest.raises(VideoSampleError, match='no video in the folder'):
        find_videos(videos)


def test_bad_input_leaves_nothing_behind(videos, tmp_path):
    out = tmp_path / 'out'

    def error(*args, config='vim_digits_cls.py'):
        result = demo(config, *args)
        assert result.returncode == 2
        assert result.stderr.count('\n') == 1
        return result.stderr

    assert '--every must be at least 1' in error(videos, '--every', 0)
    assert 'does not exist' in error(videos, '--classes', tmp_path / 'no.txt')
    # The second of two videos is damaged: what was written of the first one goes as well.
    (videos / 'b.mp4').write_bytes((videos / 'b.mp4').read_bytes()[:400])
    assert "b.mp4'" in error(videos, '--out-dir', out)
    assert not out.exists()
    out.mkdir()
    (out / 'a.mp4').write_text('mine')
    assert "a.mp4' exists; --overwrite" in error(videos / 'a.mp4', '--out-dir', out)
    assert (out / 'a.mp4').read_text() == 'mine'
    result = demo('vim_digits_cls.py', videos / 'a.mp4', '--out-dir', out, '--overwrite')
    assert result.returncode == 0, result.stderr
    assert len(VideoReader(out / 'a.mp4')) == FRAMES
    images = run_script(
        'demo/image_demo.py', QUICKSTART / 'videomamba_digits_video.py', videos / 'a.mp4'
    )
    assert 'tools/demo/video_demo.py runs it' in images.stderr


def test_output_folder(tmp_path):
    def fail():
        with OutputFolder(tmp_path / 'x' / 'y', ['a']) as out:
            out.path('a').write_text('half')
            out.path('b/c').write_text(str(1 / 0))

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not (tmp_path / 'x').exists()
    with OutputFolder(tmp_path / 'x' / 'y', ['a', 'b/c']) as out:
        out.path('a').write_text('1')
        out.path('b/c').write_text('2')
        assert not out.final('a').exists()
    assert (tmp_path / 'x' / 'y' / 'b' / 'c').read_text() == '2'
    with pytest.raises(FileExistsError, match=r"a' exists \(and 1 more\)"):
        OutputFolder(tmp_path / 'x' / 'y', ['a', 'b/c'])
    with pytest.raises(FileExistsError, match='is no folder'):
        OutputFolder(tmp_path / 'x' / 'y' / 'a', [])
