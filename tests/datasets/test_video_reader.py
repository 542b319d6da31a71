import os
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from video_files import coded_frames, set_display_matrix, write_video

from mmvim.datasets.video import VideoReader, VideoSampleError

av = pytest.importorskip('av')


def levels(frames):
    return frames.float().mean((1, 2, 3)).numpy()


@pytest.mark.parametrize(
    ('codec', 'suffix'),
    [
        ('mpeg4', 'mp4'),
        ('mpeg4', 'avi'),
        ('libx264', 'mp4'),
        ('libx264', 'ts'),
        ('libvpx', 'webm'),
        ('libvpx-vp9', 'webm'),
    ],
)
def test_frames_by_number(codec, suffix, tmp_path):
    if codec not in av.codecs_available:
        pytest.skip(f'this PyAV has no {codec}')
    frames = coded_frames(40)
    path = write_video(tmp_path / f'a.{suffix}', frames, codec=codec)
    indices = [39, 0, 13, 12, 11, 13, 25]
    with VideoReader(path) as video:
        assert len(video) == 40
        assert np.diff(video.timestamps) == pytest.approx(0.04, abs=2e-3)
        out = video.frames(indices)
        assert out.shape == (7, 3, 48, 64)
        assert out.dtype == torch.uint8
        np.testing.assert_allclose(levels(out), frames[indices, 0, 0, 0], atol=4)
        # All one by one, so that each seek lands somewhere else.
        each = torch.cat([video.frames([i]) for i in range(40)])
        np.testing.assert_allclose(levels(each), frames[:, 0, 0, 0], atol=4)
        assert torch.equal(each[indices], out)


def test_colours_and_channel_order(tmp_path):
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    frames[..., 0], frames[..., 1], frames[..., 2] = 200, 100, 40
    with VideoReader(write_video(tmp_path / 'a.mp4', frames)) as video:
        colour = video.frames([1]).float().mean((0, 2, 3))
    np.testing.assert_allclose(colour, [200, 100, 40], atol=6)


def quadrants():
    """Frames whose four quarters have levels of their own."""
    frames = np.zeros((3, 48, 64, 3), np.uint8)
    for level, (y, x) in zip((30, 90, 150, 210), ((0, 0), (0, 32), (24, 0), (24, 32)), strict=True):
        frames[:, y : y + 24, x : x + 32] = level
    return frames


@pytest.mark.parametrize(
    ('matrix', 'shown'),
    [
        ((1, 0, 0, 1), [[30, 90], [150, 210]]),
        ((0, 1, -1, 0), [[150, 30], [210, 90]]),  # a quarter turn clockwise
        ((-1, 0, 0, -1), [[210, 150], [90, 30]]),
        ((0, -1, 1, 0), [[90, 210], [30, 150]]),
        ((-1, 0, 0, 1), [[90, 30], [210, 150]]),  # a mirror
        ((1, 0, 0, -1), [[150, 210], [30, 90]]),
        ((0, 1, 1, 0), [[30, 150], [90, 210]]),
        ((0, -1, -1, 0), [[210, 90], [150, 30]]),
    ],
)
def test_turned_as_the_header_says(matrix, shown, tmp_path):
    path = set_display_matrix(write_video(tmp_path / 'a.mp4', quadrants()), *matrix)
    with VideoReader(path) as video:
        picture = video.frames([1])[0].float().mean(0)
        first = next(iter(video))
    height, width = picture.shape
    assert (height, width) == ((64, 48) if matrix[0] == 0 else (48, 64))
    assert first.shape == (height, width, 3)
    for each in (picture.numpy(), first.mean(-1)):
        seen = each.reshape(2, height // 2, 2, width // 2).mean((1, 3))
        np.testing.assert_allclose(seen, shown, atol=6)
    cv2 = pytest.importorskip('cv2')
    peer = cv2.VideoCapture(str(path)).read()[1]
    if matrix in ((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)):  # all that it knows
        np.testing.assert_allclose(first.mean(-1), peer.mean(-1), atol=6)


def test_square_pixels(tmp_path):
    path = write_video(tmp_path / 'a.mp4', quadrants(), pixel_aspect=Fraction(3, 2))
    with VideoReader(path) as video:
        assert video.frames([0, 2]).shape == (2, 3, 48, 96)
    set_display_matrix(path, 0, 1, -1, 0)
    with VideoReader(path) as video:
        assert video.frames([0]).shape == (1, 3, 96, 48)
        assert next(iter(video)).shape == (96, 48, 3)


def test_variable_rate(tmp_path):
    pts = np.concatenate([np.arange(10) * 20, 200 + np.arange(10) * 200])
    frames = coded_frames(20)
    with VideoReader(write_video(tmp_path / 'a.mp4', frames, pts=pts, codec='mpeg4')) as video:
        assert len(video) == 20
        np.testing.assert_allclose(video.timestamps, pts / 1000, atol=2e-3)
        np.testing.assert_allclose(levels(video.frames(range(20))), frames[:, 0, 0, 0], atol=4)


def test_bad_files(tmp_path):
    good = write_video(tmp_path / 'good.mp4', coded_frames(60)).read_bytes()
    cases = {
        'missing.mp4': (None, 'does not exist'),
        'empty.mp4': (b'', r'empty \(0 bytes\)'),
        'noise.mp4': (os.urandom(4000), 'cannot open|has no video stream'),
        'text.mp4': (b'hello ' * 100, 'cannot open|has no video stream'),
        'cut.mp4': (good[: len(good) // 2], 'cannot open'),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(VideoSampleError, match=message) as info:
            VideoReader(path)
        assert name in str(info.value)
    with pytest.raises(VideoSampleError, match='no regular file'):
        VideoReader(tmp_path)
    os.mkfifo(tmp_path / 'pipe.mp4')
    with pytest.raises(VideoSampleError, match='no regular file'):
        VideoReader(tmp_path / 'pipe.mp4')


def test_truncated_with_an_index(tmp_path):
    """The index of such a file comes first and promises frames that are not there."""
    path = write_video(
        tmp_path / 'a.mp4', np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), np.uint8),
        options={'movflags': 'faststart'},
    )  # fmt: skip
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with (
        pytest.raises(VideoSampleError, match=r'a\.mp4.*(truncated|damaged)'),
        VideoReader(path) as video,
    ):
        video.frames(range(60))


def test_damaged_inside(tmp_path):
    path = write_video(
        tmp_path / 'a.mp4', np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), np.uint8)
    )
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[2000:middle] = bytes(middle - 2000)
    path.write_bytes(content)
    # FFmpeg repairs what it can; what it cannot is an error that names the file, never a hang.
    message = ''
    try:
        with VideoReader(path) as video:
            frames = video.frames(range(len(video)))
    except VideoSampleError as error:
        message, frames = str(error), None
    assert 'a.mp4' in message or len(frames) == len(video)


def test_title_that_is_no_text(tmp_path):
    path = tmp_path / 'a.mkv'
    with av.open(str(path), 'w') as container:
        container.metadata['title'] = 'NAME' * 8
        stream = container.add_stream('mpeg4', rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuv420p'
        for picture in coded_frames(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert b'NAME' * 8 in content
    path.write_bytes(content.replace(b'NAME' * 8, b'\xff\xfe\x80NAME' + b'\xc3' * 25))
    with VideoReader(path) as video:
        assert len(video) == 5


def test_sound_only(tmp_path):
    path = tmp_path / 'sound.wav'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('pcm_s16le', rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), 's16', 'mono')
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoSampleError, match='has no video stream'):
        VideoReader(path)


def test_wrong_numbers(tmp_path):
    with VideoReader(write_video(tmp_path / 'a.mp4', coded_frames(5))) as video:
        for bad in ([5], [-1]):
            with pytest.raises(IndexError, match=r'a\.mp4.*has 5'):
                video.frames(bad)
        with pytest.raises(ValueError, match='no frames'):
            video.frames([])
        assert video.frames([4]).shape[0] == 1


def test_without_display_times(tmp_path):
    """A raw stream has no times: its frames are found by decoding from the start."""
    frames = coded_frames(20)
    path = write_video(tmp_path / 'a.m4v', frames)
    shutil.copy(path, tmp_path / 'b.m4v')
    with VideoReader(path) as video:
        assert len(video) == 20
        picked = [19, 3, 3, 0]
        np.testing.assert_allclose(levels(video.frames(picked)), frames[picked, 0, 0, 0], atol=4)
