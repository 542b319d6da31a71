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
