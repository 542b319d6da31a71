"""Every config runs in the demos, and so in the inferencers, as it stands."""

import json

import numpy as np
import pytest
from config_harness import CONFIGS, kinds, shrink
from mmengine.config import Config
from PIL import Image
from script_runner import run_script

from mmvim.apis.inferencers.pipeline import reads_videos
from mmvim.apis.videos import VideoWriter


@pytest.mark.parametrize('path', kinds(CONFIGS))
def test_demo(path, miniature_data, tmp_path):
    cfg = shrink(Config.fromfile(path), miniature_data, tmp_path)
    cfg.dump(tmp_path / 'config.py')
    if reads_videos(cfg):
        subject = tmp_path / 'a.mp4'
        with VideoWriter(subject, rate=10) as video:
            for level in range(20):
                video.write(np.full((48, 64, 3), 10 * level, np.uint8))
        script, empty = 'demo/video_demo.py', '--no-video'
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
        subject = tmp_path / 'a.jpg'
        Image.fromarray(pixels).save(subject)
        script, empty = 'demo/image_demo.py', '--no-pictures'
    out = tmp_path / 'out'
    result = run_script(
        script, tmp_path / 'config.py', subject, '--out-dir', out, '--device', 'cpu', empty,
        '--no-progress',
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (prediction,) = json.loads((out / 'predictions.json').read_text())
    assert {'classes', 'objects', 'areas'} & set(prediction)
