"""Parity with the official MambaVision: its keys as they are, its outputs to float32 rounding.

``keys_mamba_vision_*.json`` in ``tests/golden`` list the official keys. The small official models
with their outputs, ``mambavision_*.safetensors``, are too large for the repository: the environment
variable MMVIM_GOLDEN names the folder that they are in.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mmvim import ops
from mmvim.models import MambaVision

KEYS = Path(__file__).parents[1] / 'golden'
FILES = ('mambavision_64', 'mambavision_layerscale_224', 'mambavision_windows_256x192')
PARAMETERS = {
    'tiny': 31.794, 'tiny2': 35.104, 'small': 50.141, 'base': 97.685, 'large': 227.961,
    'large2': 241.555, 'large3': 739.570,
}  # fmt: skip


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
        'embed_dims': config['dim'],
        'stem_dims': config['in_dim'],
        'num_heads': config['num_heads'],
        'window_sizes': config['window_size'],
        'mlp_ratio': config['mlp_ratio'],
        'layer_scale': config.get('layer_scale'),
    }
    return arch, weights, tensors


def backends():
    loaded = ops.backend_info()['loaded']
    needs = pytest.mark.skipif(not loaded, reason='the compiled kernels are not built')
    return ['torch', pytest.param('compiled', marks=needs)]


@pytest.mark.parametrize('backend', backends())
@pytest.mark.parametrize('double_dt_bias', [True, False])
@pytest.mark.parametrize('name', FILES)
def test_outputs(name, double_dt_bias, backend):
    arch, weights, tensors = load(name)
    kwargs = {'double_dt_bias': double_dt_bias, 'ops_backend': backend}
    classify = MambaVision(arch, **kwargs).eval()
    dense = MambaVision(
        arch, out_type='featmap', out_indices=(0, 1, 2, 3), out_norm='none', **kwargs
    ).eval()
    for model in (classify, dense):
        model.load_state_dict(weights)
    with torch.no_grad():
        (features,) = classify(tensors['input'])
        maps = dense(tensors['input'])
    logits = features @ weights['head.weight'].T + weights['head.bias']
    torch.testing.assert_close(features, tensors['features'], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(logits, tensors['logits'], rtol=2e-4, atol=2e-4)
    for i, out in enumerate(maps):
        torch.testing.assert_close(out, tensors[f'stage{i}'], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(('arch', 'letter'), [('tiny', 'T'), ('base', 'B')])
def test_full_size_keys(arch, letter):
    record = json.loads((KEYS / f'keys_mamba_vision_{letter}.json').read_text())
    official = {name: tuple(shape) for name, shape in record['state_dict']}
    with torch.device('meta'):
        model = MambaVision(arch)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    head = {name: official.pop(name) for name in ('head.weight', 'head.bias')}
    assert own == official
    count = sum(p.numel() for p in model.parameters())
    assert count + sum(torch.Size(s).numel() for s in head.values()) == record['n_params']


@pytest.mark.parametrize('arch', PARAMETERS)
def test_parameter_counts(arch):
    with torch.device('meta'):
        model = MambaVision(arch)
    head = 1000 * (model.embed_dims[-1] + 1)
    count = sum(p.numel() for p in model.parameters()) + head
    assert round(count / 1e6, 3) == PARAMETERS[arch]


def test_settings_of_the_released_sizes():
    windows = {name: MambaVision.arch_zoo[name].get('window_sizes', (14, 7)) for name in PARAMETERS}
    assert windows.pop('large3') == (16, 8)
    assert set(windows.values()) == {(14, 7)}
    with torch.device('meta'):
        model = MambaVision('base', window_sizes=(8, 8, 32, 16))
    assert model.window_sizes == ((32, 32), (16, 16))
    assert model.levels[3].blocks[4].gamma_1.shape == (1024,)
    assert model.levels[3].blocks[4].drop_path.drop_prob == pytest.approx(0.3)
