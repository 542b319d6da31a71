import naive_mamba
import naive_vim
import pytest
import torch

from mmvim.layers import DropPath, resize_pos_embed
from mmvim.models import VideoMamba

ARCH = {'embed_dims': 16, 'depth': 2, 'd_state': 4}
GRID = (2, 3)


def build(seed=0, **kwargs):
    """A small model in float64 with no parameter left at 0 or 1."""
    torch.manual_seed(seed)
    default = {'arch': ARCH, 'img_size': (8, 12), 'patch_size': 4}
    model = VideoMamba(**{**default, **kwargs}).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def weights(model):
    return {name: value.double() for name, value in model.state_dict().items()}


def video(frames=4, height=8, width=12, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, frames, height, width, dtype=torch.float64)


def naive(sd, x, tubelet=1, bimamba='v2', merge='sum', eps=1e-5):
    """Stream after each layer, one patch and one time step at a time.

    Images are videos of one frame without temporal embedding.
    """
    kernel = sd['patch_embed.proj.weight']
    if kernel.dim() == 4:
        x, kernel = x.unsqueeze(2), kernel.unsqueeze(2)
    start = int('cls_token' in sd)
    tokens = []
    for step in range(x.shape[2] // tubelet):
        frame = 0
        for k in range(tubelet):
            part = {
                'patch_embed.proj.weight': kernel[:, :, k],
                'patch_embed.proj.bias': sd['patch_embed.proj.bias'] / tubelet,
            }
            frame = frame + naive_vim.embed(part, x[:, :, step * tubelet + k], 4, 4, 'none')[0]
        frame = frame + sd['pos_embed'][:, start:]
        if 'temporal_pos_embedding' in sd:
            frame = frame + sd['temporal_pos_embedding'][:, step]
        tokens.append(frame)
    if start:
        tokens.insert(0, (sd['cls_token'] + sd['pos_embed'][:, :1]).expand(x.shape[0], 1, -1))
    hidden, residual, after = torch.cat(tokens, 1), 0, []
    for i in range(2):
        residual = residual + hidden
        mixer = naive_mamba.sub(sd, f'layers.{i}.mixer.')
        normed = naive_vim.norm(sd, f'layers.{i}.norm', residual, eps)
        hidden = naive_mamba.mixer(mixer, normed, bimamba, merge)
        after.append(residual + hidden)
    return after


@pytest.mark.parametrize('tubelet', [1, 2])
@pytest.mark.parametrize('cls_token', ['head', 'none'])
@pytest.mark.parametrize(
    'options',
    [{}, {'merge': 'mean'}, {'bimamba': 'none'}, {'norm': 'LayerNorm', 'layer_scale': 0.5}],
)
def test_video_tokens(tubelet, cls_token, options):
    model = build(
        num_frames=4, tubelet_size=tubelet, cls_token=cls_token, out_type='raw',
        out_indices=(0, 1), **options,
    )  # fmt: skip
    sd = weights(model)
    only = {k: v for k, v in options.items() if k in ('bimamba', 'merge')}
    first, last = naive(sd, video(), tubelet, **only)
    outputs = model(video())
    torch.testing.assert_close(outputs[0], first)
    torch.testing.assert_close(outputs[1], naive_vim.norm(sd, 'norm_f', last))
    assert outputs[0].shape[1] == (cls_token == 'head') + 4 // tubelet * 6


@pytest.mark.parametrize('cls_token', ['head', 'none'])
def test_image_tokens(cls_token):
    model = build(cls_token=cls_token, out_type='raw', out_norm='none', out_indices=(0, 1))
    images = video(1)[:, :, 0]
    for out, expected in zip(model(images), naive(weights(model), images), strict=True):
        torch.testing.assert_close(out, expected)
    model.out_type = 'featmap'
    expected = expected[:, model.num_extra_tokens :].transpose(1, 2).reshape(2, 16, *GRID)
    torch.testing.assert_close(model(images)[1], expected)


def test_pools_and_maps():
    model = build(num_frames=8, tubelet_size=2, out_type='raw')
    x = video(8)
    (tokens,) = model(x)
    token, steps = tokens[:, 0], tokens[:, 1:].reshape(2, 4, 6, 16)
    expected = {
        ('cls', False): token,
        ('avg', False): steps.mean((1, 2)),
        ('cls+avg', False): token + steps.mean((1, 2)),
        ('cls_cat_avg', False): torch.cat((token, steps.mean((1, 2))), -1),
        ('avg', True): steps.mean(2),
        ('cls+avg', True): token[:, None] + steps.mean(2),
        ('cls_cat_avg', True): torch.cat((token[:, None].expand(-1, 4, -1), steps.mean(2)), -1),
    }
    for (pool, keep_temporal), value in expected.items():
        pooled = build(num_frames=8, tubelet_size=2, pool=pool, keep_temporal=keep_temporal)
        torch.testing.assert_close(pooled(x)[0], value)
    maps = steps.reshape(2, 4, *GRID, 16)
    model.out_type = 'featmap'
    torch.testing.assert_close(model(x)[0], maps.permute(0, 4, 1, 2, 3))
    model.out_type = 'frame_featmap'
    frames = model(x)[0]
    assert frames.shape == (8, 16, *GRID)
    torch.testing.assert_close(frames[5], maps[1, 1].permute(2, 0, 1))


def test_norm_eps():
    model = build(norm_eps=0.5, num_frames=4, out_type='raw')
    sd = weights(model)
    expected = naive_vim.norm(sd, 'norm_f', naive(sd, video(), eps=0.5)[1], eps=0.5)
    torch.testing.assert_close(model(video())[0], expected)


def test_default_pools():
    assert build().pool == 'cls'
    assert build(bimamba='none').pool == build(cls_token='none').pool == 'avg'


def test_one_direction_sees_the_past_only():
    model = build(num_frames=4, bimamba='none', out_type='featmap')
    x = video()
    changed = x.clone()
    changed[:, :, 2:] += 1
    a, b = model(x)[0], model(changed)[0]
    assert torch.equal(a[:, :, :2], b[:, :, :2])
    assert not torch.allclose(a[:, :, 2:], b[:, :, 2:])


def lerp(sequence, length):
    """Linear interpolation with half-pixel centres, one step after another."""
    count = sequence.shape[1]
    out = []
    for i in range(length):
        place = min(max((i + 0.5) * count / length - 0.5, 0), count - 1)
        low = int(place)
        high = min(low + 1, count - 1)
        out.append(sequence[:, low] * (1 - place + low) + sequence[:, high] * (place - low))
    return torch.stack(out, 1)


@pytest.mark.parametrize(
    ('frames', 'height', 'width'), [(2, 8, 12), (12, 8, 12), (6, 12, 8), (4, 9, 15)]
)
def test_other_sizes_at_run_time(frames, height, width):
    model = build(num_frames=4, tubelet_size=2, out_type='raw')
    sd = weights(model)
    sd['temporal_pos_embedding'] = lerp(sd['temporal_pos_embedding'], frames // 2)
    grid = (height // 4, width // 4)
    sd['pos_embed'] = resize_pos_embed(sd['pos_embed'], GRID, grid, 'head')
    x = video(frames, height, width)
    expected = naive_vim.norm(sd, 'norm_f', naive(sd, x, 2)[1])
    torch.testing.assert_close(model(x)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('num_frames', [None, 4])
@pytest.mark.parametrize('dt_init', ['proper', 'official'])
def test_initialisation(num_frames, dt_init):
    torch.manual_seed(0)
    arch = {'embed_dims': 64, 'depth': 4}
    model = VideoMamba(arch, img_size=64, num_frames=num_frames, dt_init=dt_init)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.cls_token.eq(0).all()
    assert num_frames is None or model.temporal_pos_embedding.eq(0).all()
    proj = model.patch_embed.proj
    assert proj.weight.abs().max().item() == pytest.approx(768**-0.5, rel=0.01)
    assert not proj.bias.eq(0).any()
    mixer = model.layers[3].mixer
    bound = 128**-0.5 / 4**0.5
    assert 0.95 * bound < mixer.out_proj.weight.abs().max().item() <= bound
    for linear in (mixer.in_proj, mixer.x_proj, mixer.x_proj_b):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for delta in (mixer.dt_proj, mixer.dt_proj_b):
        if dt_init == 'official':
            assert delta.bias.eq(0).all()
            assert delta.weight.std().item() == pytest.approx(0.02, rel=0.15)
        else:
            step = torch.nn.functional.softplus(delta.bias)
            assert 0.99e-3 < step.min() < step.max() < 0.101
            assert delta.weight.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.15)


def test_drop_path_is_placed_as_in_the_official_model(monkeypatch):
    monkeypatch.setattr(
        DropPath, 'forward', lambda self, x: x * (1 - self.drop_prob) if self.training else x
    )
    model = build(
        arch={**ARCH, 'depth': 3}, drop_path_rate=0.4, num_frames=4, out_type='raw',
        out_norm='none',
    ).train()  # fmt: skip
    hidden, _ = model._embed(video())
    residual = 0
    for layer, rate in zip(model.layers, (0.0, 0.0, 0.2), strict=True):
        residual = residual + hidden * (1 - rate)
        hidden = layer.mixer(layer.norm(residual))
    torch.testing.assert_close(model(video())[0], residual + hidden * 0.6)


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        ({'num_frames': 0}, ValueError, 'num_frames=0'),
        ({'num_frames': 5, 'tubelet_size': 2}, ValueError, '5 frames.*tubelet_size=2'),
        ({'tubelet_size': 2}, ValueError, 'tubelet_size=2 needs num_frames'),
        ({'out_type': 'frame_featmap'}, ValueError, 'needs num_frames'),
        ({'cls_token': 'middle'}, ValueError, r"cls_token='middle'.*'head', 'none'"),
        ({'pool': 'max'}, ValueError, "pool='max'.*'cls_cat_avg'"),
        ({'pool': 'avg', 'out_type': 'raw'}, ValueError, "no effect with out_type='raw'"),
        ({'pool': 'cls+avg', 'cls_token': 'none'}, ValueError, 'needs a class token'),
        ({'pool': 'cls', 'bimamba': 'none'}, ValueError, "pool='cls'.*sees nothing"),
        ({'keep_temporal': True, 'pool': 'avg'}, ValueError, 'needs num_frames'),
        ({'keep_temporal': True, 'num_frames': 2}, ValueError, "no effect.*pool='cls'"),
        ({'inflation': 'first'}, ValueError, "inflation='first'"),
        ({'bimamba': 'v1'}, ValueError, "bimamba='v1'"),
        ({'merge': 'sum', 'bimamba': 'none'}, ValueError, "merge='sum' has no effect"),
        ({'dt_init': 'constant'}, ValueError, "dt_init='constant'"),
        ({'ops_backend': 'cuda'}, ValueError, "ops_backend='cuda'"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        VideoMamba(**{'arch': ARCH, 'img_size': 16, 'patch_size': 4, **kwargs})


def test_bad_input():
    model = build(num_frames=4, tubelet_size=2)
    with pytest.raises(ValueError, match=r'frames, height, width\), got \(2, 3, 8, 12\)'):
        model(video()[:, :, 0])
    with pytest.raises(ValueError, match='3 frames, which is no positive multiple'):
        model(video(3))
    with pytest.raises(ValueError, match='8x3 pixels, smaller than a patch'):
        model(video(width=3))
    with pytest.raises(ValueError, match=r'height, width\), got \(2, 3, 4, 8, 12\)'):
        build()(video())
