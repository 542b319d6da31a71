"""Parity with the official VideoMamba: its keys as they are, its outputs to float32 rounding.

``videomamba_*.safetensors`` hold small official models with random weights, their input and
output; the metadata has the constructor's arguments. The two of videos are too large for the
repository and are looked for in the folder that ``MMVIM_GOLDEN`` names.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mmvim import ops
from mmvim.models import VideoMamba

GOLDEN = Path(__file__).parents[1] / 'golden'


def find(name):
    if name == 'videomamba_image':
        return GOLDEN / f'{name}.safetensors'
    folder = os.environ.get('MMVIM_GOLDEN')
    if not folder:
        pytest.skip(f'MMVIM_GOLDEN does not name the folder of {name}.safetensors')
    return Path(folder) / f'{name}.safetensors'


def backends():
    loaded = ops.backend_info()['loaded']
    needs = pytest.mark.skipif(not loaded, reason='the compiled kernels are not built')
    return ['torch', pytest.param('compiled', marks=needs)]


@pytest.mark.parametrize('backend', backends())
@pytest.mark.parametrize(
    'name', ['videomamba_image', 'videomamba_video_f4', 'videomamba_video_f8_t2']
)
def test_outputs(name, backend):
    with safe_open(find(name), 'pt') as file:
        config = json.loads(file.metadata()['config'])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    prefix = 'state_dict.'
    weights = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    model = VideoMamba(
        arch={'embed_dims': config['embed_dim'], 'depth': config['depth']},
        img_size=config['img_size'],
        patch_size=config['patch_size'],
        num_frames=config.get('num_frames'),
        tubelet_size=config.get('kernel_size', 1),
        ops_backend=backend,
    ).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        (features,) = model(tensors['input'])
    logits = features @ weights['head.weight'].T + weights['head.bias']
    torch.testing.assert_close(features, tensors['features'], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(logits, tensors['logits'], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ('name', 'arguments'), [('tiny_image', {}), ('tiny_video_f8', {'num_frames': 8})]
)
def test_full_size_keys(name, arguments):
    record = json.loads((GOLDEN / f'keys_videomamba_{name}.json').read_text())
    official = {key: tuple(shape) for key, shape in record['state_dict']}
    with torch.device('meta'):
        model = VideoMamba('tiny', **arguments)
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    head = {key: official.pop(key) for key in ('head.weight', 'head.bias')}
    assert own == official
    count = sum(p.numel() for p in model.parameters())
    assert count + sum(torch.Size(s).numel() for s in head.values()) == record['n_params']


@pytest.mark.parametrize(
    ('arch', 'expected'),
    [('tiny', 7148008), ('small', 25796584), ('middle', 74217448), ('base', 97598440)],
)
def test_parameter_counts(arch, expected):
    with torch.device('meta'):
        model = VideoMamba(arch)
    head = 1000 * (model.embed_dims + 1)
    assert sum(p.numel() for p in model.parameters()) + head == expected
