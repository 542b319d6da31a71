"""The streaming demo on real files."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

av = pytest.importorskip('av')

REPO = Path(__file__).parents[2]

CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='mmvim.VideoClassifier',
    data_preprocessor=dict(type='mmvim.VideoDataPreprocessor', num_classes=3),
    backbone=dict({backbone}, arch=dict(embed_dims=16, depth=2), img_size=32, patch_size=16,
        num_frames=4, tubelet_size=2),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=16,
        loss=dict(type='CrossEntropyLoss')))
"""
PLAIN = "type='mmvim.VideoMamba', pool='avg'"


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / 'clip.mp4'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('mpeg4', rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuv420p'
        for picture in np.random.default_rng(0).integers(0, 255, (13, 48, 64, 3), np.uint8):
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def demo(tmp_path, capfd, source, *arguments, backbone=PLAIN, width=16):
    """Run the demo in this process; returns its exit status, output and errors."""
    config = tmp_path / 'config.py'
    text = CONFIG.format(backbone=backbone).replace('in_channels=16', f'in_channels={width}')
    config.write_text(text)
    script = runpy.run_path(str(REPO / 'tools/demo/stream.py'))
    command = ['stream.py', config, 'none', source, '--device', 'cpu', *arguments]
    status = 0
    with mock.patch('sys.argv', [str(part) for part in command]):
        try:
            script['main']()
        except SystemExit as error:
            status = error.code
    out, err = capfd.readouterr()
    return SimpleNamespace(status=status, out=out, err=err)


def test_the_frames_ahead_are_those_asked_for(tmp_path):
    (tmp_path / 'config.py').write_text(CONFIG.format(backbone=PLAIN))
    script = runpy.run_path(str(REPO / 'tools/demo/stream.py'))
    words = (str(tmp_path / 'config.py'), 'none', 'x.mp4', '--device', 'cpu')
    for more, frames in ((('--lookahead-frames', '2'), 2), ((), 4)):
        args = script['parse_args']([*words, '--mode', 'lookahead', *more])
        assert script['build'](args).backbone.lookahead_steps == frames // 2


@pytest.mark.parametrize(
    ('arguments', 'backbone'),
    [
        (('--mode', 'lookahead', '--lookahead-frames', '4'), PLAIN),
        (('--mode', 'block', '--block-frames', '4', '--chunk', '8'), PLAIN),
        (('--mode', 'causal'), PLAIN),
        ((), "type='mmvim.StreamingVideoMamba', max_frames=20"),
    ],
)
def test_predicts_while_it_plays(arguments, backbone, clip, tmp_path, capfd):
    (tmp_path / 'names.txt').write_text('walking\nrunning\nresting\n')
    out = tmp_path / 'out.mp4'
    done = demo(
        tmp_path, capfd, clip, '--classes', tmp_path / 'names.txt', '--topk', '2', '--out', out,
        *arguments, backbone=backbone,
    )  # fmt: skip
    assert done.status == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith('frame ')]
    assert len(lines) >= 2
    assert 'walking' in done.out or 'running' in done.out
    assert lines[-1].split()[1] == '13'
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 13


@pytest.mark.parametrize(
    ('source', 'arguments', 'options', 'message'),
    [
        ('missing.mp4', (), {}, "'missing.mp4' does not exist"),
        ('clip', ('--chunk', '3'), {}, '--chunk 3 is no multiple of tubelet_size=2'),
        ('clip', ('--every', '0'), {}, '--every must be at least 1'),
        ('clip', ('--graph', '--device', 'cpu'), {}, '--graph needs a CUDA device'),
        ('clip', (), {'width': 32}, 'the head takes 32 channels and a stream gives 16'),
        (
            'clip',
            ('--mode', 'block'),
            {'backbone': "type='mmvim.StreamingVideoMamba'"},
            'mode of its own',
        ),
    ],
)
def test_says_what_is_wrong(source, arguments, options, message, clip, tmp_path, capfd):
    source = clip if source == 'clip' else source
    done = demo(tmp_path, capfd, source, *arguments, **options)
    assert done.status == 2
    assert message in done.err
    assert 'Traceback' not in done.err


def test_damaged_file(tmp_path, capfd):
    (tmp_path / 'bad.mp4').write_bytes(b'no video ' * 50)
    done = demo(tmp_path, capfd, tmp_path / 'bad.mp4')
    assert done.status == 2
    assert 'bad.mp4' in done.err


def test_no_part_of_an_output_is_left(clip, tmp_path, capfd):
    """A file that ends in the middle of its frames; and a file that is there already."""
    content = clip.read_bytes()
    (tmp_path / 'cut.mkv').write_bytes(content)
    with av.open(str(clip)) as source, av.open(str(tmp_path / 'cut.mkv'), 'w') as target:
        video = source.streams.video[0]
        if hasattr(target, 'add_stream_from_template'):
            copy = target.add_stream_from_template(video)
        else:  # PyAV before 14
            copy = target.add_stream(template=video)
        for packet in source.demux(video):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    whole = (tmp_path / 'cut.mkv').read_bytes()
    middle = len(whole) // 2
    noise = bytes((7 * i) % 251 for i in range(len(whole) - middle))
    (tmp_path / 'cut.mkv').write_bytes(whole[:middle] + noise)
    out = tmp_path / 'out.mp4'
    done = demo(tmp_path, capfd, tmp_path / 'cut.mkv', '--out', out)
    assert out.exists() == (done.status == 0)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]
    out.write_text('mine')
    done = demo(tmp_path, capfd, clip, '--out', out)
    assert done.status == 2
    assert "out.mp4' exists; --overwrite replaces it" in done.err
    assert out.read_text() == 'mine'
