"""The contract of every registered backbone; a new one needs a row in the table, and no test."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from mmengine.runner import load_checkpoint, save_checkpoint
from torch import nn

from mmvim import _names
from mmvim._arguments import parameters
from mmvim.models.backbones.base import Backbone
from mmvim.registry import MODELS


@dataclass(frozen=True)
class Row:
    """A small model.

    Attributes:
        name: Name in the registry.
        arguments: Of the model; all keys of ``arch`` are given.
        shape: Of an input without its batch.
        depths: Blocks of each stage.
        stem: Beginnings of the names of all parts before the stages.
        stages: Name of the list of stages.
        maps: Arguments that make outputs (batch, channels, rows, columns), or None if none do.
        side: Rows of the map of a stage (from 0) for an image of so many rows.
    """

    name: str
    arguments: dict
    shape: tuple[int, ...]
    depths: tuple[int, ...]
    stem: tuple[str, ...]
    stages: str = 'layers'
    maps: dict | None = None
    side: Callable[[int, int], int] = lambda side, stage: side // 4


PLAIN = {'embed_dims': 16, 'depth': 2, 'd_state': 4, 'd_conv': 4, 'expand': 2, 'dt_rank': 1}
HYBRID = {
    'depths': (1, 2, 2, 3), 'embed_dims': 8, 'stem_dims': 8, 'num_heads': (2, 4), 'd_state': 4,
    'window_sizes': (3, 2), 'mlp_ratio': 4, 'drop_path_rate': 0.0, 'layer_scale': 1.0,
    'd_conv': 3, 'expand': 1,
}  # fmt: skip
SCANS_2D = {
    'depths': (1, 2, 2, 3), 'embed_dims': 8, 'ssm_ratio': 1.0, 'd_state': 2, 'dt_rank': 1,
    'd_conv': 3, 'conv_bias': False, 'mlp_ratio': 2.0, 'forward_type': 'v05_noz',
    'patchembed_version': 'v2', 'downsample_version': 'v3', 'drop_path_rate': 0.0,
}  # fmt: skip
VANILLA = {
    **SCANS_2D, 'ssm_ratio': 2.0, 'conv_bias': True, 'mlp_ratio': 0.0, 'forward_type': 'v0',
    'patchembed_version': 'v1', 'downsample_version': 'v1',
}  # fmt: skip
SMALL = {'arch': PLAIN, 'img_size': 16, 'patch_size': 4}
TOKENS = ('patch_embed', 'cls_token', 'pos_embed', 'drop_after_pos')
VIDEO = (*TOKENS, 'temporal_pos_embedding')
MAPS = {'out_type': 'featmap'}

ROWS = {
    'vim': Row('Vim', SMALL, (3, 16, 16), (1, 1), TOKENS, maps=MAPS),
    'vim-rope': Row(
        'Vim', {**SMALL, 'cls_token': 'double', 'rope': True, 'rope_residual': True}, (3, 16, 16),
        (1, 1), TOKENS, maps=MAPS,
    ),
    'videomamba-image': Row('VideoMamba', SMALL, (3, 16, 16), (1, 1), TOKENS, maps=MAPS),
    'videomamba': Row(
        'VideoMamba', {**SMALL, 'num_frames': 4}, (3, 4, 16, 16), (1, 1), VIDEO,
        maps={'out_type': 'frame_featmap'},
    ),
    'streaming': Row(
        'StreamingVideoMamba', {**SMALL, 'num_frames': 4}, (3, 4, 16, 16), (1, 1), VIDEO
    ),
    'mambavision': Row(
        'MambaVision', {'arch': HYBRID, 'layer_scale_conv': 1.0}, (3, 64, 64),
        (1, 2, 2, 3), ('patch_embed',), 'levels', MAPS,
        lambda side, stage: -(-side // 2 ** (stage + 2)),
    ),
    'vmamba': Row(
        'VMamba', {'arch': SCANS_2D}, (3, 64, 64), (1, 2, 2, 3), ('patch_embed',), maps=MAPS,
        side=lambda side, stage: -(-side // 2 ** (stage + 2)),
    ),
    'vmamba-vanilla': Row(
        'VMamba', {'arch': VANILLA}, (3, 64, 64), (1, 2, 2, 3), ('patch_embed',), maps=MAPS,
        side=lambda side, stage: -(-(side // 4) // 2**stage),
    ),
}  # fmt: skip
MAPPED = [name for name, row in ROWS.items() if row.maps]
REGISTERED = {
    name: model for name in _names.MODELS if issubclass(model := _names.load(name), Backbone)
}
every_row = pytest.mark.parametrize('row', ROWS.values(), ids=ROWS)
mapped_rows = pytest.mark.parametrize('row', [ROWS[name] for name in MAPPED], ids=MAPPED)


def create(row, **arguments):
    return MODELS.build({'type': f'mmvim.{row.name}', **row.arguments, **arguments})


def build(row, seed=0, **arguments):
    """A model in float64 with no parameter or statistic left at 0 or 1."""
    torch.manual_seed(seed)
    model = create(row, **arguments).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if 'running' in name:
                buffer += 0.5 * torch.rand_like(buffer)
    return model


def inputs(row, *sides, batch=2):
    torch.manual_seed(1)
    shape = (*row.shape[:-2], *sides) if sides else row.shape
    return torch.randn(batch, *shape, dtype=torch.float64)


def loss_of(outputs):
    return sum(x.float().square().sum() if x.dtype == torch.bfloat16 else x.square().sum()
               for x in outputs)  # fmt: skip


def place(row, name):
    """Least ``frozen_stages`` that freezes a part, and its depth; (None, None) of the stages."""
    if name.startswith(row.stem):
        return 0, 0
    first, *rest = name.split('.')
    if first != row.stages:
        return len(row.depths), sum(row.depths) + 1
    if not rest or (rest[1:2] == ['blocks'] and not rest[2:]):
        return None, None
    stage = int(rest[0])
    is_block = rest[1:2] == ['blocks']
    within = int(rest[2]) + 1 if is_block else row.depths[stage]
    return stage + 1, sum(row.depths[:stage]) + within


def assert_same_gradients(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f'{name}: {m}')


def assert_same_weights(model, other):
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_every_registered_backbone_has_a_row():
    rows = {REGISTERED[row.name] for row in ROWS.values()}
    assert rows == set(REGISTERED.values())


@every_row
def test_out_of_the_registry_with_a_copy(row):
    model = build(row)
    assert type(model) is REGISTERED[row.name]
    assert model.depths == row.depths
    images = inputs(row)
    outputs = model(images)
    assert isinstance(outputs, tuple)
    for out, other in zip(outputs, copy.deepcopy(model)(images), strict=True):
        torch.testing.assert_close(out, other)


@mapped_rows
@pytest.mark.parametrize('size', [(16, 16), (64, 40), (33, 70), (20, 9), (4, 4)])
def test_any_size(row, size):
    """Maps have the sizes that they should have, and an image does not see its neighbours."""
    count = len(row.depths)
    model = build(row, **row.maps, out_indices=tuple(range(count)))
    images = inputs(row, *size)
    outputs, alone = model(images), model(images[:1])
    assert len(outputs) == count
    for stage, (out, first) in enumerate(zip(outputs, alone, strict=True)):
        assert out.shape[2:] == tuple(row.side(n, stage) for n in size)
        assert out.isfinite().all()
        torch.testing.assert_close(out[: len(first)], first)
        if min(size) > 4:
            assert not torch.allclose(out[len(first) :], first)


@mapped_rows
def test_out_indices(row):
    count = len(row.depths)
    everything = build(row, **row.maps, out_indices=tuple(range(count)), out_norm='none')
    images = inputs(row)
    outputs = everything(images)
    for index in range(-count, count):
        model = build(row, **row.maps, out_indices=index, out_norm='none')
        assert model.out_indices == (index % count,)
        (out,) = model(images)
        torch.testing.assert_close(out, outputs[index])
        out.sum().backward()
        for name, parameter in model.named_parameters():
            needed = place(row, name)[0] <= index % count + 1 and 'downsample' not in name
            if 'downsample' in name:
                needed = place(row, name)[0] <= index % count
            assert (parameter.grad is not None) is needed, name
    for bad in ((), count, -count - 1, (0, 0), (1, 0), '0', 0.5, True):
        with pytest.raises(ValueError, match='out_indices='):
            create(row, out_indices=bad)


@mapped_rows
@pytest.mark.parametrize('out_norm', ['final', 'separate', 'none'])
def test_every_parameter_gets_a_gradient(row, out_norm):
    outputs = tuple(range(len(row.depths)))
    model = build(row, **row.maps, out_norm=out_norm, out_indices=outputs).train()
    loss_of(model(inputs(row))).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@every_row
def test_frozen_stages(row):
    count = len(row.depths)
    for frozen_stages in range(-1, count + 1):
        model = build(row, frozen_stages=frozen_stages, drop_path_rate=0.5).train()
        before = copy.deepcopy(model.state_dict())
        outputs = model(inputs(row))
        if frozen_stages < count:
            loss_of(outputs).backward()
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
        for name, parameter in model.named_parameters():
            is_frozen = place(row, name)[0] <= frozen_stages
            assert parameter.requires_grad is not is_frozen, name
            assert (parameter.grad is None) is is_frozen, name
        for name, value in model.state_dict().items():
            is_frozen = place(row, name)[0] <= frozen_stages
            if is_frozen or 'running_mean' in name:
                assert torch.equal(value, before[name]) is is_frozen, name
        for mode in (model, model.eval().train()):
            for name, module in mode.named_modules():
                if name and (since := place(row, name)[0]) is not None:
                    assert module.training is (since > frozen_stages), name
        assert not any(m.training for m in model.eval().modules())
    for bad in (-2, count + 1, 0.5, True, None):
        with pytest.raises(ValueError, match='frozen_stages='):
            create(row, frozen_stages=bad)


@every_row
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_layer_depth(row, prefix):
    model = create(row)
    count = sum(row.depths) + 2
    found = set()
    for name, _ in model.named_parameters():
        expected = place(row, name)[1]
        assert model.get_layer_depth(prefix + name, prefix) == (expected, count), name
        found.add(expected)
    assert found == set(range(count))
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (count - 1, count)


@every_row
def test_token_layout(row):
    last = len(row.depths) - 1
    layout = create(row).token_layout((2, *row.shape), f'{row.stages}.{last}')
    assert layout.size == tuple(row.side(n, last) for n in row.shape[-2:])


def blocks_of(model, row):
    stages = getattr(model, row.stages)
    return [block for stage in stages for block in getattr(stage, 'blocks', [stage])]


@every_row
def test_checkpointing_changes_neither_gradients_nor_statistics(row):
    plain, model = (build(row, with_cp=with_cp).train() for with_cp in (False, True))
    calls = []
    for block in blocks_of(model, row):
        # Streaming models call the parts of a block.
        mixers = [
            m for n, m in block.named_modules() if n in ('mixer.in_proj', 'op.in_proj', 'conv1')
        ]
        (mixers or [block.mixer])[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for each in (plain, model):
        loss_of(each(inputs(row))).backward()
    assert_same_gradients(plain, model)
    for (name, buffer), other in zip(plain.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(other, buffer, msg=lambda m, name=name: f'{name}: {m}')
    for module, other in zip(plain.modules(), model.modules(), strict=True):
        assert getattr(module, 'momentum', None) == getattr(other, 'momentum', None)
    if row.name != 'StreamingVideoMamba':
        assert len(calls) == 2 * sum(row.depths)


@every_row
@pytest.mark.parametrize('with_cp', [False, True])
def test_compiles_without_graph_break(row, with_cp):
    torch._dynamo.reset()
    plain, model = build(row).train(), build(row, with_cp=with_cp).train()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    images = inputs(row)
    outputs, expected = compiled(images), plain(images)
    for out, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(out, other)
    for each in (outputs, expected):
        loss_of(each).backward()
    assert_same_gradients(plain, model)
    for buffer, other in zip(plain.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(other, buffer)


@every_row
def test_bf16(row):
    model = create(row).eval()
    images = inputs(row).float()
    (expected,) = model(images)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outputs = model(images)
        loss_of(outputs).backward()
    torch.testing.assert_close(outputs[0].float(), expected, rtol=0.05, atol=0.05)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
    (out,) = model.bfloat16()(images.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@every_row
def test_bad_input(row):
    model = build(row)
    channels, *rest = row.shape
    for shape in ((2, channels + 1, *rest), (channels, *rest), (2, *row.shape, 1)):
        with pytest.raises(ValueError, match=r'must be \(batch, 3, .*height, width\), got'):
            model(torch.randn(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match=r'pixels'):
        model(torch.randn(2, *row.shape[:-1], 0, dtype=torch.float64))


WRONG = ([2j], {'a': 7}, 2j)


@every_row
def test_values_of_other_types_are_refused(row):
    for parameter in parameters(REGISTERED[row.name]):
        if parameter.name == 'init_cfg':  # mmengine checks it when it is used
            continue
        for value in WRONG:
            with pytest.raises((TypeError, ValueError), match=rf'\b{parameter.name}\b'):
                REGISTERED[row.name](**{**row.arguments, parameter.name: value})
    with pytest.raises(TypeError, match='no_such_argument'):
        REGISTERED[row.name](**row.arguments, no_such_argument=1)


@every_row
def test_bad_architectures(row):
    arch, names = row.arguments['arch'], sorted(REGISTERED[row.name].arch_zoo)
    for bad in (3, None, [arch]):
        with pytest.raises(TypeError, match='arch='):
            create(row, arch=bad)
    with pytest.raises(ValueError, match=f"arch='huge'.*{names[0]}"):
        create(row, arch='huge')
    with pytest.raises(ValueError, match=r"unknown keys \['deph'\]"):
        create(row, arch={**arch, 'deph': 2})
    with pytest.raises(ValueError, match=r"lacks \['embed_dims'\]"):
        create(row, arch={k: v for k, v in arch.items() if k != 'embed_dims'})
    for key in arch:
        for value in (*WRONG, 'NoSuchName'):
            with pytest.raises((TypeError, ValueError), match=rf'\b{key}\b|d_model|d_inner'):
                create(row, arch={**arch, key: value})
    with pytest.raises(ValueError, match=r"arch\['embed_dims'\]=0"):
        create(row, arch={**arch, 'embed_dims': 0})


WRAPPERS = {
    'raw': lambda w: w,
    'state_dict': lambda w: {'state_dict': w, 'epoch': 3, 'args': object()},
    'model': lambda w: {'model': w, 'optimizer': {}},
    'module': lambda w: {f'module.{k}': v for k, v in w.items()},
}


def official(model):
    """The weights as official scripts save them, the head of a classifier included."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    width = model(torch.zeros(1, *model.input_shape).to(next(iter(weights.values()))))[-1].shape[1]
    weight, bias = type(model)._head_keys[:2]
    return {**weights, weight: torch.randn(5, width), bias: torch.randn(5)}


@every_row
@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_checkpoint_round_trip(row, wrapper):
    source, model = build(row, seed=1), build(row)
    source.input_shape = row.shape
    given = WRAPPERS[wrapper](official(source))
    keys = set(given)
    assert not any(model.load_state_dict(given, strict=True))
    assert set(given) == keys, "the caller's dict must not change"
    assert_same_weights(model, source)
    parent, other = nn.Module(), nn.Module()
    parent.backbone, other.backbone = source, build(row)
    assert not any(other.load_state_dict(parent.state_dict(), strict=True))
    assert_same_weights(other.backbone, source)


@every_row
def test_checkpoint_files(row, tmp_path):
    source = build(row, seed=1).float()
    parent = nn.Module()
    parent.backbone = source
    file = str(tmp_path / 'own.pth')
    save_checkpoint({'state_dict': parent.state_dict()}, file)
    init_cfg = {'type': 'Pretrained', 'checkpoint': file}
    model = create(row, init_cfg={**init_cfg, 'prefix': 'backbone.'})
    model.init_weights()
    assert_same_weights(model, source)
    # VideoMamba also takes what a classifier saved.
    if not issubclass(type(model), REGISTERED['VideoMamba']):
        with pytest.raises(ValueError, match=r"s keys stand under 'backbone\.'"):
            create(row, init_cfg=init_cfg).init_weights()


@every_row
def test_a_classifier_reads_an_official_checkpoint(row, tmp_path):
    mmpretrain = pytest.importorskip('mmpretrain.models')
    source = build(row, seed=1).float()
    source.input_shape = row.shape
    weights = official(source)
    torch.save({'model': weights}, tmp_path / 'official.pth')
    weight, bias = (weights[key] for key in type(source)._head_keys[:2])
    classifier = mmpretrain.ImageClassifier(
        backbone={'type': f'mmvim.{row.name}', **row.arguments},
        head={'type': 'mmpretrain.LinearClsHead', 'num_classes': 5, 'in_channels': len(weight[0])},
    ).eval()
    load_checkpoint(classifier, str(tmp_path / 'official.pth'), strict=True)
    assert_same_weights(classifier.backbone, source)
    images = inputs(row).float()
    expected = source(images)[-1] @ weight.T + bias
    torch.testing.assert_close(classifier.head(classifier.backbone(images)), expected)
    classifier.load_state_dict(classifier.state_dict(), strict=True)


@every_row
def test_checkpoints_of_other_models(row):
    model, arch = build(row), row.arguments['arch']
    before = copy.deepcopy(model.state_dict())
    depth = {'depths': (1, *row.depths[:-1])} if 'depths' in arch else {'depth': 3}
    resnet = {'conv1.weight': torch.zeros(64, 3, 7, 7), 'layer1.0.conv1.weight': torch.zeros(1)}
    for given, message in (
        (
            create(row, arch={**arch, 'embed_dims': 2 * arch['embed_dims']}).state_dict(),
            'there and .* here',
        ),
        (create(row, arch={**arch, **depth}).state_dict(), r'its depths? (is|are) '),
        (resnet, "another model's: conv1.weight"),
    ):
        match = f'does not fit this {row.name}.*{message}'
        with pytest.raises(ValueError, match=match) as error:
            model.load_state_dict(given, strict=False)
        assert '\n' not in str(error.value)
    parent = nn.Module()
    parent.backbone = model
    with pytest.raises(ValueError, match=r"no key that starts with 'backbone\.'"):
        parent.load_state_dict({'head.weight': torch.zeros(1)}, strict=False)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@every_row
def test_parts_of_a_model_can_be_loaded(row):
    model = build(row)
    name, value = next(iter(model.named_parameters()))
    model.load_state_dict({name: torch.ones_like(value)}, strict=False)
    assert model.get_parameter(name).eq(1).all()
