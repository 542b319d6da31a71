import copy

import naive_mamba
import naive_mambavision
import pytest
import torch
import torch.nn.functional as F

from mmvim.layers import (
    Attention,
    DropPath,
    MambaVisionMixer,
    window_partition,
    window_reverse,
)
from mmvim.models import MambaVision
from mmvim.models.backbones.mambavision import ConvBlock, _without_bias

HEADS = (2, 4)
WINDOWS = (3, 2)
ARCH = {
    'depths': (1, 2, 3, 2), 'embed_dims': 4, 'stem_dims': 4, 'num_heads': HEADS,
    'window_sizes': WINDOWS, 'd_state': 4,
}  # fmt: skip
MAPS = {'out_type': 'featmap', 'out_indices': (0, 1, 2, 3)}


def build(seed=0, **kwargs):
    """A small model in float64 with no parameter or statistic left at 0 or 1."""
    torch.manual_seed(seed)
    model = MambaVision(**{'arch': ARCH, **kwargs}).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
        for name, b in model.named_buffers():
            if 'running' in name:
                b += 0.5 * torch.rand_like(b)
    return model


def weights(model):
    return {k: v.double() for k, v in model.state_dict().items() if v.is_floating_point()}


def pairs(windows):
    return [(w, w) if isinstance(w, int) else w for w in windows]


def naive(model, images, windows=WINDOWS, **kwargs):
    with torch.no_grad():
        return naive_mambavision.stages(weights(model), images, pairs(windows), HEADS, **kwargs)


@pytest.mark.parametrize('size', [(64, 64), (100, 69), (33, 130), (32, 32), (1, 1), (3, 200)])
def test_stages_at_any_size(size):
    model = build(**MAPS, out_norm='none')
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = naive(model, images)
    outputs = model(images)
    assert isinstance(outputs, tuple)
    for i, (out, reference) in enumerate(zip(outputs, expected, strict=True)):
        side = [-(-n // 2 ** (i + 2)) for n in size]
        assert out.shape == (2, 4 * 2**i, *side)
        torch.testing.assert_close(out, reference)


@pytest.mark.parametrize(
    'windows', [(2, 3), ((2, 3), (1, 4)), (None, None), ((5, 1), None), (14, 7), (8, 8, 2, 3)]
)
def test_windows(windows):
    model = build(**MAPS, out_norm='none', window_sizes=windows)
    images = torch.randn(1, 3, 72, 88, dtype=torch.float64)
    expected = naive(model, images, windows[-2:])
    for out, reference in zip(model(images), expected, strict=True):
        torch.testing.assert_close(out, reference)


@pytest.mark.parametrize('momentum', [0.1, 0.0, None])
@pytest.mark.parametrize('training', [True, False])
def test_the_bias_before_a_norm_may_go_into_the_mean(training, momentum):
    torch.manual_seed(0)
    block = ConvBlock(6, 0.0, None).double().train(training)
    block.norm1.momentum = momentum
    with torch.no_grad():
        for tensor in (*block.conv1.parameters(), *block.norm1.parameters()):
            tensor.normal_()
        block.norm1.running_mean.normal_()
    other = copy.deepcopy(block)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        expected = block.norm1(block.conv1(x))
        found = _without_bias(x, other.conv1, other.norm1)
    torch.testing.assert_close(found, expected)
    for name, buffer in block.norm1.named_buffers():
        torch.testing.assert_close(other.norm1.get_buffer(name), buffer, msg=name)
    if training:
        expected.pow(3).sum().backward()
        found.pow(3).sum().backward()
        for a, b in zip(other.parameters(), block.parameters(), strict=True):
            if b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('scale', [None, 0.3])
def test_layer_scales(scale):
    model = build(**MAPS, out_norm='none', layer_scale=scale, layer_scale_conv=scale)
    found = [k for k in model.state_dict() if 'gamma' in k]
    assert len(found) == (0 if scale is None else 3 + 2 * 5)
    images = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    for out, reference in zip(model(images), naive(model, images), strict=True):
        torch.testing.assert_close(out, reference)


@pytest.mark.parametrize('double', [True, False])
def test_delta_bias_is_added_twice_or_once(double):
    model = build(**MAPS, out_norm='none', double_dt_bias=double)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    out = model(images)[-1]
    torch.testing.assert_close(out, naive(model, images, bias_count=1 + double)[-1])
    assert not torch.allclose(out, naive(model, images, bias_count=2 - double)[-1], rtol=1e-4)


@pytest.mark.parametrize('length', [1, 2, 7])
def test_mixer(length):
    torch.manual_seed(0)
    mixer = MambaVisionMixer(12, d_state=5, dt_init='proper').double()
    x = torch.randn(2, length, 12, dtype=torch.float64)
    sd = naive_mamba.sub(mixer.state_dict(), '')
    torch.testing.assert_close(mixer(x), naive_mambavision.mamba(sd, x))


def test_gradients_of_the_mixer():
    torch.manual_seed(0)
    mixer = MambaVisionMixer(4, d_state=2).double()
    names, values = zip(*mixer.named_parameters(), strict=True)
    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    values = [v.detach().requires_grad_() for v in values]

    def function(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values))


def test_attention():
    torch.manual_seed(0)
    layer = Attention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    sd = naive_mamba.sub(layer.state_dict(), '')
    torch.testing.assert_close(layer(x), naive_mambavision.attention(sd, x, 3))


@pytest.mark.parametrize('window', [(1, 1), (2, 3), (4, 6), (5, 5), (9, 2)])
@pytest.mark.parametrize('channels_last', [False, True])
def test_window_partition_and_reverse(window, channels_last):
    x = torch.randn(2, 3, 4, 6)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    windows = window_partition(x, window)
    down, across = -(-4 // window[0]), -(-6 // window[1])
    assert windows.shape == (2 * down * across, window[0] * window[1], 3)
    padded = F.pad(x, (0, across * window[1] - 6, 0, down * window[0] - 4))
    for index, tokens in enumerate(windows):
        b, place = divmod(index, down * across)
        top, left = (n * w for n, w in zip(divmod(place, across), window, strict=True))
        piece = padded[b, :, top : top + window[0], left : left + window[1]]
        assert torch.equal(tokens, piece.flatten(1).T)
    assert torch.equal(window_reverse(windows, window, 2, (4, 6)), x)


def test_windows_do_not_see_each_other():
    model = build(out_type='featmap', out_indices=2, out_norm='none', window_sizes=(2, 2))
    level = model.levels[2]
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, :2, :2] += 1
    difference = (level(changed) - level(x)).abs().sum(1)[0] > 1e-9
    assert difference[:2, :2].all()
    assert difference.sum() == 4


@pytest.mark.parametrize('depth', [1, 2, 5, 6])
def test_mamba_comes_first_and_gets_the_odd_block(depth):
    model = build(arch={**ARCH, 'depths': (1, 1, depth, 1)})
    kinds = [type(block.mixer) for block in model.levels[2].blocks]
    half = depth // 2
    assert kinds == [MambaVisionMixer] * (depth - half) + [Attention] * half


@pytest.mark.parametrize('out_norm', ['final', 'separate', 'none'])
@pytest.mark.parametrize('out_type', ['featmap', 'avg_featmap'])
def test_outputs(out_norm, out_type):
    model = build(out_norm=out_norm, out_type=out_type, out_indices=(1, -1))
    assert model.out_indices == (1, 3)
    images = torch.randn(2, 3, 72, 40, dtype=torch.float64)
    sd, maps = weights(model), naive(model, images)
    outputs = model(images)
    assert len(outputs) == 2
    for i, out in zip((1, 3), outputs, strict=True):
        expected = maps[i]
        if out_norm == 'separate':
            normed = naive_mambavision.layer_norm(sd, f'outnorm{i}', expected.permute(0, 2, 3, 1))
            expected = normed.permute(0, 3, 1, 2)
        elif out_norm == 'final' and i == 3:
            expected = naive_mambavision.batch_norm(sd, 'norm', expected)
        if out_type == 'avg_featmap':
            expected = expected.mean((2, 3))
        torch.testing.assert_close(out, expected)
    norms = {k.split('.')[0] for k in sd if 'norm' in k.split('.')[0]}
    assert (
        norms == {'final': {'norm'}, 'separate': {'outnorm1', 'outnorm3'}, 'none': set()}[out_norm]
    )


@pytest.mark.parametrize(('arch', 'rate'), [(ARCH, 0.0), ({**ARCH, 'drop_path_rate': 0.2}, 0.2)])
def test_drop_path_rates(arch, rate):
    def rates(model):
        return [block.drop_path.drop_prob for level in model.levels for block in level.blocks]

    assert rates(build(arch=arch)) == pytest.approx([rate * i / 7 for i in range(8)])
    assert rates(build(arch=arch, drop_path_rate=0.7)) == pytest.approx([i / 10 for i in range(8)])


def test_drop_path_reaches_every_branch(monkeypatch):
    """With each branch scaled by 1 - rate, the blocks give what their own branches say."""
    monkeypatch.setattr(
        DropPath, 'forward', lambda self, x: x * (1 - self.drop_prob) if self.training else x
    )
    model = build(drop_path_rate=0.5)
    maps = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    block = model.levels[1].blocks[1]
    full = block(maps)
    block.drop_path.train()
    kept = 1 - 0.5 * 2 / 7
    torch.testing.assert_close(block(maps), maps + kept * (full - maps))

    tokens = torch.randn(2, 6, 32, dtype=torch.float64)
    block = model.levels[3].blocks[1].train()
    middle = tokens + 0.5 * block.mixer(block.norm1(tokens))
    torch.testing.assert_close(block(tokens), middle + 0.5 * block.mlp(block.norm2(middle)))


def test_drop_path_drops_whole_samples():
    torch.manual_seed(0)
    model = build(drop_path_rate=0.9).eval()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.train()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64).expand(128, -1, -1, -1)
    (out,) = model(images)
    # Rounded, as the sums of one sample may be split among threads in another way.
    assert 1 < len(torch.unique(out.mul(1e6).round(), dim=0)) < 128


def test_channels_last_gives_the_same():
    model = build(**MAPS, out_norm='separate')
    images = torch.randn(2, 3, 72, 56, dtype=torch.float64)
    expected = model(images)
    model = model.to(memory_format=torch.channels_last)
    outputs = model(images.contiguous(memory_format=torch.channels_last))
    for out, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(out, reference)


def test_discretization_and_backend_reach_the_mixers():
    model = build(discretization='foh', ops_backend='torch')
    mixers = [m for m in model.modules() if isinstance(m, MambaVisionMixer)]
    assert len(mixers) == 3
    assert {(m.discretization, m.ops_backend) for m in mixers} == {('foh', 'torch')}
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert not torch.allclose(model(images)[0], build()(images)[0], rtol=1e-6)


def test_official_initialisation():
    torch.manual_seed(0)
    arch = {**ARCH, 'depths': (1, 1, 2, 2), 'embed_dims': 32, 'd_state': 8}
    model = MambaVision(arch=arch, layer_scale=1e-5)
    mixer = model.levels[3].blocks[0].mixer
    for layer in (mixer.in_proj, mixer.dt_proj, mixer.x_proj, model.levels[3].blocks[1].mlp.fc1):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert mixer.dt_proj.bias.eq(0).all()
    assert model.levels[3].blocks[1].mixer.qkv.bias.eq(0).all()
    torch.testing.assert_close(mixer.A_log.exp()[3], torch.arange(1.0, 9.0))
    assert mixer.D.eq(1).all()
    assert model.levels[2].blocks[1].gamma_2.eq(1e-5).all()


@pytest.mark.parametrize('double', [True, False])
def test_proper_initialisation_of_delta(double):
    torch.manual_seed(0)
    model = MambaVision(arch=ARCH, dt_init='proper', double_dt_bias=double)
    bias = model.levels[3].blocks[0].mixer.dt_proj.bias
    delta = F.softplus(bias * (1 + double))
    assert delta.min() > 0.99e-3
    assert delta.max() < 0.101
    assert delta.max() / delta.min() > 3


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        ({'arch': {'depths': (1, 1, 1, 1)}}, ValueError, r"lacks \['embed_dims', 'num_heads'"),
        ({'arch': {**ARCH, 'depths': (1, 1, 1)}}, ValueError, r"arch\['depths'\]=\(1, 1, 1\)"),
        ({'arch': {**ARCH, 'depths': (1, 1, 0, 1)}}, ValueError, r"arch\['depths'\]"),
        ({'arch': {**ARCH, 'embed_dims': 0}}, ValueError, r"arch\['embed_dims'\]=0"),
        ({'arch': {**ARCH, 'num_heads': (3, 4)}}, ValueError, 'num_heads=3 must divide the 16'),
        ({'arch': {**ARCH, 'num_heads': 4}}, ValueError, r"arch\['num_heads'\]=4"),
        ({'arch': {**ARCH, 'num_heads': (0, 4)}}, ValueError, r"arch\['num_heads'\]=\(0, 4\)"),
        ({'arch': {**ARCH, 'mlp_ratio': 0}}, ValueError, r"arch\['mlp_ratio'\]=0"),
        ({'window_sizes': 7}, ValueError, 'window_sizes=7 must be two values'),
        ({'window_sizes': (8, 14, 7)}, ValueError, 'window_sizes=.*two values.*or four'),
        ({'window_sizes': (0, 7)}, ValueError, 'window_sizes=0'),
        ({'window_sizes': ((2, 2, 2), 7)}, ValueError, 'window_sizes='),
        ({'in_channels': 0}, ValueError, 'in_channels=0'),
        ({'out_type': 'cls_token'}, ValueError, "out_type='cls_token'.*'avg_featmap'"),
        ({'out_norm': 'shared'}, ValueError, "out_norm='shared'"),
        ({'layer_scale': 'yes'}, ValueError, "layer_scale='yes'"),
        ({'discretization': 'euler'}, ValueError, r"discretization='euler'.*'zoh'"),
        ({'dt_init': 'constant'}, ValueError, "dt_init='constant'"),
        ({'ops_backend': 'cuda'}, ValueError, "ops_backend='cuda'"),
        ({'drop_path_rate': 1.5}, ValueError, 'drop_path_rate=1.5'),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        MambaVision(**{'arch': ARCH, **kwargs})


def test_bad_input_of_the_mixer():
    with pytest.raises(ValueError, match=r'wants \(batch, length, 12\), got \(2, 5, 8\)'):
        MambaVisionMixer(12)(torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match=r'expand=1: .* must be even'):
        MambaVisionMixer(11)
