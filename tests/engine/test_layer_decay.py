"""Learning rate and weight decay of every parameter under layer-wise decay."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmvim.models import Vim

LR, DECAY, RATE = 1e-2, 0.05, 0.5
DEPTH = 3
PARAMWISE = {
    'layer_decay_rate': RATE,
    'norm_decay_mult': 0.1,
    'bias_decay_mult': 0.2,
    'flat_decay_mult': 0.3,
    'custom_keys': {
        'A_log': {'decay_mult': 0.0},
        'cls_token': {'decay_mult': 0.0},
        'pos_embed': {'decay_mult': 0.0},
        'head': {'lr_mult': 3.0, 'decay_mult': 2.0},
    },
}


class Detector(nn.Module):
    """Has what detectors, segmentors and classifiers have in common: a backbone and other parts."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 2)


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


def vim(**kwargs) -> Vim:
    arch = {'embed_dims': 8, 'depth': DEPTH, 'd_state': 4}
    return Vim(arch=arch, img_size=32, patch_size=16, **kwargs)


def build(model: nn.Module, paramwise: dict = PARAMWISE, **optimizer) -> torch.optim.Optimizer:
    options = {'type': 'AdamW', 'lr': LR, 'weight_decay': DECAY, **optimizer}
    config = {
        'constructor': 'mmvim.LayerDecayOptimizerConstructor',
        'optimizer': {key: value for key, value in options.items() if value is not None},
        'paramwise_cfg': paramwise,
    }
    return build_optim_wrapper(model, config).optimizer


def settings(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    of_parameter = {
        id(p): (group['lr'], group['weight_decay'])
        for group in optimizer.param_groups
        for p in group['params']
    }
    return {name: of_parameter[id(p)] for name, p in model.named_parameters()}


def expected_layer(name: str) -> int:
    if name.startswith('layers.'):
        return int(name.split('.')[1]) + 1
    return 0 if name.startswith(('patch_embed', 'pos_embed', 'cls_token')) else DEPTH + 1


@pytest.mark.parametrize('wrap', [False, True], ids=['plain', 'distributed'])
@pytest.mark.parametrize('bare', [False, True], ids=['detector', 'backbone'])
def test_every_parameter(bare, wrap):
    backbone = vim()
    model = backbone if bare else Detector(backbone)
    found = settings(model, build(Wrapped(model) if wrap else model))
    prefix = '' if bare else 'backbone.'
    norms = {
        f'{prefix}{name}'
        for name, module in backbone.named_modules()
        if 'Norm' in type(module).__name__
    }
    kinds = set()
    for name, (lr, decay) in found.items():
        owner, _, leaf = name.rpartition('.')
        parameter = model.get_parameter(name)
        scale = 1.0
        if name.startswith(prefix):
            scale = RATE ** (DEPTH + 1 - expected_layer(name.removeprefix(prefix)))
        if 'A_log' in name or leaf in ('cls_token', 'pos_embed'):
            kind, mult = leaf, 0.0
        elif name.startswith('head.'):
            kind, mult, scale = 'head', 2.0, 3.0
        elif owner in norms:
            kind, mult = 'norm', 0.1
        elif leaf == 'bias':
            kind, mult = 'bias', 0.2
        elif parameter.ndim == 1:
            kind, mult = 'flat', 0.3
        else:
            kind, mult = 'weight', 1.0
        kinds.add(kind)
        assert lr == pytest.approx(LR * scale), name
        assert decay == pytest.approx(DECAY * mult), name
    assert {'A_log', 'cls_token', 'pos_embed', 'norm', 'bias', 'flat', 'weight'} <= kinds


def test_the_longest_part_of_a_name_decides():
    model = vim()
    keys = {
        'layer': dict(decay_mult=0.5),
        'layers.0.mixer': dict(decay_mult=0.25),
        'x_proj': dict(decay_mult=0.75),
        'mixer.': dict(decay_mult=2.0),  # as long as x_proj, and before it in the alphabet
    }
    found = settings(model, build(model, {'layer_decay_rate': 0.5, 'custom_keys': keys}))
    for name, mult in (
        ('layers.0.mixer.x_proj.weight', 0.25),
        ('layers.1.mixer.x_proj.weight', 2.0),
        ('layers.1.norm.weight', 0.5),
        ('patch_embed.proj.weight', 1.0),
    ):
        assert found[name][1] == pytest.approx(DECAY * mult), name


@pytest.mark.parametrize('norm', ['RMSNorm', 'LayerNorm'])
def test_norm_layers_of_both_kinds(norm):
    backbone = vim(norm=norm)
    found = settings(backbone, build(backbone))
    decays = [decay for name, (_, decay) in found.items() if 'norm' in name]
    assert len(decays) >= DEPTH + 1
    assert decays == [pytest.approx(DECAY * 0.1)] * len(decays)


def test_parameters_with_equal_settings_share_a_group():
    model = Detector(vim())
    optimizer = build(model)
    keys = [(g['layer_id'], g['lr'], g['weight_decay']) for g in optimizer.param_groups]
    assert len(keys) == len(set(keys)) < len(list(model.parameters())) / 2
    count = sum(len(group['params']) for group in optimizer.param_groups)
    assert count == len(list(model.parameters()))


def test_frozen_and_shared_parameters():
    model = Detector(vim())
    model.neck.requires_grad_(False)
    model.tied = model.head
    ours = {id(p) for g in build(model).param_groups for p in g['params']}
    assert ours == {id(p) for p in model.parameters() if p.requires_grad}


def test_without_weight_decay():
    paramwise = {'layer_decay_rate': RATE}
    groups = build(vim(), paramwise, type='SGD', weight_decay=None).param_groups
    assert len(groups) == DEPTH + 2


def test_real_classifier():
    """In the scope of a task library the constructor is found by its name."""
    mmpretrain = pytest.importorskip('mmpretrain')
    from mmengine.registry import DefaultScope

    arch = {'embed_dims': 8, 'depth': DEPTH, 'd_state': 4}
    head = {'type': 'LinearClsHead', 'num_classes': 2, 'in_channels': 8}
    backbone = {'type': 'mmvim.Vim', 'arch': arch, 'img_size': 32, 'patch_size': 16}
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = mmpretrain.registry.MODELS.build(
            {'type': 'ImageClassifier', 'backbone': backbone, 'head': head}
        )
        found = settings(model, build(model))
    assert found['backbone.pos_embed'] == (pytest.approx(LR * RATE ** (DEPTH + 1)), 0.0)
    assert found['head.fc.weight'] == (pytest.approx(LR * 3), pytest.approx(DECAY * 2))


@pytest.mark.parametrize(
    ('paramwise', 'message'),
    [
        ({'layer_decay_rate': 0.5, 'decay_type': 'layer_wise'}, "unknown key 'decay_type'"),
        ({'decay_rate': 0.5}, "'decay_rate' .*'layer_decay_rate'"),
        ({'norm_decay_mult': 0.0}, r'layer_decay_rate must be a number in \(0, 1\], not None'),
        ({'layer_decay_rate': 1.5}, 'not 1.5'),
        ({'layer_decay_rate': '0.5'}, "not '0.5'"),
        (
            {'layer_decay_rate': 0.5, 'custom_keys': {'norm': {'decay_mul': 0}}},
            r"custom_keys\['norm'\] has unknown keys \['decay_mul'\]; allowed: lr_mult, decay_mult",
        ),
    ],
)
def test_bad_settings(paramwise, message):
    with pytest.raises(ValueError, match=message):
        build(vim(), paramwise)


def test_models_without_depths():
    with pytest.raises(TypeError, match='Linear, and it has none'):
        build(nn.Linear(2, 2))
    with pytest.raises(TypeError, match='its backbone Linear has none'):
        build(Detector(nn.Linear(2, 2)))


def test_missing_learning_rate_or_decay():
    with pytest.raises(ValueError, match='lr must be given'):
        build(vim(), lr=None)
    with pytest.raises(ValueError, match='weight_decay'):
        build(vim(), {'layer_decay_rate': 1.0, 'flat_decay_mult': 0.0}, weight_decay=None)
