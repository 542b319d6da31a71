import itertools

import naive_vim
import pytest
import torch

from mmvim.layers import DropPath, resize_pos_embed
from mmvim.models import Vim

ARCH = {'embed_dims': 32, 'depth': 2, 'd_state': 4}
PLACES = ('middle', 'head', 'tail', 'double', 'none')


def build(seed=0, **kwargs):
    """A small model in float64 with no parameter left at 0 or 1."""
    torch.manual_seed(seed)
    model = Vim(**{'arch': ARCH, 'img_size': 16, 'patch_size': 4, **kwargs}).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def weights(model):
    return {name: value.double() for name, value in model.state_dict().items()}


def check(model, images, sd=None, out_type=None, **naive):
    """Compare each output with the reference's stream, normed if it is the last layer's."""
    sd = sd or weights(model)
    options = {'patch': 4, 'stride': 4, 'place': 'middle', 'bimamba': 'v2', 'merge': 'mean'}
    after, grid, where = naive_vim.streams(sd, images, **{**options, **naive})
    outputs = model(images)
    assert isinstance(outputs, tuple)
    for index, out in zip(model.out_indices, outputs, strict=True):
        stream = after[index]
        if index == model.num_layers - 1 and model.out_norm != 'none':
            stream = naive_vim.norm(sd, 'norm_f', stream)
        expected = naive_vim.select(stream, grid, where, out_type or model.out_type)
        # The rotary table is float32.
        tolerance = 1e-4 if model.rope else 1e-8
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize('rope', [False, True])
@pytest.mark.parametrize('stride', [4, 2, 3])
@pytest.mark.parametrize('place', PLACES)
def test_every_placement_stride_and_rope(place, stride, rope):
    model = build(
        img_size=(16, 12), stride=stride, cls_token=place, rope=rope, rope_residual=rope,
        rope_pt_size=5, out_type='raw', out_indices=(0, 1),
    )  # fmt: skip
    images = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    naive = {'stride': stride, 'place': place, 'rope': rope, 'rope_residual': rope, 'pt_size': 5}
    check(model, images, **naive)
    for model.out_type in ('featmap', 'avg_featmap', *(() if place == 'none' else ['cls_token'])):
        check(model, images, **naive)


@pytest.mark.parametrize('bimamba', ['v1', 'v2', 'none'])
@pytest.mark.parametrize('norm', ['RMSNorm', 'LayerNorm'])
@pytest.mark.parametrize('layer_scale', [None, 0.5])
def test_mixers_norms_and_layer_scale(bimamba, norm, layer_scale):
    model = build(bimamba=bimamba, norm=norm, layer_scale=layer_scale)
    assert ('layers.0.mixer.gamma' in model.state_dict()) == (layer_scale is not None)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    check(model, images, bimamba=bimamba, merge='mean' if bimamba == 'v2' else 'sum')


@pytest.mark.parametrize('bimamba', ['v1', 'v2'])
@pytest.mark.parametrize('merge', ['mean', 'sum'])
def test_merge(bimamba, merge):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    check(build(bimamba=bimamba, merge=merge), images, bimamba=bimamba, merge=merge)


@pytest.mark.parametrize('merge', [None, 'mean'])
@pytest.mark.parametrize(('bimamba', 'rope'), [('none', False), ('v2', True), ('v1', False)])
def test_layer_pairs(bimamba, rope, merge):
    model = build(
        arch={**ARCH, 'depth': 4}, bimamba=bimamba, rope=rope, merge=merge,
        if_bidirectional=True, out_indices=(1, 3), out_type='featmap',
    )  # fmt: skip
    of_mixer = 'sum' if bimamba == 'none' else merge or ('mean' if bimamba == 'v2' else 'sum')
    check(
        model, torch.randn(2, 3, 16, 16, dtype=torch.float64), bimamba=bimamba,
        merge=of_mixer, pairs=True, pair_merge=merge or 'sum', rope=rope,
    )  # fmt: skip


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('size', [(16, 24), (9, 31), (4, 4), (20, 20)])
def test_other_sizes_at_run_time(place, size):
    model = build(cls_token=place, rope=True, out_type='featmap')
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    grid = (size[0] // 4, size[1] // 4)
    sd = weights(model)
    sd['pos_embed'] = resize_pos_embed(sd['pos_embed'], (4, 4), grid, place)
    check(model, images, sd=sd, place=place, rope=True)
    assert model(images)[0].shape == (1, 32, *grid)


@pytest.mark.parametrize('norm', ['RMSNorm', 'LayerNorm'])
def test_norm_eps(norm):
    """As large a number as the mean square shows in every norm."""
    options = {'norm': norm, 'norm_eps': 0.5, 'out_norm': 'separate', 'out_indices': (0, 1)}
    model = build(**options, out_type='featmap')
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    sd = weights(model)
    after, grid, where = naive_vim.streams(
        sd, images, patch=4, stride=4, place='middle', bimamba='v2', merge='mean', eps=0.5
    )
    for name, stream, out in zip(('norm0', 'norm_f'), after.values(), model(images), strict=True):
        expected = naive_vim.norm(sd, name, stream, eps=0.5)
        torch.testing.assert_close(out, naive_vim.select(expected, grid, where, 'featmap'))


@pytest.mark.parametrize('pool', ['mean', 'max', 'last', 'all'])
def test_pools_without_class_token(pool):
    model = build(cls_token='none', pool=pool)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    (out,) = model(images)
    model.out_type = 'raw'
    (tokens,) = model(images)
    expected = {
        'mean': tokens.mean(1), 'max': tokens.max(1).values, 'last': tokens[:, -1], 'all': tokens,
    }[pool]  # fmt: skip
    torch.testing.assert_close(out, expected)


def test_no_position_embedding():
    model = build(abs_pos_embed=False)
    assert 'pos_embed' not in model.state_dict()
    check(model, torch.randn(2, 3, 16, 16, dtype=torch.float64))


@pytest.mark.parametrize('out_norm', ['final', 'shared', 'separate', 'none'])
def test_output_norms(out_norm):
    arch = {**ARCH, 'depth': 3}
    model = build(arch=arch, out_norm=out_norm, out_indices=(0, 2), out_type='featmap')
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    sd = weights(model)
    after, grid, where = naive_vim.streams(
        sd, images, patch=4, stride=4, place='middle', bimamba='v2', merge='mean'
    )
    names = {
        'final': (None, 'norm_f'),
        'shared': ('norm_f', 'norm_f'),
        'separate': ('norm0', 'norm_f'),
        'none': (None, None),
    }[out_norm]
    for index, name, out in zip((0, 2), names, model(images), strict=True):
        stream = naive_vim.norm(sd, name, after[index]) if name else after[index]
        torch.testing.assert_close(out, naive_vim.select(stream, grid, where, 'featmap'))
    assert {k for k in sd if k.startswith('norm')} == {f'{n}.weight' for n in names if n}


def test_drop_path_is_placed_as_in_the_official_model(monkeypatch):
    """Layers 0 and 1 keep their input; layer i drops its input at rate i-1; the last output too."""
    monkeypatch.setattr(
        DropPath, 'forward', lambda self, x: x * (1 - self.drop_prob) if self.training else x
    )
    model = build(arch={**ARCH, 'depth': 4}, drop_path_rate=0.3, out_indices=(1, 3), out_type='raw')
    rates = [0.0, *torch.linspace(0, 0.3, 4).tolist()]
    assert [m.drop_path.drop_prob for m in model.layers] == pytest.approx(rates[:4])
    assert model.drop_path.drop_prob == pytest.approx(rates[4])

    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    hidden, _ = model._embed(images)
    residual, expected = None, []
    for i, layer in enumerate(model.layers):
        dropped = hidden * (1 - rates[i])
        residual = dropped if residual is None else residual + dropped
        hidden = layer.mixer(layer.norm(residual))
        expected.append(residual + hidden * (1 - rates[i + 1]))
    model.train()
    first, last = model(images)
    torch.testing.assert_close(first, expected[1])
    torch.testing.assert_close(last, model.norm_f(expected[3]))


def test_drop_path_drops_whole_samples():
    torch.manual_seed(0)
    model = build(arch={**ARCH, 'depth': 3}, drop_path_rate=0.9, out_type='raw').train()
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64).expand(64, -1, -1, -1)
    (out,) = model(images)
    kinds = torch.unique(out.flatten(1), dim=0)
    assert 1 < len(kinds) < 64


def test_every_parameter_gets_a_gradient():
    for place, bimamba in itertools.product(PLACES, ('v1', 'v2', 'none')):
        model = build(cls_token=place, bimamba=bimamba)
        model(torch.randn(2, 3, 16, 16, dtype=torch.float64))[0].square().sum().backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert not missing, (place, bimamba)


def test_residual_stream_dtype():
    images = torch.randn(2, 3, 16, 16).bfloat16()
    for fp32 in (True, False):
        model = Vim(arch=ARCH, img_size=16, patch_size=4, residual_in_fp32=fp32).bfloat16()
        seen = []
        model.layers[1].register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(out[1].dtype)
        )
        assert model(images)[0].dtype == torch.bfloat16
        assert seen == [torch.float32 if fp32 else torch.bfloat16]


@pytest.mark.parametrize('discretization', ['zoh_exact', 'foh', 'rk4', 'tustin'])
def test_discretization_reaches_both_directions(discretization):
    model = build(discretization=discretization)
    assert all(layer.mixer.discretization == discretization for layer in model.layers)
    plain = build()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert not torch.allclose(model(images)[0], plain(images)[0], rtol=1e-6)


def test_initialisation():
    torch.manual_seed(0)
    model = Vim(arch={'embed_dims': 64, 'depth': 4}, img_size=64)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.05)
    assert model.patch_embed.proj.bias.eq(0).all()
    bound = 128**-0.5 / 4**0.5
    largest = model.layers[3].mixer.out_proj.weight.abs().max().item()
    assert 0.95 * bound < largest <= bound
    delta = torch.nn.functional.softplus(model.layers[0].mixer.dt_proj_b.bias)
    assert delta.max() < 0.101
    official = Vim(arch={'embed_dims': 64, 'depth': 1}, img_size=64, dt_init='official')
    assert official.layers[0].mixer.dt_proj_b.bias.eq(0).all()
    assert not official.layers[0].mixer.dt_proj.bias.eq(0).any()


def test_init_cfg_of_linear_layers_leaves_delta_alone():
    cfg = [{'type': 'TruncNormal', 'layer': 'Linear', 'std': 0.02, 'bias': 0.0}]
    model = Vim(arch=ARCH, img_size=16, patch_size=4, init_cfg=cfg)
    before = model.layers[0].mixer.dt_proj_b.bias.clone()
    model.init_weights()
    assert torch.equal(model.layers[0].mixer.dt_proj_b.bias, before)
    assert model.layers[0].mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        ({'arch': {'embed_dims': 32, 'depth': 0}}, ValueError, r"arch\['depth'\]=0"),
        ({'cls_token': 'center'}, ValueError, r"cls_token='center'.*'middle', 'head'"),
        ({'out_type': 'feature'}, ValueError, "out_type='feature'"),
        ({'pool': 'avg'}, ValueError, "pool='avg'"),
        ({'pool': 'max'}, ValueError, "pool='max' has no effect with cls_token='middle'"),
        ({'merge': 'sum', 'bimamba': 'none'}, ValueError, "merge='sum' has no effect"),
        ({'rope_residual': True}, ValueError, 'needs rope=True'),
        ({'out_norm': 'rms'}, ValueError, "out_norm='rms'"),
        ({'bimamba': 'v3'}, ValueError, "bimamba='v3'"),
        ({'merge': 'add'}, ValueError, "merge='add'"),
        ({'discretization': 'euler'}, ValueError, r"discretization='euler'.*'zoh'"),
        ({'dt_init': 'constant'}, ValueError, "dt_init='constant'"),
        ({'norm': 'BN'}, ValueError, "norm='BN'"),
        ({'ops_backend': 'cuda'}, ValueError, "ops_backend='cuda'"),
        ({'img_size': 8, 'patch_size': 16}, ValueError, '8x8 pixels, smaller than a patch'),
        ({'stride': 0}, ValueError, 'stride=0'),
        ({'drop_path_rate': 1.5}, ValueError, 'drop_path_rate=1.5'),
        ({'rope': True, 'arch': {'embed_dims': 34, 'depth': 1}}, ValueError, 'multiple of 4'),
        ({'if_bidirectional': True, 'arch': {'embed_dims': 8, 'depth': 3}}, ValueError, 'even'),
        ({'if_bidirectional': True, 'out_indices': 0}, ValueError, 'an odd index'),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        Vim(**{'arch': ARCH, 'img_size': 16, 'patch_size': 4, **kwargs})


def test_image_smaller_than_a_patch():
    model = build()
    with pytest.raises(ValueError, match='3x16 pixels, smaller than a patch of 4x4'):
        model(torch.randn(1, 3, 3, 16))
