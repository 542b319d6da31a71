"""Demos that go on without files that cannot be read."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from script_runner import run_script

from mmvim.apis.videos import VideoWriter

CONFIGS = Path(__file__).parents[2] / 'configs/quickstart'


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
@pytest.mark.parametrize('batch', [1, 3])
def test_images(task, batch, tmp_path):
    photos = tmp_path / 'photos'
    photos.mkdir()
    for name in 'abcdef':
        Image.new('RGB', (40, 40), (90, 30, 200)).save(photos / f'{name}.png')
    whole = (photos / 'a.png').read_bytes()
    for name, content in (('a', b''), ('c', whole[:60]), ('f', b'text')):
        (photos / f'{name}.png').write_bytes(content)
    (photos / 'g.png').mkdir()  # no image, and no folder of images either
    config = CONFIGS / f'vim_digits_{task}.py'
    options = (photos, '--batch-size', batch, '--no-progress', '--out-dir', tmp_path / 'out')
    refused = run_script('demo/image_demo.py', config, *options)
    assert refused.returncode == 2
    assert 'a.png' in refused.stderr
    assert '--skip-failures goes on without it' in refused.stderr
    assert not (tmp_path / 'out').exists()
    done = run_script('demo/image_demo.py', config, *options, '--skip-failures')
    assert done.returncode == 0, done.stderr
    for name in 'acf':
        assert f'{name}.png' in done.stderr
    assert '3 of 6 files were skipped' in done.stderr
    found = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert [Path(entry['image']).name for entry in found] == ['b.png', 'd.png', 'e.png']
    assert [Path(entry['picture']).name for entry in found] == ['b.png', 'd.png', 'e.png']
    assert sorted(x.name for x in (tmp_path / 'out/vis').iterdir()) == ['b.png', 'd.png', 'e.png']
    none = run_script('demo/image_demo.py', config, photos / 'a.png', '--skip-failures')
    assert none.returncode == 2
    assert 'none of the 1 files can be read' in none.stderr


@pytest.mark.parametrize('config', ['vim_digits_cls', 'videomamba_digits_video'])
def test_videos(config, tmp_path):
    pytest.importorskip('av')
    videos = tmp_path / 'videos'
    videos.mkdir()
    rng = np.random.default_rng(0)
    for name in 'abc':
        with VideoWriter(videos / f'{name}.mp4', 10) as video:
            for _ in range(30):
                video.write(rng.integers(0, 255, (32, 32, 3), np.uint8))
    whole = (videos / 'b.mp4').read_bytes()
    (videos / 'b.mp4').write_bytes(whole[: len(whole) // 2])
    config = CONFIGS / f'{config}.py'
    options = (videos, '--no-progress', '--out-dir', tmp_path / 'out')
    assert run_script('demo/video_demo.py', config, *options).returncode == 2
    done = run_script('demo/video_demo.py', config, *options, '--skip-failures')
    assert done.returncode == 0, done.stderr
    assert '1 of 3 files were skipped' in done.stderr
    found = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert [Path(entry['drawn']).name for entry in found] == ['a.mp4', 'c.mp4']
