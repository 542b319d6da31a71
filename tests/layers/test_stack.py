import naive_mamba
import pytest
import torch
import torch.nn.functional as F

from mmvim.layers import DropPath, LayerNorm, LayerNorm2d, MambaStack, RMSNorm, build_norm
from mmvim.layers.stack import drop_path_rates


def naive_stack(stack, x, bimamba='none', merge='sum'):
    sd = naive_mamba.sub(stack.state_dict(), '')

    def norm(value, name):
        if f'{name}.bias' in sd:
            return F.layer_norm(value, value.shape[-1:], sd[f'{name}.weight'], sd[f'{name}.bias'])
        return value * (value.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * sd[f'{name}.weight']

    stream = x.double()
    for i in range(len(stack.layers)):
        mixed = norm(stream, f'layers.{i}.norm')
        mixer = naive_mamba.sub(sd, f'layers.{i}.mixer.')
        stream = stream + naive_mamba.mixer(mixer, mixed, bimamba, merge)
    return norm(stream, 'norm_f')


@pytest.mark.parametrize('norm', ['RMSNorm', 'LayerNorm'])
@pytest.mark.parametrize('bidirectional', [None, 'v1', 'v2'])
def test_stack_matches_naive(norm, bidirectional):
    torch.manual_seed(0)
    stack = MambaStack(8, 3, d_state=4, norm=norm, bidirectional=bidirectional).double()
    with torch.no_grad():
        for p in stack.parameters():
            p += 0.2 * torch.randn_like(p)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    merge = 'mean' if bidirectional == 'v2' else 'sum'
    expected = naive_stack(stack, x, bidirectional or 'none', merge)
    torch.testing.assert_close(stack(x), expected)


def test_stack_steps_equal_forward():
    torch.manual_seed(0)
    stack = MambaStack(8, 3, d_state=4).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    state = stack.init_state(2)
    outputs = []
    for t in range(7):
        out, state = stack.step(x[:, t], state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 1), stack(x))
    first, state = stack(x[:, :3], return_state=True)
    torch.testing.assert_close(torch.cat([first, stack(x[:, 3:], state)], 1), stack(x))


def test_bidirectional_stack_has_no_state():
    stack = MambaStack(8, 2, bidirectional='v2')
    with pytest.raises(ValueError, match="bidirectional='v2' has no states"):
        stack.init_state(1)
    with pytest.raises(ValueError, match='has no states'):
        stack(torch.randn(1, 3, 8), return_state=True)


def test_wrong_number_of_states():
    stack = MambaStack(8, 2)
    with pytest.raises(ValueError, match='1 states were given to 2 layers'):
        stack(torch.randn(1, 3, 8), stack.init_state(1)[:1])


def test_stack_passes_mixer_arguments_and_refuses_others():
    assert MambaStack(8, 1, dt_rank=3).layers[0].mixer.dt_rank == 3
    with pytest.raises(TypeError, match='d_stat'):
        MambaStack(8, 1, d_stat=3)
    with pytest.raises(ValueError, match='norm='):
        MambaStack(8, 1, norm='BatchNorm')


def test_drop_path_rates():
    assert drop_path_rates(0.3, 1) == [0, 0.3]
    expected = [0.0, *torch.linspace(0, 0.3, 4).tolist()[:3], 0.3]
    assert drop_path_rates(0.3, 4) == pytest.approx(expected)
    stack = MambaStack(8, 4, drop_path_rate=0.3)
    assert [layer.drop_path.drop_prob for layer in stack.layers] == pytest.approx(expected[:4])
    assert stack.drop_path.drop_prob == 0.3


def test_drop_path():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    out = drop(x)
    flat = out.flatten(1)
    assert ((flat == 0).all(1) | (flat == 1 / 0.75).all(1)).all()
    assert 0.2 < (flat[:, 0] == 0).float().mean() < 0.3
    assert drop.eval()(x) is x
    with pytest.raises(ValueError, match=r'drop_prob=1\.0'):
        DropPath(1.0)


@pytest.mark.parametrize('norm', [RMSNorm, LayerNorm])
@pytest.mark.parametrize('fp32', [True, False])
def test_norms_add_the_residual(norm, fp32):
    torch.manual_seed(0)
    layer = norm(16, residual_in_fp32=fp32)
    x, residual = torch.randn(2, 5, 16).bfloat16(), torch.randn(2, 5, 16).bfloat16()
    out, total = layer(x, residual, return_residual=True)
    assert out.dtype == torch.bfloat16
    assert total.dtype == (torch.float32 if fp32 else torch.bfloat16)
    expected = x.float() + residual.float()
    torch.testing.assert_close(total.float(), expected, rtol=1e-2, atol=1e-2)
    centred = expected - (expected.mean(-1, keepdim=True) if norm is LayerNorm else 0)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(out.float(), normed, rtol=1e-2, atol=1e-2)
    alone = layer(x.float())
    torch.testing.assert_close(alone, layer(x.float(), torch.zeros(2, 5, 16)))


@pytest.mark.parametrize('norm', ['RMSNorm', 'LayerNorm'])
def test_eps_reaches_every_norm(norm):
    layer = build_norm(norm, 16, eps=0.5)
    x = torch.randn(2, 5, 16)
    centred = x - (x.mean(-1, keepdim=True) if norm == 'LayerNorm' else 0)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x - 1, torch.ones_like(x)), expected)
    stack = MambaStack(16, 2, norm=norm, norm_eps=0.5)
    norms = [m for m in stack.modules() if isinstance(m, type(layer))]
    assert [m.eps for m in norms] == [0.5] * 3


@pytest.mark.parametrize('options', [{}, {'bias': False}, {'elementwise_affine': False}], ids=str)
def test_layer_norm_2d(options):
    layer = LayerNorm2d(6, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 6, 3, 5)
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (6,), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected.permute(0, 3, 1, 2))
    with pytest.raises(RuntimeError, match='6'):
        layer(x[:, 1:])
