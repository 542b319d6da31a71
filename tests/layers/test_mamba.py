import naive_mamba
import pytest
import torch
import torch.nn.functional as F

from mmvim import ops
from mmvim.layers import BiMamba, CausalConv1d, Mamba, MambaVisionMixer
from mmvim.ops import _validation

DISCRETIZATIONS = tuple(ops.DISCRETIZATIONS)


def randomise(module, scale=0.5):
    """Leave no parameter at a value (0, 1) that would hide a term."""
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn_like(p)
    return module


def check(layer, x, **naive):
    layer.double()
    expected = naive_mamba.mixer(naive_mamba.sub(layer.state_dict(), ''), x.double(), **naive)
    torch.testing.assert_close(layer(x.double()), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('length', [1, 2, 3, 17])
def test_mamba_matches_naive(length):
    torch.manual_seed(0)
    layer = randomise(Mamba(12, d_state=4, layer_scale=0.5))
    check(layer, torch.randn(2, length, 12))


def test_reverse_is_flip():
    torch.manual_seed(0)
    forward = randomise(Mamba(12, d_state=4)).double()
    backward = Mamba(12, d_state=4, reverse=True).double()
    backward.load_state_dict(forward.state_dict())
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    torch.testing.assert_close(backward(x), forward(x.flip(1)).flip(1))


@pytest.mark.parametrize('bimamba', ['v1', 'v2'])
@pytest.mark.parametrize('merge', [None, 'mean', 'sum'])
def test_bimamba_matches_naive(bimamba, merge):
    torch.manual_seed(0)
    layer = randomise(BiMamba(12, d_state=4, bimamba=bimamba, merge=merge, layer_scale=0.1))
    naive = merge or ('mean' if bimamba == 'v2' else 'sum')
    check(layer, torch.randn(2, 9, 12), bimamba=bimamba, merge=naive)


@pytest.mark.parametrize('bimamba', ['v1', 'v2'])
def test_bimamba_reverse_is_flip(bimamba):
    torch.manual_seed(0)
    forward = randomise(BiMamba(12, d_state=4, bimamba=bimamba)).double()
    backward = BiMamba(12, d_state=4, bimamba=bimamba, reverse=True).double()
    backward.load_state_dict(forward.state_dict())
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    torch.testing.assert_close(backward(x), forward(x.flip(1)).flip(1))


def test_bimamba_gradients_match_naive():
    torch.manual_seed(0)
    layer = randomise(BiMamba(8, d_state=3)).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, 8, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    got = torch.autograd.grad((layer(x) * weight).sum(), [x, *parameters.values()])
    sd = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    out = naive_mamba.mixer(sd, x, bimamba='v2', merge='mean')
    expected = torch.autograd.grad((out * weight).sum(), [x, *sd.values()])
    for name, a, b in zip(['x', *parameters], got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: name + m)


def test_delta_bias_is_added_once():
    layer = randomise(Mamba(8, d_state=2)).double()
    with torch.no_grad():
        layer.dt_proj.weight.zero_()
        layer.dt_proj.bias.fill_(0.3)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    check(layer, x)
    sd = naive_mamba.sub(layer.state_dict(), '')
    sd['dt_proj.bias'] = sd['dt_proj.bias'] * 2
    assert not torch.allclose(layer(x), naive_mamba.mixer(sd, x), rtol=0.1, atol=1e-3)


def test_convolution_is_not_delayed():
    conv = CausalConv1d(3, kernel_size=4)
    x = torch.zeros(1, 9, 3)
    x[:, 4] = 1
    response = (conv(x) - conv.bias).detach()
    assert response[:, :4].eq(0).all()
    torch.testing.assert_close(response[0, 4:8], conv.weight[:, 0].flip(-1).T.detach())
    assert response[:, 8:].eq(0).all()


@pytest.mark.parametrize('discretization', DISCRETIZATIONS)
@pytest.mark.parametrize('reverse', [False, True])
def test_chunks_and_steps_equal_forward(discretization, reverse):
    torch.manual_seed(0)
    layer = Mamba(8, d_state=4, discretization=discretization, reverse=reverse).double()
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    whole = layer(x)

    state = layer.init_state(2)
    pieces = []
    chunks = x.split([1, 5, 4], dim=1)
    for chunk in reversed(chunks) if reverse else chunks:
        out, state = layer(chunk, state, return_state=True)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces[::-1] if reverse else pieces, dim=1), whole)

    state = layer.init_state(2)
    steps = [None] * 10
    for t in reversed(range(10)) if reverse else range(10):
        before = [s.clone() for s in state]
        steps[t], new = layer.step(x[:, t], state)
        assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
        state = new
    torch.testing.assert_close(torch.stack(steps, dim=1), whole)


def test_state_starts_like_no_state():
    layer = Mamba(8, d_state=4, discretization='tustin')
    x = torch.randn(2, 6, 8)
    state = layer.init_state(2)
    assert state.conv.shape == (2, 16, 3)
    assert state.ssm.shape == (2, 16, 8)
    out, after = layer(x, return_state=True)
    torch.testing.assert_close(layer(x, state), out)
    assert after.ssm.shape == state.ssm.shape


def test_gradients_flow_through_states():
    layer = Mamba(8, d_state=4).double()
    x = torch.randn(1, 8, 8, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(layer(x).square().sum(), x)
    first, state = layer(x[:, :5], return_state=True)
    second = layer(x[:, 5:], state)
    (chunked,) = torch.autograd.grad(first.square().sum() + second.square().sum(), x)
    torch.testing.assert_close(chunked, whole)


def test_initial_delta_is_in_range_in_both_directions():
    layer = BiMamba(64, dt_init='proper')
    for proj in (layer.dt_proj, layer.dt_proj_b):
        delta = F.softplus(proj.bias)
        assert 0.99e-3 < delta.min() < 3e-3
        assert 0.04 < delta.max() < 0.101
        # log-uniform: half of the values are below the geometric mean
        assert 0.3 < (delta < 1e-2).float().mean() < 0.7
        assert proj.weight.abs().max() <= layer.dt_rank**-0.5


def test_official_initialisation_zeroes_the_backward_bias():
    layer = BiMamba(64, dt_init='official')
    assert layer.dt_proj_b.bias.eq(0).all()
    assert F.softplus(layer.dt_proj.bias).max() < 0.101


def test_delta_survives_a_sweep_over_linear_layers():
    layer = BiMamba(32)
    before = layer.dt_proj_b.bias.clone()

    def init(module):
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)

    layer.apply(init)
    assert torch.equal(layer.dt_proj_b.bias, before)


def test_key_names():
    own = {'in_proj.weight', 'conv1d.weight', 'conv1d.bias', 'x_proj.weight', 'dt_proj.weight'}
    own |= {'dt_proj.bias', 'A_log', 'D', 'out_proj.weight'}
    assert set(Mamba(8).state_dict()) == own
    assert Mamba(8).conv1d.weight.shape == (16, 1, 4)
    assert set(BiMamba(8, bimamba='v1').state_dict()) == own | {'A_b_log'}
    extra = {'conv1d_b.weight', 'conv1d_b.bias', 'x_proj_b.weight', 'dt_proj_b.weight'}
    extra |= {'dt_proj_b.bias', 'A_b_log', 'D_b'}
    assert set(BiMamba(8).state_dict()) == own | extra
    assert set(Mamba(8, layer_scale=1.0).state_dict()) == own | {'gamma'}


def test_ops_backend_is_obeyed_in_both_passes(monkeypatch):
    """The ops of the 'torch' namespace run, forward and backward, when a layer asks for them."""
    names = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    layer = BiMamba(8, ops_backend='torch')
    with Record():
        layer(torch.randn(1, 5, 8)).sum().backward()
    used = {n for n in names if n.startswith('mmvim')}
    assert used
    assert all(n.startswith('mmvim_torch::') for n in used)
    assert any('backward' in n for n in used)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    torch.manual_seed(0)
    layer = BiMamba(16, d_state=4)
    x = torch.randn(2, 9, 16)
    expected = layer(x)
    with torch.autocast('cpu', dtype=dtype):
        out = layer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.02)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.02)


def test_compiles_without_graph_break():
    torch._dynamo.reset()
    layer = BiMamba(8, d_state=4)
    x = torch.randn(2, 9, 8)
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'discretization': 'euler'}, 'discretization'),
        ({'d_conv': 7}, 'd_conv=7'),
        ({'ops_backend': 'cuda'}, 'ops_backend'),
        ({'d_state': 0}, 'd_state=0'),
        ({'d_state': 257}, 'd_state=257'),
        ({'dt_init': 'random'}, 'dt_init'),
    ],
)
def test_bad_arguments(kwargs, message):
    for layer in (Mamba, BiMamba):
        with pytest.raises(ValueError, match=message):
            layer(8, **kwargs)


def test_unknown_arguments():
    with pytest.raises(TypeError, match='use_cuda_kernel'):
        Mamba(8, use_cuda_kernel=True)
    with pytest.raises(ValueError, match='bimamba'):
        BiMamba(8, bimamba='v3')
    with pytest.raises(ValueError, match=r'length, 8'):
        Mamba(8)(torch.randn(1, 3, 9))


@pytest.mark.parametrize('mixer', [Mamba, BiMamba, MambaVisionMixer])
@pytest.mark.parametrize('fused', [True, False])
def test_layers_do_not_look_at_values(monkeypatch, mixer, fused):
    """Their A is negative by construction, and a GPU would have to be waited for in every call."""

    def look(*_):
        raise AssertionError('looked at the values of A')

    monkeypatch.setattr(_validation, 'check_negative', look)
    layer = mixer(8)
    layer.fused = fused
    layer(torch.randn(1, 3, 8)).sum().backward()
