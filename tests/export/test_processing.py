"""Exported files that include what surrounds the model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmvim.apis import build_model
from mmvim.export.formats import export_model, open_exported
from mmvim.export.metadata import describe
from mmvim.export.processing import Processed, WholeDetector

ROOT = Path(__file__).parents[2]


def load(task):
    cfg = Config.fromfile(ROOT / f'configs/quickstart/vim_digits_{task}.py')
    torch.manual_seed(0)
    return cfg, build_model(cfg).eval()


@pytest.mark.parametrize('to_rgb', [True, False])
def test_a_classifier_of_pixels(to_rgb, tmp_path):
    cfg, model = load('cls')
    key = (
        '_channel_conversion'
        if hasattr(model.data_preprocessor, '_channel_conversion')
        else 'to_rgb'
    )
    setattr(model.data_preprocessor, key, to_rgb)
    bgr = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    data = model.data_preprocessor({'inputs': list(bgr)}, training=False)
    with torch.no_grad():
        expected = model(data['inputs'], mode='tensor').softmax(1)
    module = Processed(model, describe(cfg, model))
    export_model(module, tmp_path / 'm.ts', 'torchscript', (1, 3, 32, 32))
    (scores,) = open_exported(tmp_path / 'm.ts')(bgr.flip(1).float().numpy())
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)


def test_a_segmentor_of_pixels(tmp_path):
    cfg, model = load('seg')
    module = Processed(model, describe(cfg, model))
    export_model(module, tmp_path / 'm.ts', 'torchscript', (1, 3, 64, 64))
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 3, 64, 64)).astype(np.float32)
    (scores,) = open_exported(tmp_path / 'm.ts')(pixels)
    assert scores.shape == (2, 11, 64, 64)
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)


def test_a_whole_detector(tmp_path):
    _, model = load('det')
    export_model(WholeDetector(model), tmp_path / 'm.ts', 'torchscript', (1, 3, 64, 64))
    images = torch.rand(2, 3, 64, 64)
    given = open_exported(tmp_path / 'm.ts')(images.numpy())
    with torch.no_grad():
        expected = [x for levels in model(images, mode='tensor') for x in levels]
    assert len(given) == len(expected) == 9
    for x, y in zip(given, expected, strict=True):
        np.testing.assert_allclose(x, y.numpy(), atol=1e-4)


def test_models_that_do_not_fit():
    cfg, model = load('det')
    with pytest.raises(ValueError, match='for classifiers and segmentors'):
        Processed(model, describe(cfg, model))
    with pytest.raises(ValueError, match='ImageClassifier has no bbox_head'):
        WholeDetector(load('cls')[1])
