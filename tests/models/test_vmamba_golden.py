"""Parity with the official VMamba: its keys as they are, its outputs to float32 rounding.

``keys_*vmamba*.json`` in ``tests/golden`` list the official keys. The small official models with
their outputs, ``vmamba_*.safetensors``, are too large for the repository: the environment variable
MMVIM_GOLDEN names the folder that they are in.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mmvim import ops
from mmvim.apis import load_weights
from mmvim.models import VMamba

KEYS = Path(__file__).parents[1] / 'golden'
FULL_SIZE = {
    'tiny': 'vmamba_tiny_s1l8', 'tiny-s2l5': 'vmamba_tiny_s2l5', 'base': 'vmamba_base_s1l20',
    'vanilla-tiny': 'vanilla_vmamba_tiny',
}  # fmt: skip
HEAD = ('classifier.head.weight', 'classifier.head.bias')


def load(name):
    folder = os.environ.get('MMVIM_GOLDEN')
    if not folder:
        pytest.skip('set MMVIM_GOLDEN to the folder of the official outputs')
    with safe_open(Path(folder) / f'{name}.safetensors', 'pt') as file:
        config = json.loads(file.metadata()['config'])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    prefix = 'state_dict.'
    weights = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    arch = {
        'depths': config['depths'],
        'embed_dims': config['dims'],
        'd_state': config['ssm_d_state'],
        'd_conv': config['ssm_conv'],
        'conv_bias': config['ssm_conv_bias'],
    }
    same = ('ssm_ratio', 'mlp_ratio', 'forward_type', 'patchembed_version', 'downsample_version')
    return {**arch, **{key: config[key] for key in same}}, weights, tensors


def backends():
    loaded = ops.backend_info()['loaded']
    needs = pytest.mark.skipif(not loaded, reason='the compiled kernels are not built')
    return ['torch', pytest.param('compiled', marks=needs)]


def assert_close(given, expected):
    torch.testing.assert_close(given, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('backend', backends())
@pytest.mark.parametrize('name', ['vmamba_s1', 'vmamba_s2', 'vmamba_v0'])
def test_outputs(name, backend):
    arch, weights, tensors = load(name)
    classify = VMamba(arch, ops_backend=backend).eval()
    dense = VMamba(
        arch, out_type='featmap', out_indices=(0, 1, 2, 3), out_norm='none', ops_backend=backend
    ).eval()
    for model in (classify, dense):
        model.load_state_dict(weights)
    with torch.no_grad():
        (features,) = classify(tensors['input'])
        maps = dense(tensors['input'])
    weight, bias = (weights[key] for key in HEAD)
    assert_close(features @ weight.T + bias, tensors['logits'])
    for i, out in enumerate(maps):
        assert_close(out, tensors[f'stage{i}'])


@pytest.mark.parametrize('backend', backends())
def test_dense_outputs(backend):
    arch, weights, tensors = load('vmamba_dense_90x131')
    model = VMamba(
        arch, out_type='featmap', out_indices=(0, 1, 2, 3), out_norm='separate', ops_backend=backend
    ).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        maps = model(tensors['input'])
    for i, out in enumerate(maps):
        assert_close(out, tensors[f'out{i}'])


def official(arch):
    record = json.loads((KEYS / f'keys_{FULL_SIZE[arch]}.json').read_text())
    return record['n_params'], {name: tuple(shape) for name, shape in record['state_dict']}


@pytest.mark.parametrize('arch', FULL_SIZE)
def test_full_size_keys(arch):
    n_params, shapes = official(arch)
    with torch.device('meta'):
        model = VMamba(arch)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    head = {name: shapes.pop(name) for name in HEAD}
    # The one name that differs, and is translated.
    assert {name.replace('classifier.norm.', 'norm.'): s for name, s in shapes.items()} == own
    count = sum(p.numel() for p in model.parameters())
    assert count + sum(torch.Size(s).numel() for s in head.values()) == n_params


@pytest.mark.parametrize(
    ('arch', 'millions'),
    [('small-s2l15', 50), ('small', 49), ('base-s2l15', 89), ('vanilla-small', 44),
     ('vanilla-base', 76)],
)  # fmt: skip
def test_parameter_counts_of_the_tables(arch, millions):
    with torch.device('meta'):
        model = VMamba(arch)
    count = sum(p.numel() for p in model.parameters()) + 1000 * (model.embed_dims[-1] + 1)
    assert round(count / 1e6) == millions


# As each file of the official repository may spell them.
def first_release(weights):
    names = {
        'patch_embed.0.': 'patch_embed.proj.', 'patch_embed.2.': 'patch_embed.norm.',
        '.op.': '.self_attention.', 'classifier.': '',
    }  # fmt: skip
    renamed = {}
    for key, value in weights.items():
        if '.blocks.' in key:
            key = key.replace('.norm.', '.ln_1.')
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        renamed[key] = value
    return renamed


def numbered_merging(weights):
    return {
        k.replace('.downsample.norm.', '.downsample.1.').replace('.reduction.', '.2.'): v
        for k, v in weights.items()
    }


def projections(extra):
    def rename(weights):
        renamed = {}
        for key, value in weights.items():
            if key.endswith(('x_proj_weight', 'dt_projs_weight')):
                key = key.replace('_weight', '.weight')
                value = value.flatten(0, 1)[(...,) + (None,) * extra].clone()
            renamed[key] = value
        return renamed

    return rename


def convolutions(weights):
    linear = ('in_proj.weight', 'out_proj.weight', 'fc1.weight', 'fc2.weight', 'reduction.weight')
    return {k: v[..., None, None].clone() if k.endswith(linear) else v for k, v in weights.items()}


SMALL = {'depths': (1, 1, 2, 1), 'embed_dims': 16}
VANILLA = {**VMamba.arch_zoo['vanilla-tiny'], **SMALL, 'd_state': 4}
SPELLINGS = {
    'v2-projections': (SMALL, projections(0)),
    'v2-4d-projections': (SMALL, projections(2)),
    'v2-convolutions': (SMALL, convolutions),
    'v0-first-release': (VANILLA, first_release),
    'v0-numbered': (VANILLA, numbered_merging),
    'v0-convolutions': (VANILLA, convolutions),
}


@pytest.mark.parametrize('dense', [False, True])
@pytest.mark.parametrize('name', SPELLINGS)
def test_spellings(name, dense):
    arch, respell = SPELLINGS[name]
    torch.manual_seed(0)
    source, model = VMamba(arch), VMamba(arch)
    weights = {k: torch.randn_like(v) for k, v in source.state_dict().items()}
    named = {k if k[:5] != 'norm.' else f'classifier.{k}': v for k, v in weights.items()}
    given = respell({**named, HEAD[0]: torch.zeros(3, 128), HEAD[1]: torch.zeros(3)})
    if dense:  # a detector's file
        parent = torch.nn.Module()
        parent.backbone = model
        parent.load_state_dict({f'backbone.{k}': v for k, v in given.items()})
    else:
        report = load_weights(model, {'model': given, 'epoch': 1})
        assert report.loaded == len(weights)
        assert set(report.unexpected) == set(report.dropped) == {k for k in given if 'head.' in k}
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize(
    ('theirs', 'message'),
    [
        ({**SMALL, 'ssm_ratio': 2.0}, r'x_proj_weight is \(4, 3, 32\) there and \(4, 3, 16\) here'),
        ({**SMALL, 'd_state': 2}, r'x_proj_weight is \(4, 5, 16\) there and \(4, 3, 16\) here'),
        ({**SMALL, 'depths': (1, 1, 3, 1)}, r'its depths are \(1, 1, 3, 1\)'),
        (VANILLA, 'its blocks have no MLPs'),
    ],
)
def test_misfits_are_errors(theirs, message):
    weights = VMamba(theirs).state_dict()
    with pytest.raises(ValueError, match=rf'does not fit this VMamba .*{message}'):
        VMamba(SMALL).load_state_dict(weights, strict=False)


def test_transposed_convolutions_are_not_reshaped():
    weights = VMamba({**SMALL, 'ssm_ratio': 2.0}).state_dict()
    key = 'layers.0.blocks.0.op.in_proj.weight'
    weights[key] = weights[key].t()[..., None, None]
    with pytest.raises(ValueError, match=r'in_proj.weight is \(16, 32, 1, 1\) there'):
        VMamba({**SMALL, 'ssm_ratio': 2.0}).load_state_dict(weights)
