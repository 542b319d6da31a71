"""Models of images with other than three channels, in every tool that makes its own inputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from script_runner import run_script

from mmvim.apis import build_model

ROOT = Path(__file__).parents[2]
CONFIGS = {
    'vim': ROOT / 'configs/quickstart/vim_digits_cls.py',
    'mambavision': ROOT / 'configs/quickstart/mambavision_digits_cls.py',
    'videomamba': ROOT / 'configs/quickstart/videomamba_digits_video.py',
}


@pytest.mark.parametrize(
    ('family', 'channels'), [('vim', 1), ('vim', 13), ('mambavision', 4), ('videomamba', 1)]
)
def test_tools(family, channels, tmp_path):
    cfg = Config.fromfile(CONFIGS[family])
    cfg.model.backbone.in_channels = channels
    cfg.model.data_preprocessor.update(mean=[100.0] * channels, std=[50.0] * channels)
    config, weights = tmp_path / 'c.py', tmp_path / 'x.pth'
    cfg.dump(config)
    torch.save(build_model(cfg).state_dict(), weights)

    def run(script, *args):
        result = run_script(script, *args)
        assert result.returncode == 0, result.stderr
        return result.stdout

    size = {'vim': (32, 32), 'mambavision': (64, 64), 'videomamba': (8, 32, 32)}[family]
    shape = 'x'.join(map(str, (channels, *size)))
    out = tmp_path / 'm.ts'
    assert f'input 2x{shape}' in run('export/export.py', config, out, '--weights', weights)
    assert 'm.ts' in run('export/evaluate.py', out, '--repeats', 1)
    assert 'PyTorch' in run('export/evaluate.py', '--model', config, '--repeats', 1)
    converted = run('converters/convert_checkpoint.py', config, weights, tmp_path / 'y.pth')
    assert f'outputs for 2x{shape} differ by 0' in converted
    assert shape.partition('x')[2] in run('analysis/get_flops.py', config)
    if family != 'videomamba':
        options = ('--count', 1, '--out', tmp_path / 'erf.png')
        assert 'receptive fields' in run('analysis/receptive_field.py', config, *options)
        from PIL import Image

        picture = tmp_path / 'x.png'
        cfg.test_dataloader.dataset.pipeline[0].color_type = 'unchanged'
        if channels == 1:
            cfg.test_dataloader.dataset.pipeline[0].color_type = 'grayscale'
        cfg.dump(config)
        kind = {1: 'uint8', 4: 'RGBA'}.get(channels)
        if kind:
            pixels = np.zeros((40, 40, channels), np.uint8).squeeze()
            Image.fromarray(pixels).save(picture)
            demo = run('demo/image_demo.py', config, picture, '--weights', weights)
            assert 'x.png' in demo


def test_channels_that_pillow_cannot_resize(tmp_path):
    cfg = Config.fromfile(CONFIGS['vim'])
    cfg.model.backbone.in_channels = 13
    cfg.model.data_preprocessor.update(mean=[100.0] * 13, std=[50.0] * 13)
    step = dict(type='ResizeEdge', scale=32, backend='pillow')
    for loop in ('train', 'val', 'test'):
        dataset = cfg[f'{loop}_dataloader'].dataset
        dataset.pipeline = [dataset.pipeline[0], step, dataset.pipeline[-1]]
    cfg.dump(tmp_path / 'c.py')
    result = run_script('analysis/get_flops.py', tmp_path / 'c.py')
    assert result.returncode == 2
    assert "error: Pillow resizes 8-bit images of 1, 3 or 4 channels only: backend='cv2'" in (
        result.stderr
    )


@pytest.mark.parametrize(('channels', 'dtype'), [(3, 'uint16'), (3, 'float32'), (13, 'uint8')])
def test_file_that_pillow_cannot_resize(channels, dtype):
    from mmengine.dataset import Compose

    from mmvim.cli import samples
    from mmvim.errors import SampleError

    samples.install()
    resize = dict(type='mmcv.Resize', scale=(8, 8), backend='pillow')
    with pytest.raises(SampleError, match=r"'x.tif': Pillow resizes .* backend='cv2'"):
        Compose([resize])(dict(img=np.zeros((4, 4, channels), dtype), img_path='x.tif'))
