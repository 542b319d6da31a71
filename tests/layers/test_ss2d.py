"""SS2D against the definition, and its options."""

import pytest
import torch
from torch.nn import functional as F

from mmvim.layers import SS2D
from mmvim.ops import reference


def layer(**options):
    torch.manual_seed(0)
    made = SS2D(6, d_state=3, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def defined(op, x):
    """Section 4.2 of the paper, and the gate of the first release."""
    x = op.in_proj(x)
    if op.forward_type == 'v0':
        x, z = x[..., : op.d_inner], x[..., op.d_inner :]
    x = F.silu(op.conv2d(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    y = 0
    for k, route in enumerate(op.routes):
        low, b, c = (x @ op.x_proj_weight[k].T).split((op.dt_rank, op.d_state, op.d_state), -1)
        rows = slice(k * op.d_inner, (k + 1) * op.d_inner)
        inputs = (low @ op.dt_projs_weight[k].T, b, c)
        step, b, c = (t.unsqueeze(3) for t in inputs)
        y = y + reference.cross_scan(
            x, step, -op.A_logs[rows].exp()[None], b, c, op.Ds[rows][None],
            op.dt_projs_bias[k : k + 1], routes=(route,), delta_softplus=True,
            discretization=op.discretization,
        )  # fmt: skip
    y = op.out_norm(y)
    return op.out_proj(y * F.silu(z) if op.forward_type == 'v0' else y)


@pytest.mark.parametrize('size', [(1, 1), (1, 5), (5, 1), (4, 7)], ids=str)
@pytest.mark.parametrize(
    'options',
    [
        {},
        {'forward_type': 'v0'},
        {'ssm_ratio': 1, 'conv_bias': False, 'bias': True, 'dt_rank': 2, 'd_conv': 5},
        {'routes': ('columns',)},
        {'routes': ('rows', 'rows_reversed'), 'discretization': 'tustin'},
    ],
    ids=str,
)
def test_definition(options, size):
    op = layer(**options)
    x = torch.randn(2, *size, 6, dtype=torch.float64, requires_grad=True)
    out, expected = op(x), defined(op, x)
    torch.testing.assert_close(out, expected)
    tensors = [x, *op.parameters()]
    weight = torch.randn_like(out)
    for one, two in zip(
        torch.autograd.grad(out, tensors, weight),
        torch.autograd.grad(expected, tensors, weight),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_initial_values():
    op = SS2D(32, d_state=4)
    delta = F.softplus(op.dt_projs_bias)
    assert delta.min() >= 0.999e-3
    assert delta.max() <= 0.1001
    assert op.dt_projs_weight.abs().max() <= 2**-0.5
    torch.testing.assert_close(-op.A_logs.exp(), -torch.arange(1.0, 5).expand(4 * 64, 4))
    assert op.Ds.eq(1).all()
    assert op.A_logs.dtype == SS2D(8, dtype=torch.bfloat16).A_logs.dtype == torch.float32


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'d_model': 0}, 'd_model=0'),
        ({'ssm_ratio': 0}, 'd_inner=0'),
        ({'d_state': 257}, 'd_state=257'),
        ({'d_conv': 2}, 'd_conv=2 must be odd'),
        ({'forward_type': 'v2'}, "forward_type='v2' is unknown; allowed: 'v05_noz', 'v0'"),
        ({'routes': 'rows'}, "routes='rows'"),
        ({'routes': ('up',)}, r"routes=\('up',\)"),
        ({'routes': ()}, r'routes=\(\)'),
        ({'discretization': 'euler'}, "discretization='euler'"),
        ({'dt_min': 0.2}, 'dt_min=0.2'),
        ({'ops_backend': 'gpu'}, "ops_backend='gpu'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SS2D(**{'d_model': 8, **options})


def test_bad_shapes():
    for shape in ((2, 5, 6), (2, 3, 4, 5), (2, 6, 3, 4)):
        with pytest.raises(ValueError, match=r'SS2D wants \(batch, height, width, 6\), got'):
            layer()(torch.zeros(shape, dtype=torch.float64))
