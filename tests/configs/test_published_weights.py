"""Every published checkpoint is in the zoo, and fits its model name by name.

``published_weights.csv`` lists the files that the authors link to. None of them could be opened:
what is in them is written down in ``official_keys``.
"""

import argparse
import csv
import json
import re
import warnings
from pathlib import Path

import official_keys as keys
import pytest
import torch
from config_harness import REPO, build_model
from mmengine.config import Config

from mmvim.apis import compare_weights
from mmvim.apis.model_zoo import models

HERE = Path(__file__).parent
PUBLISHED = [row['url'] for row in csv.DictReader((HERE / 'published_weights.csv').open())]
ZOO = {info.weights.rpartition('/')[2]: info for info in models().values() if info.weights}
BIMAMBA = {'t': (192, 24), 's': (384, 24), 'm': (576, 32), 'b': (768, 24)}
CLASSES = {'k400': 400, 'ssv2': 174, 'breakfast': 10, 'coin': 180}


def file(url):
    return url.rpartition('/')[2]


def vim(name):
    dim, depth = BIMAMBA[name[4]]
    tokens = 27**2 if '_ft_' in name else 14**2
    return keys.bimamba(dim, depth, tokens) | keys.linear('head', 1000, dim)


def videomamba(name):
    dim, depth = BIMAMBA[re.match(r'videomamba_(.)16', name)[1]]
    size = int(re.search(r'(\d+)\.pth$', name)[1])
    tokens = (size // 16) ** 2
    if '_in1k_' in name:
        return keys.bimamba(dim, depth, tokens) | keys.linear('head', 1000, dim)
    if re.search(r'_\d+M_', name):
        return keys.multimodal(dim, depth)
    data, frames = re.search(r'16_([a-z0-9]+)_', name)[1], int(re.search(r'_f(\d+)_', name)[1])
    if '_mask_pt_' in name:
        return keys.bimamba(dim, depth, tokens, frames, 'norm') | keys.masked_decoder(dim)
    return keys.bimamba(dim, depth, tokens, frames) | keys.linear('head', CLASSES[data], dim)


def mambavision(name):
    sizes = dict(tiny='T', tiny2='T2', small='S', base='B', large='L', large2='L2')
    size = re.search(r'(L\d|l3|tiny2?|small|base|large2?)', name)[1]
    size = sizes.get(size, size.upper())
    width = keys.MAMBAVISION[size][1]
    if 'cascade' in name:
        return keys.whole(keys.mambavision(size, dense=True), 'cascade-mask-rcnn', width)
    if 'ade20k' in name:
        return keys.whole(keys.mambavision(size, dense=True), 'upernet', width)
    return keys.mambavision(size)


def vmamba(name):
    size = re.search(r'tiny|small|base', name)[0][0].upper()
    if re.match(r'vssm(tiny|small|base)', name):
        size = f'Vanilla-{size}'
    elif re.search(r'vssm1_.*_02\d\ds|tiny(_ms_3x)?_s_', name):
        size += '[s1l8]' if size == 'T' else '[s1l20]'
    else:
        size += '[s2l5]' if size == 'T' else '[s2l15]'
    width = keys.VMAMBA[size][1]
    for part, kind in (('mask_rcnn', 'mask-rcnn'), ('upernet', 'upernet')):
        if part in name:
            return keys.whole(keys.vmamba(size, dense=True), kind, width)
    return keys.vmamba(size, first_release=size.startswith('Vanilla'))


def official(name):
    """The weights of a published file, as it wraps them."""
    family = next(f for p, f in FAMILIES.items() if re.match(p, name))
    weights = {k: torch.empty(s, device='meta') for k, s in family(name).items()}
    if any(k.startswith('backbone.') for k in weights):
        return {'meta': {'epoch': 12}, 'state_dict': weights, 'message_hub': {}}
    if family is mambavision:
        return {'state_dict': weights, 'epoch': 1, 'args': argparse.Namespace()}
    if family is videomamba and '_in1k_' not in name:
        return weights
    return {'model': weights, 'model_ema': dict(weights), 'epoch': 1}


FAMILIES = {
    'vim_': vim,
    'videomamba_': videomamba,
    r'mambavision_|mamba_vision_|cascade_mask_rcnn_mamba': mambavision,
    'vssm|mask_rcnn_vssm|upernet_vssm': vmamba,
}


def test_the_zoo_has_them_all():
    assert len(set(map(file, PUBLISHED))) == len(PUBLISHED)
    assert {file(url) for url in PUBLISHED} == set(ZOO)
    hosts = {url: ZOO[file(url)].weights for url in PUBLISHED}
    assert all(url == weights for url, weights in hosts.items())


@pytest.mark.parametrize('url', PUBLISHED, ids=file)
def test_fits_its_model(url):
    name = file(url)
    with torch.device('meta'):
        model = build_model(Config.fromfile(ZOO[name].config))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # copies between meta tensors do nothing
        report = compare_weights(model, official(name))
    pretraining = re.search(r'_mask_pt_|_\d+M_', name)
    assert report.missing == (('head.fc.bias', 'head.fc.weight') if pretraining else ())
    assert not report.left_out
    assert not report.resized
    assert report.unexpected == report.dropped
    assert bool(report.dropped) is bool(pretraining)
    assert report.loaded + len(report.missing) == len(model.state_dict())


RECORDS = {
    'vim_tiny': lambda: vim('vim_t_midclstok_76p1acc.pth'),
    'vim_small': lambda: vim('vim_s_midclstok_80p5acc.pth'),
    'videomamba_tiny_image': lambda: videomamba('videomamba_t16_in1k_res224.pth'),
    'videomamba_tiny_video_f8': lambda: videomamba('videomamba_t16_k400_f8_res224.pth'),
    'mamba_vision_T': lambda: keys.mambavision('T'),
    'mamba_vision_B': lambda: keys.mambavision('B'),
    'vmamba_tiny_s1l8': lambda: keys.vmamba('T[s1l8]'),
    'vmamba_tiny_s2l5': lambda: keys.vmamba('T[s2l5]'),
    'vmamba_base_s1l20': lambda: keys.vmamba('B[s1l20]'),
    'vanilla_vmamba_tiny': lambda: keys.vmamba('Vanilla-T'),
}


@pytest.mark.parametrize('name', RECORDS)
def test_the_names_are_those_of_the_official_code(name):
    """Run for ten of the models."""
    record = json.loads((REPO / f'tests/golden/keys_{name}.json').read_text())
    assert {k: tuple(v) for k, v in record['state_dict']} == RECORDS[name]()


def test_a_wrong_name_is_noticed():
    """Failure of the tests above for a file with one other name."""
    info = ZOO['vssm1_tiny_0230s_ckpt_epoch_264.pth']
    content = official('vssm1_tiny_0230s_ckpt_epoch_264.pth')
    weights = content['model']
    weights['layers.0.blocks.0.op.D'] = weights.pop('layers.0.blocks.0.op.Ds')
    with torch.device('meta'):
        model = build_model(Config.fromfile(info.config))
    report = compare_weights(model, content)
    assert report.missing == ('backbone.layers.0.blocks.0.op.Ds',)
    assert report.unexpected == ('layers.0.blocks.0.op.D',)
    assert report.dropped == ()
