"""Schedules, regularisation, windows and sizes of MambaVision's recipes."""

import argparse
import math

import pytest
import torch
from config_harness import CONFIG_ROOT, build_model, cut_depth
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, PARAM_SCHEDULERS
from mmengine.runner import load_checkpoint

from mmvim import MambaVision
from mmvim.layers import DropPath

FOLDER = CONFIG_ROOT / 'mambavision'
SCRATCH = sorted(FOLDER.glob('*32xb128_in1k.py'))
DENSE = sorted([*FOLDER.glob('*coco.py'), *FOLDER.glob('*ade20k*.py')])
ALL = sorted(FOLDER.glob('*.py'))
PUBLISHED = {
    # arch: MESA's weight and start, warm-up, weight decay, short side before the crop
    'tiny': (0.5, 0.25, 20, 0.05, 224),
    'tiny2': (0.75, 0.25, 20, 0.05, 228),
    'small': (1.0, 0.25, 20, 0.05, 240),
    'base': (1.0, 0.3, 35, 0.075, 224),
    'large': (6.0, 0.25, 20, 0.12, 224),
    'large2': (6.0, 0.25, 20, 0.12, 224),
}


def load(path):
    return Config.fromfile(path)


def ids(path):
    return path.stem


def rates(cfg, length=50):
    """Learning rates at the beginning of each epoch, with ``length`` iterations in each."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = []
    for options in map(dict, cfg.param_scheduler):
        kind = PARAM_SCHEDULERS.get(options.pop('type'))
        if options.pop('convert_to_iter_based', False):
            options['epoch_length'] = length
            kind = kind.build_iter_from_epoch
        schedulers.append(kind(optimizer=optimizer, **options))
    seen = []
    for _ in range(cfg.train_cfg.max_epochs):
        seen.append(optimizer.param_groups[0]['lr'])
        for _ in range(length):
            optimizer.step()
            for scheduler in schedulers:
                if not scheduler.by_epoch:
                    scheduler.step()
        for scheduler in schedulers:
            if scheduler.by_epoch:
                scheduler.step()
    return seen


@pytest.mark.parametrize('path', SCRATCH, ids=ids)
def test_published_imagenet_recipe(path):
    cfg = load(path)
    weight, start, warmup, decay, side = PUBLISHED[cfg.model.backbone.arch]
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('Lamb', 5e-3, decay)
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=5.0)
    assert cfg.model.type == 'mmvim.MesaClassifier'
    assert cfg.model.mesa_weight == weight * 50
    hooks = {hook.type: hook for hook in cfg.custom_hooks}
    assert hooks['EMAHook'].momentum == pytest.approx(1 - 0.9998)
    assert hooks['EMAHook'].update_buffers is True
    mesa = HOOKS.build(dict(hooks['mmvim.MesaHook']))
    begun = [epoch for epoch in range(320) if epoch / 320 > mesa.start]
    assert begun == [epoch for epoch in range(320) if epoch / 310 > start]
    lr = rates(cfg)
    assert lr[0] == pytest.approx(1e-6)
    for epoch, value in enumerate(lr):
        cosine = 0.5 * (1 + math.cos(math.pi * min(epoch, 310) / 310))
        expected = 5e-6 + (5e-3 - 5e-6) * cosine
        if epoch < warmup:
            # The official warm-up rises to the peak; here it multiplies the cosine.
            expected = cosine * (1e-6 + (5e-3 - 1e-6) * epoch / warmup)
        assert value == pytest.approx(expected, rel=5e-3), epoch
    assert cfg.test_dataloader.dataset.pipeline[1].scale == side
    assert cfg.val_dataloader.dataset.pipeline == cfg.test_dataloader.dataset.pipeline


def test_lamb_is_mmpretrain_s():
    from mmpretrain.engine.optimizers import Lamb

    cfg = load(SCRATCH[0])
    cut_depth(cfg.model)
    model = build_model(cfg)
    assert type(build_optim_wrapper(model, cfg.optim_wrapper).optimizer) is Lamb


@pytest.mark.parametrize('path', ALL, ids=ids)
def test_drop_path_reaches_the_blocks(path):
    cfg = load(path)
    with torch.device('meta'):
        backbone = MODELS.build(dict(cfg.model.backbone, init_cfg=None))
    assert type(backbone) is MambaVision
    found = [m.drop_prob for m in backbone.modules() if isinstance(m, DropPath)]
    dense = cfg.default_scope != 'mmpretrain'
    largest = 0.2 if dense else MambaVision.arch_zoo[backbone_arch(cfg)]['drop_path_rate']
    assert found == pytest.approx([largest * i / (len(found) - 1) for i in range(len(found))])
    scaled = backbone_arch(cfg) in ('base', 'large', 'large2', 'large3')
    assert (backbone.layer_scale is not None) is scaled


def backbone_arch(cfg):
    return cfg.model.backbone.arch


@pytest.mark.parametrize('size', [(512, 224), (333, 517)])
@pytest.mark.parametrize('path', DENSE, ids=ids)
def test_strides_of_dense_backbones(path, size):
    cfg = load(path)
    cut_depth(cfg.model)
    torch.manual_seed(0)
    backbone = MODELS.build(dict(cfg.model.backbone, init_cfg=None)).eval()
    with torch.inference_mode():
        maps = backbone(torch.randn(1, 3, *size))
    for i, (out, channels) in enumerate(zip(maps, backbone.embed_dims, strict=True)):
        stride = 4 * 2**i
        assert out.shape == (1, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert out.isfinite().all()
    needed = cfg.model.neck.in_channels if cfg.model.get('neck') else None
    needed = needed or cfg.model.decode_head.in_channels
    assert list(needed) == backbone.embed_dims


@pytest.mark.parametrize('size', [(512, 224), (333, 517)])
@pytest.mark.parametrize('name', ['mambavision-tiny_32xb128_in1k', 'mambavision-base_32xb128_in1k'])
def test_classifiers_take_any_size(name, size):
    cfg = load(FOLDER / f'{name}.py')
    cut_depth(cfg.model)
    with torch.inference_mode():
        logits = build_model(cfg).eval()(torch.randn(1, 3, *size))
    assert logits.shape == (1, 1000)
    assert logits.isfinite().all()


@pytest.mark.parametrize('name', ['coco', 'ade20k-512x512'])
def test_official_windows_are_one_option_away(name):
    """With a map as large as the official window there is no padding: both give the same."""
    path = next(FOLDER.glob(f'*mambavision-tiny_*{name}.py'))
    cfg = load(path)
    cut_depth(cfg.model)
    cfg.model.backbone.arch.update(embed_dims=16, num_heads=(4, 8))
    outputs = []
    for windows in ((None, None), (8, 8, 8, 4)):
        torch.manual_seed(0)
        backbone = dict(cfg.model.backbone, init_cfg=None, window_sizes=windows)
        model = MODELS.build(backbone).eval()
        with torch.inference_mode():
            outputs.append([model(torch.ones(1, 3, *size)) for size in ((128, 128), (96, 128))])
    for whole, windowed in zip(outputs[0][0], outputs[1][0], strict=True):
        torch.testing.assert_close(whole, windowed)
    assert not torch.allclose(outputs[0][1][2], outputs[1][1][2])


def test_keys_of_another_backbone_are_refused():
    cfg = load(DENSE[0])
    for key, value in (('depth', 50), ('frozen', 1), ('norm_eval', True), ('drop_path', 0.5)):
        with pytest.raises(TypeError, match=key):
            MODELS.build(dict(cfg.model.backbone, **{key: value}))


@pytest.fixture(scope='module')
def official(tmp_path_factory):
    """A file with the keys and the wrapping of the authors' tiny model, and its weights."""
    torch.manual_seed(1)
    backbone = MambaVision('tiny')
    weights = {name: value.detach().clone() for name, value in backbone.state_dict().items()}
    weights['head.weight'], weights['head.bias'] = torch.randn(1000, 640), torch.randn(1000)
    path = tmp_path_factory.mktemp('official') / 'mambavision_tiny_1k.pth.tar'
    torch.save({'state_dict': weights, 'epoch': 1, 'args': argparse.Namespace(lr=1)}, path)
    return str(path), weights


def assert_loaded(backbone, weights):
    own = backbone.state_dict()
    found = [name for name in own if name in weights]
    assert len(found) > 240
    for name in found:
        assert torch.equal(own[name], weights[name]), name


@pytest.mark.parametrize('path', [p for p in DENSE if 'tiny' in p.stem], ids=ids)
def test_dense_recipes_start_from_official_weights(path, official):
    file, weights = official
    cfg = load(path)
    init_cfg = cfg.model.backbone.init_cfg
    assert init_cfg.checkpoint == (
        'https://huggingface.co/nvidia/MambaVision-T-1K/resolve/main/mambavision_tiny_1k.pth.tar'
    )
    init_cfg.checkpoint = file
    model = build_model(cfg)
    model.backbone.init_weights()
    assert_loaded(model.backbone, weights)


def test_classifier_reads_official_weights(official):
    file, weights = official
    model = build_model(load(FOLDER / 'mambavision-tiny_32xb128_in1k.py'))
    load_checkpoint(model, file, strict=True)
    assert_loaded(model.backbone, weights)
    assert torch.equal(model.head.fc.weight, weights['head.weight'])
