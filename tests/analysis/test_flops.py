"""The figures of the model zoo, and the costs of single ops."""

import json
import re

import pytest
import torch
from script_runner import run_script

from mmvim import ops
from mmvim.analysis import count, count_config
from mmvim.apis.model_zoo import models

COUNTED = [name for name, info in models().items() if info.macs is not None]


@pytest.mark.parametrize('name', COUNTED)
def test_metafiles_state_the_macs(name):
    info = models()[name]
    side = re.search(r'-(\d+)px$', name)
    size = int(side[1]) if side else 224
    report = count_config(name, (size, size))
    assert report['parameters'] == info.parameters
    assert report['macs'] == info.macs


class Op(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize('backend', ['auto', 'torch'])
@pytest.mark.parametrize('has_gate', [False, True])
def test_scan(backend, has_gate):
    b, length, d, n = 2, 5, 6, 4
    u, delta, z = torch.rand(3, b, length, d)
    A, (B, C), D = -torch.rand(d, n), torch.rand(2, b, length, n), torch.rand(d)
    z = z if has_gate else None
    one = count(Op(lambda: ops.selective_scan(u, delta, A, B, C, D, z, backend=backend)))
    per_direction = b * length * d * n
    assert one['macs'] == 3 * per_direction
    assert one['flops'] == 9 * per_direction + 2 * b * length * d * (1 + has_gate)
    inputs = ops.ScanInputs(u, delta, A, B, C, D)
    both = count(Op(lambda: ops.bidirectional_scan(inputs, inputs, z, backend=backend)))
    assert both['macs'] == 6 * per_direction
    assert both['flops'] == 18 * per_direction + 2 * b * length * d * (2 + has_gate)


@pytest.mark.parametrize('backend', ['auto', 'torch'])
def test_all_routes_of_a_cross_scan_are_counted(backend):
    b, h, w, k, d, n, rank = 2, 3, 5, 4, 6, 2, 3
    x, A, D = torch.rand(b, h, w, d), -torch.rand(k, d, n), torch.rand(k, d)
    B, C = torch.rand(2, b, h, w, k, n)
    delta, weight = torch.rand(b, h, w, k, rank), torch.rand(k, d, rank)
    full = count(Op(lambda: ops.cross_scan(x, delta @ weight[0].T, A, B, C, D, backend=backend)))
    per_route = b * h * w * d
    assert full['by_kind']['scan']['macs'] == k * 3 * per_route * n
    assert full['by_kind']['scan']['flops'] == k * (9 * per_route * n + 2 * per_route)
    low = count(
        Op(lambda: ops.cross_scan(x, delta, A, B, C, D, delta_weight=weight, backend=backend))
    )
    assert low['macs'] == k * per_route * (3 * n + rank)


@pytest.mark.parametrize(
    ('name', 'depths', 'width', 'ratio', 'states'),
    [
        ('tiny', (2, 2, 8, 2), 96, 1, 1),
        ('base-s2l15', (2, 2, 15, 2), 128, 2, 1),
        ('vanilla-small', (2, 2, 27, 2), 96, 2, 16),
    ],
)
def test_vmamba_by_hand(name, depths, width, ratio, states):
    """All four routes: their projections, and three multiply-accumulates for each state."""
    vanilla = states == 16
    macs = 8 * width * 1000
    macs += 56**2 * 48 * width if vanilla else 112**2 * 27 * width // 2 + 56**2 * 9 * width**2 // 2
    for stage, depth in enumerate(depths):
        tokens, dim = (56 >> stage) ** 2, width << stage
        inner, rank = ratio * dim, -(-dim // 16)
        scan = 4 * inner * (rank + 2 * states) + 4 * inner * rank + 4 * 3 * inner * states
        linear = (2 + vanilla) * dim * inner + (0 if vanilla else 8 * dim**2)
        macs += depth * tokens * (linear + 9 * inner + scan)
        if stage < 3:
            macs += tokens // 4 * (8 if vanilla else 18) * dim**2
    assert count_config(f'vmamba-{name}_3rdparty_in1k')['macs'] == macs


def test_convolution_and_norm():
    x, weight = torch.rand(2, 5, 6), torch.rand(6, 3)
    report = count(Op(lambda: ops.causal_conv1d(x, weight)))
    assert report['by_kind'] == {'conv1d': {'macs': 2 * 5 * 6 * 3, 'flops': 2 * 2 * 5 * 6 * 3}}
    report = count(Op(lambda: ops.add_rms_norm(x, torch.ones(6), x)))
    assert report['by_kind'] == {'norm': {'macs': 0, 'flops': 5 * x.numel()}}
    report = count(torch.nn.Linear(6, 7), x)
    assert report['by_kind']['matmul']['macs'] == 2 * 5 * 6 * 7


def test_attention_and_batch_norm_are_counted():
    from mmvim.models import MambaVision

    arch = dict(depths=(1, 1, 2, 2), embed_dims=8, stem_dims=4, num_heads=(1, 1))
    model = MambaVision(arch).eval()
    report = count(model, torch.rand(1, 3, 64, 64))
    assert {'matmul', 'conv', 'scan', 'conv1d', 'norm'} <= set(report['by_kind'])
    with torch.device('meta'):
        on_meta = MambaVision(arch).eval()
    meta = count(on_meta, torch.empty(1, 3, 64, 64, device='meta'))
    assert meta['macs'] == report['macs']
    assert report['by_kind']['attention']['macs'] > 0


def test_detectors_are_counted():
    mask_rcnn = count_config('mask-rcnn_vim-tiny_simplefpn_1x_coco', (64, 96))
    assert mask_rcnn['parameters'] == models()['mask-rcnn_vim-tiny_simplefpn_1x_coco'].parameters
    tokens = 4 * 6 + 1
    assert mask_rcnn['by_kind']['scan']['macs'] == 2 * 3 * 24 * tokens * 384 * 16


def run(*args):
    return run_script('analysis/get_flops.py', *args)


def test_tool(tmp_path):
    out = tmp_path / 'flops.json'
    result = run('vim-tiny_3rdparty_in1k', '--shape', '224', '256x512', '--json', out)
    assert result.returncode == 0, result.stderr
    assert '7.15 M' in result.stdout
    assert '1.47 G' in result.stdout
    rows = json.loads(out.read_text())
    assert [row['input'] for row in rows] == [[3, 224, 224], [3, 256, 512]]


def test_tool_names_what_is_wrong():
    assert 'similar names: vim-tiny_3rdparty_in1k' in run('vim-tiny_in1k').stderr
    result = run('vim-tiny_3rdparty_in1k', '--shape', '2x2x2')
    assert result.returncode == 2
    assert result.stderr.startswith("error: --shape must be like 224 or 800x1216, not '2x2x2'")
