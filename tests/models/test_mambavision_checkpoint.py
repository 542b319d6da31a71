"""Loading MambaVision checkpoints: official ones, ones of the other Δ bias, and wrong ones."""

import argparse
import logging

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.runner import save_checkpoint

from mmvim.models import MambaVision

ARCH = {
    'depths': (1, 1, 2, 1), 'embed_dims': 4, 'stem_dims': 4, 'num_heads': (2, 4),
    'window_sizes': (2, 2), 'd_state': 4,
}  # fmt: skip
DENSE = {'out_type': 'featmap', 'out_indices': (0, 1, 2, 3), 'out_norm': 'separate'}


def build(seed=0, **kwargs):
    """A small model whose Δ biases are not 0."""
    torch.manual_seed(seed)
    return MambaVision(**{'arch': ARCH, 'dt_init': 'proper', **kwargs}).eval()


def official(model, classes=5):
    """The weights as the official model names them, head included."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights['head.weight'] = torch.randn(classes, 32)
    weights['head.bias'] = torch.randn(classes)
    return weights


def assert_equal(a, b):
    other = b.state_dict()
    for name, value in a.state_dict().items():
        assert torch.equal(value, other[name]), name


@pytest.fixture
def log(caplog):
    """Log records of mmengine's current logger."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


WRAPPERS = {
    'raw': lambda w: w,
    'state_dict': lambda w: {'state_dict': w, 'epoch': 3, 'args': argparse.Namespace(lr=0.1)},
    'model': lambda w: {'model': w, 'optimizer': {}},
    'module': lambda w: {'state_dict': {f'module.{k}': v for k, v in w.items()}},
    'encoder': lambda w: {
        'state_dict': {'decoder.bias': w['norm.bias'], **{f'encoder.{k}': v for k, v in w.items()}}
    },
    'module.encoder': lambda w: {f'module.encoder.{k}': v for k, v in w.items()},
}  # fmt: skip


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_official_keys_and_wrappers(wrapper, log):
    source, model = build(seed=1), build()
    given = WRAPPERS[wrapper](official(source))
    keys = set(given)
    assert not any(model.load_state_dict(given, strict=True))
    assert_equal(model, source)
    assert set(given) == keys, "the caller's dict must not change"
    assert any("'head.weight'" in r.getMessage() for r in log.records)


def test_official_file_through_mmengine(tmp_path):
    source = build(seed=1)
    torch.save(WRAPPERS['state_dict'](official(source)), tmp_path / 'official.pth')
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'official.pth')}
    model = build(init_cfg=init_cfg)
    model.init_weights()
    assert_equal(model, source)


def test_dense_model_reads_classification_weights(log):
    source, model = build(seed=1), build(**DENSE)
    result = model.load_state_dict(official(source), strict=False)
    assert result.missing_keys == [
        f'outnorm{i}.{name}' for i in range(4) for name in ('weight', 'bias')
    ]
    assert not result.unexpected_keys
    own, given = (m.levels[3].blocks[0].mixer.in_proj.weight for m in (model, source))
    assert torch.equal(own, given)
    assert any("'norm.running_var'" in r.getMessage() for r in log.records)
    with pytest.raises(RuntimeError, match=r'outnorm0\.weight'):
        model.load_state_dict(official(source), strict=True)


def test_own_checkpoint_with_prefix(tmp_path):
    source = build(seed=1, double_dt_bias=False)
    parent = torch.nn.Module()
    parent.backbone = source
    save_checkpoint({'state_dict': parent.state_dict()}, str(tmp_path / 'own.pth'))
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'own.pth')}
    model = build(double_dt_bias=False, init_cfg={**init_cfg, 'prefix': 'backbone.'})
    model.init_weights()
    assert_equal(model, source)
    with pytest.raises(ValueError, match=r"a MambaVision's keys stand under 'backbone\.'"):
        build(init_cfg=init_cfg).init_weights()


@pytest.mark.parametrize('double', [True, False])
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_checkpoint_of_the_other_delta_bias(double, prefix, log):
    source, model = build(seed=1, double_dt_bias=double), build(double_dt_bias=not double)
    given = {prefix + k: v for k, v in source.state_dict().items()}
    before = {k: v.clone() for k, v in given.items()}
    target = model
    if prefix:
        target = torch.nn.Module()
        target.backbone = model
    assert not any(target.load_state_dict(given, strict=True))
    factor = 2 if double else 0.5
    bias = source.levels[3].blocks[0].mixer.dt_proj.bias
    assert torch.equal(model.levels[3].blocks[0].mixer.dt_proj.bias, factor * bias)
    assert all(torch.equal(v, given[k]) for k, v in before.items())
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images)[0], source(images)[0])
    assert any(f'multiplied by {factor:g}' in r.getMessage() for r in log.records)
    again = build(seed=2, double_dt_bias=not double)
    assert not any(again.load_state_dict(model.state_dict(), strict=True))
    assert_equal(again, model)


def resnet():
    return {'conv1.weight': torch.zeros(64, 3, 7, 7), 'layer1.0.conv1.weight': torch.zeros(1)}


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: build(arch={**ARCH, 'embed_dims': 8}).state_dict(), r'there and .* here \(and'),
        (lambda: build(arch={**ARCH, 'depths': (1, 1, 3, 1)}).state_dict(), r'depths are .*3, 1'),
        (lambda: build(arch={**ARCH, 'depths': (1, 1, 1, 1)}).state_dict(), r'depths are .*1, 1'),
        (lambda: build(arch={**ARCH, 'd_state': 8}).state_dict(), r'A_log is \(8, 8\) there'),
        (lambda: build(layer_scale=0.1).state_dict(), 'it has a layer scale'),
        (resnet, r'another model\'s: conv1\.weight'),
    ],
)
def test_another_model(make, message):
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f'does not fit this MambaVision.*{message}') as error:
        model.load_state_dict(make(), strict=False)
    assert '\n' not in str(error.value)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_layer_scale_that_the_checkpoint_lacks():
    with pytest.raises(ValueError, match='it has no layer scale'):
        build(layer_scale=0.1).load_state_dict(build().state_dict(), strict=False)
