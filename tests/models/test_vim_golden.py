"""Parity with the official Vim: its keys as they are, its outputs to float32 rounding.

``tests/golden/vim_*.safetensors`` hold small official models with random weights, their input and
output; the metadata has the constructor's arguments. ``keys_vim_*.json`` list the official keys.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mmvim import ops
from mmvim.models import Vim

GOLDEN = Path(__file__).parents[1] / 'golden'
FILES = sorted(GOLDEN.glob('vim_*.safetensors'))


def load(path):
    with safe_open(path, 'pt') as file:
        config = json.loads(file.metadata()['config'])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    prefix = 'state_dict.'
    weights = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    return config, weights, tensors


def arguments(config):
    """Translate the official constructor's arguments."""
    if not config['if_cls_token']:
        place = 'none'
    elif config.get('use_double_cls_token'):
        place = 'double'
    else:
        place = 'middle' if config['use_middle_cls_token'] else 'head'
    merge = None
    if config['bimamba_type'] == 'v2':
        merge = 'mean' if config['if_divide_out'] else 'sum'
    return {
        'arch': {k: config[k] for k in ('depth', 'd_state')} | {'embed_dims': config['embed_dim']},
        'img_size': config['img_size'],
        'patch_size': config['patch_size'],
        'stride': config.get('stride'),
        'cls_token': place,
        'pool': config['final_pool_type'] if place == 'none' else None,
        'bimamba': config['bimamba_type'],
        'merge': merge,
        'rope': config['if_rope'],
        'rope_residual': config['if_rope_residual'],
        'rope_pt_size': config.get('pt_hw_seq_len', 14),
        'norm': 'RMSNorm' if config['rms_norm'] else 'LayerNorm',
    }


def backends():
    loaded = ops.backend_info()['loaded']
    needs = pytest.mark.skipif(not loaded, reason='the compiled kernels are not built')
    return ['torch', pytest.param('compiled', marks=needs)]


def test_all_golden_files_are_here():
    assert len(FILES) == 9


@pytest.mark.parametrize('backend', backends())
@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_outputs(path, backend):
    config, weights, tensors = load(path)
    model = Vim(**arguments(config), ops_backend=backend).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        (features,) = model(tensors['input'])
    logits = features @ weights['head.weight'].T + weights['head.bias']
    torch.testing.assert_close(features, tensors['features'], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(logits, tensors['logits'], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('arch', ['tiny', 'small'])
def test_full_size_keys(arch):
    record = json.loads((GOLDEN / f'keys_vim_{arch}.json').read_text())
    official = {name: tuple(shape) for name, shape in record['state_dict']}
    model = Vim(arch)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    head = {name: official.pop(name) for name in ('head.weight', 'head.bias')}
    assert own == official
    count = sum(p.numel() for p in model.parameters())
    assert count + sum(torch.Size(s).numel() for s in head.values()) == record['n_params']


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ({'arch': 'tiny'}, 7148008),
        ({'arch': 'tiny', 'stride': 8}, 7250344),
        ({'arch': 'small'}, 25796584),
        ({'arch': 'base'}, 97598440),
    ],
)
def test_parameter_counts(arguments, expected):
    with torch.device('meta'):
        model = Vim(**arguments)
    head = 1000 * (model.embed_dims + 1)
    assert sum(p.numel() for p in model.parameters()) + head == expected
