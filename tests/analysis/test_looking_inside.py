"""Hidden attention, states, receptive fields and CAM say what the models compute."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from script_runner import TOOLS, run_script
from torch import nn

from mmvim import ops
from mmvim.analysis import (
    class_activation_map,
    effective_receptive_field,
    hidden_attention,
    record_scans,
    state_norms,
)
from mmvim.analysis.saliency import default_cam_layer, high_contribution_area
from mmvim.analysis.subjects import open_model, read_subject
from mmvim.apis import build_model
from mmvim.apis.model_zoo import load_config
from mmvim.layers import BiMamba, Mamba, MambaVisionMixer
from mmvim.layers.mambavision import window_partition
from mmvim.models import MambaVision, VideoMamba, Vim, VMamba
from mmvim.models.backbones.base import TokenLayout

pytest.importorskip('matplotlib')
QUICKSTART = TOOLS.parent / 'configs' / 'quickstart'
ARCH = dict(embed_dims=16, depth=2, d_state=4)


class Ops(nn.Module):
    """A model that is one call of an op."""

    def forward(self, function, *args, **kwargs):
        return function(*args, **kwargs)


def scan_inputs(groups=1):
    torch.manual_seed(0)
    b, length, d, n = 2, 9, 6, 4
    u, delta = torch.randn(2, b, length, d, dtype=torch.float64)
    A = -torch.rand(d, n, dtype=torch.float64) - 0.1
    B, C = torch.randn(2, b, length, groups, n, dtype=torch.float64)
    D, bias = torch.randn(2, d, dtype=torch.float64)
    return u, delta, A, B, C, D, bias


def applied(scan):
    """The matrices applied to the input, in channels-last layout."""
    matrices = hidden_attention(scan)
    out = torch.einsum('bdts,bsd->btd', matrices, scan.u)
    return out if scan.D is None else out + scan.u * scan.D


@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('method', ops.DISCRETIZATIONS)
def test_the_matrices_reproduce_the_scan(method, reverse, groups):
    u, delta, A, B, C, D, bias = scan_inputs(groups)
    options = dict(delta_softplus=True, discretization=method, reverse=reverse)
    call = (ops.selective_scan, u, delta, A, B, C, D)
    (scan,) = record_scans(Ops(), forward=lambda: Ops()(*call, delta_bias=bias, **options))
    assert scan.direction == ('backward' if reverse else 'forward')
    expected = ops.selective_scan(*call[1:], delta_bias=bias, **options)
    torch.testing.assert_close(applied(scan), expected, rtol=1e-10, atol=1e-10)
    matrices = hidden_attention(scan)
    # Nothing is read of what comes later.
    later = torch.triu(torch.ones(9, 9), 1).bool()
    assert not matrices[..., later.T if reverse else later].any()
    torch.testing.assert_close(hidden_attention(scan, reduce='abs'), matrices.abs().mean(1))
    torch.testing.assert_close(hidden_attention(scan, reduce='mean'), matrices.mean(1))


@pytest.mark.parametrize('rank', [None, 2])
def test_the_matrices_of_all_routes_reproduce_a_cross_scan(rank):
    torch.manual_seed(0)
    b, h, w, k, d, n = 2, 3, 4, 4, 5, 2
    x, D, bias = (torch.randn(s, dtype=torch.float64) for s in ((b, h, w, d), (k, d), (k, d)))
    B, C = torch.randn(2, b, h, w, k, n, dtype=torch.float64)
    delta = torch.randn(b, h, w, k, rank or d, dtype=torch.float64)
    A = -torch.rand(k, d, n, dtype=torch.float64) - 0.1
    weight = None if rank is None else torch.randn(k, d, rank, dtype=torch.float64)

    def run():
        return ops.cross_scan(x, delta, A, B, C, D, bias, delta_weight=weight, delta_softplus=True)

    scans = record_scans(Ops(), forward=lambda: Ops()(run))
    assert [scan.direction for scan in scans] == list(ops.ROUTES)
    total = sum(applied(scan) for scan in scans).view(b, h, w, d)
    torch.testing.assert_close(total, run(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('mixer', [Mamba, BiMamba, MambaVisionMixer])
def test_scans_of_mixers(mixer):
    """The recorded scans, put through the rest of the mixer, give what the mixer gives."""
    torch.manual_seed(0)
    layer = mixer(d_model=8, d_state=4).double().eval()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    scans = record_scans(layer, x)
    assert [s.direction for s in scans] == ['forward', 'backward'][: len(scans)]
    assert len(scans) == 1 + (mixer is BiMamba)
    y = sum(applied(scan) for scan in scans)
    z = layer.in_proj(x).chunk(2, dim=-1)[1]
    if mixer is MambaVisionMixer:
        z = torch.cat((y, layer.conv1d_z(z)), dim=-1)
    else:
        z = y * nn.functional.silu(z) * (0.5 if mixer is BiMamba else 1)
    torch.testing.assert_close(layer.out_proj(z), layer(x))


@pytest.mark.parametrize('method', ['zoh', 'tustin'])
def test_state_norms(method):
    u, delta, A, B, C, _, _ = scan_inputs()
    call = (ops.selective_scan, u, delta.abs(), A, B, C)
    (scan,) = record_scans(Ops(), forward=lambda: Ops()(*call, discretization=method))
    norms = state_norms(scan)
    for length in (1, 5, 9):
        cut = [x[:, :length] if x.dim() > 2 else x for x in call[1:]]
        _, state = ops.selective_scan(*cut, discretization=method, return_last_state=True)
        h = state[..., : A.shape[1]]
        torch.testing.assert_close(norms[:, length - 1], h.square().mean((1, 2)).sqrt())


def test_scans_with_states_are_refused():
    u, delta, A, B, C, _, _ = scan_inputs()
    state = torch.zeros(2, 6, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match='continues from a state'):
        record_scans(
            Ops(),
            forward=lambda: ops.selective_scan(u, delta, A, B, C, initial_state=state),
        )
    with pytest.raises(ValueError, match='no scan ran in Linear'):
        record_scans(nn.Linear(2, 2), torch.rand(1, 2))
    numbers = torch.zeros(u.shape[:2], dtype=torch.int32)
    with pytest.raises(ValueError, match='packed sequences'):
        record_scans(Ops(), forward=lambda: ops.selective_scan(u, delta, A, B, C, seq_idx=numbers))
    (scan,) = record_scans(Ops(), forward=lambda: ops.selective_scan(u, delta, A, B, C))
    with pytest.raises(ValueError, match="reduce must be None, 'abs' or 'mean', got 'max'"):
        hidden_attention(scan, reduce='max')


@pytest.mark.parametrize('place', ['middle', 'head', 'tail', 'double', 'none'])
def test_layout_of_vim(place):
    model = Vim(ARCH, img_size=32, patch_size=8, cls_token=place).eval()
    images = torch.rand(2, 3, 24, 40)
    scans = record_scans(model, images)
    assert [s.layer for s in scans] == ['layers.0.mixer'] * 2 + ['layers.1.mixer'] * 2
    layout = model.token_layout(images.shape, scans[0].layer)
    assert layout.size == (3, 5)
    length = scans[0].u.shape[1]
    patches = [i for i in range(length) if i not in layout.class_tokens]
    values = torch.arange(length).float().expand(2, -1)
    assert layout.to_map(values)[1].flatten().tolist() == patches
    matrices = torch.rand(2, length, length)
    read = layout.to_rows(matrices)
    tokens = layout.class_tokens or range(length)
    torch.testing.assert_close(read, torch.stack([matrices[:, t] for t in tokens]).mean(0))


@pytest.mark.parametrize('version', ['v1', 'v2'])
def test_layout_of_vmamba(version):
    arch = dict(embed_dims=8, depths=(1, 2), d_state=2, patchembed_version=version)
    model = VMamba(arch, out_indices=(0, 1), out_type='featmap').eval()
    images = torch.rand(2, 3, 26, 44)
    maps = model(images)
    scans = record_scans(model, images)
    names = ['layers.0.blocks.0.op', 'layers.1.blocks.0.op', 'layers.1.blocks.1.op']
    assert [s.layer for s in scans] == [name for name in names for _ in ops.ROUTES]
    assert [s.direction for s in scans] == 3 * list(ops.ROUTES)
    for scan in scans:
        stage = int(scan.layer.split('.')[1])
        layout = model.token_layout(images.shape, scan.layer)
        assert layout.size == tuple(maps[stage].shape[2:])
        assert layout.to_map(scan.delta.mean(-1)).shape == (2, *layout.size)
        assert sorted(scan.order) == list(range(scan.u.shape[1]))
    with pytest.raises(ValueError, match=r"'patch_embed' is in no stage"):
        model.token_layout(images.shape, 'patch_embed')


def test_layout_of_clips_and_windows():
    model = VideoMamba(ARCH, img_size=16, patch_size=8, num_frames=4, tubelet_size=2).eval()
    clip = torch.rand(1, 3, 4, 16, 24)
    (scan, *_) = record_scans(model, clip)
    maps = model.token_layout(clip.shape, scan.layer).to_map(torch.arange(13.0)[None])
    assert maps[0].tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]

    arch = dict(depths=(1, 1, 2, 2), embed_dims=8, stem_dims=4, num_heads=(1, 1))
    model = MambaVision(arch, window_sizes=(2, None)).eval()
    images = torch.rand(2, 3, 70, 100)
    scans = record_scans(model, images)
    assert [s.layer for s in scans] == ['levels.2.blocks.0.mixer', 'levels.3.blocks.0.mixer']
    layouts = [model.token_layout(images.shape, s.layer) for s in scans]
    assert [(x.size, x.window) for x in layouts] == [((5, 7), (2, 2)), ((3, 4), (3, 4))]
    for scan, layout in zip(scans, layouts, strict=True):
        known = torch.rand(2, 1, *layout.size)
        tokens = window_partition(known, layout.window)[..., 0]
        assert tokens.shape == scan.u.shape[:2]
        assert torch.equal(layout.to_map(tokens), known[:, 0])
    with pytest.raises(ValueError, match='in no stage that has tokens'):
        model.token_layout(images.shape, 'levels.1')


def test_receptive_field_of_a_convolution():
    """Two convolutions of 3 x 3 see 5 x 5 pixels, Vim all of them."""

    class Maps(nn.Sequential):
        def forward(self, x):
            return (super().forward(x),)

    convolutions = Maps(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    field = effective_receptive_field(convolutions, torch.randn(2, 3, 16, 16))
    seen = torch.zeros(16, 16, dtype=torch.bool)
    seen[6:11, 6:11] = True
    assert torch.equal(field > 0, seen)
    assert field.max() == 1
    assert high_contribution_area(field)[0.99] < 0.2
    vim = Vim(ARCH, img_size=32, patch_size=8, out_type='featmap').eval()
    field = effective_receptive_field(vim, torch.randn(1, 3, 32, 32))
    assert (field > 0).float().mean() > 0.99
    assert high_contribution_area(torch.ones(200, 200))[0.5] == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="out_type='featmap'"):
        effective_receptive_field(Vim(ARCH, img_size=32, patch_size=8), torch.randn(1, 3, 32, 32))


def classifier(kind, **settings):
    cfg = Config.fromfile(QUICKSTART / f'{kind}_digits_cls.py')
    cfg.merge_from_dict({'model': settings})
    torch.manual_seed(0)
    return build_model(cfg).eval()


def test_cam_finds_the_patch_that_decides():
    """A head that reads one channel, and a layer that puts it at one place: there the map is 1."""
    model = classifier('vim', backbone=dict(out_type='avg_featmap'))
    images = torch.rand(1, 3, 32, 32)
    place = 6
    kept = {}

    def mark(module, args, out):
        hidden = torch.zeros_like(out[0]) + 0 * out[0]
        token = place + (place >= 8)  # the class token stands behind eight patches
        hidden[:, token] = out[0][:, token].abs() + 1
        kept['hidden'] = hidden
        return hidden, out[1]

    handle = model.backbone.layers[3].norm.register_forward_hook(mark)
    maps, classes, scores = class_activation_map(model, images)
    handle.remove()
    assert maps.shape == (1, 4, 4)
    assert default_cam_layer(model) == 'backbone.layers.3.norm'
    assert classes.shape == scores.shape == (1,)
    others = maps.flatten()[[i for i in range(16) if i != place]]
    assert not others.any()


def test_cam_of_maps_with_channels_last():
    backbone = dict(type='mmvim.VMamba', arch=dict(depths=(1, 1), embed_dims=8))
    head = dict(type='LinearClsHead', num_classes=5, in_channels=16)
    cfg = dict(default_scope='mmpretrain', model=dict(type='ImageClassifier', backbone=backbone))
    cfg['model']['head'] = head
    torch.manual_seed(0)
    model = build_model(Config(cfg)).eval()

    def mark(module, args, out):
        hidden = 0 * out
        hidden[:, 1, 4] = out[:, 1, 4]
        return hidden

    assert default_cam_layer(model) == 'backbone.layers.1'
    handle = model.backbone.layers[1].register_forward_hook(mark)
    maps = [class_activation_map(model, torch.rand(2, 3, 24, 40), k)[0] for k in range(5)]
    handle.remove()
    assert maps[0].shape == (2, 3, 5)
    seen = torch.stack(maps).amax((0, 1)) > 0
    assert seen[1, 4]
    assert seen.sum() == 1
    # The convolution before it has its channels first.
    layer = 'backbone.layers.0.downsample.1'
    assert class_activation_map(model, torch.rand(2, 3, 24, 40), layer=layer)[0].shape == (2, 3, 5)


def test_receptive_field_after_a_layer_norm():
    """The sum of whose outputs does not depend on the image."""
    torch.manual_seed(0)
    model = VMamba(dict(depths=(1, 1), embed_dims=8), out_type='featmap').eval()
    field = effective_receptive_field(model, torch.randn(1, 3, 40, 40))
    assert (field > 1e-6).float().mean() > 0.5


@pytest.mark.parametrize('kind', ['vim', 'mambavision'])
def test_cam(kind):
    model = classifier(kind)
    images = torch.rand(2, 3, 32, 32)
    logits = model(images, mode='tensor')
    maps, classes, scores = class_activation_map(model, images)
    assert torch.equal(classes, logits.argmax(1))
    torch.testing.assert_close(scores, logits.softmax(1).amax(1).detach())
    assert maps.min() >= 0
    assert maps.max() <= 1
    _, classes, _ = class_activation_map(model, images, target=3)
    assert classes.tolist() == [3, 3]
    with pytest.raises(ValueError, match='target=10 is no class; the model has 10'):
        class_activation_map(model, images, target=10)
    with pytest.raises(ValueError, match="no module 'nothing'"):
        class_activation_map(model, images, layer='nothing')
    with pytest.raises(ValueError, match='Vim has no head'):
        class_activation_map(Vim(ARCH), images)


def test_values_of_a_layout_without_class_tokens_are_means():
    matrices = torch.rand(2, 4, 4)
    torch.testing.assert_close(TokenLayout((2, 2)).to_rows(matrices), matrices.mean(1))


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / 'photo.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(path)
    return path


DET = QUICKSTART / 'vim_digits_det.py'
VIM, MAMBAVISION = (QUICKSTART / f'{kind}_digits_cls.py' for kind in ('vim', 'mambavision'))
SEG, VIDEO = QUICKSTART / 'vim_digits_seg.py', QUICKSTART / 'videomamba_digits_video.py'


@pytest.mark.parametrize(
    ('tool', 'model', 'options'),
    [
        ('scan_maps', VIM, ('--token', 1, 2, '--layers', 0, 3)),
        ('scan_maps', SEG, ('--what', 'delta', '--shape', 64, 48)),
        ('scan_maps', MAMBAVISION, ('--shape', 32)),
        ('scan_maps', VIDEO, ('--layers', 1)),
        ('state_norms', MAMBAVISION, ('--shape', 64, '--json')),
        ('state_norms', VIDEO, ()),
        ('cam', VIM, ('--target', 3)),
        ('cam', VIDEO, ()),
    ],
)
def test_tools_draw(tool, model, options, photo, tmp_path):
    out = tmp_path / 'out.png'
    result = run_script(f'analysis/{tool}.py', model, photo, '--out', out, *options)
    assert result.returncode == 0, result.stderr
    picture = np.asarray(Image.open(out).convert('RGB'))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    if '--json' in options:
        assert set(json.loads(result.stdout)) == {'forward'}
    again = run_script(f'analysis/{tool}.py', model, photo, '--out', out, *options)
    assert again.returncode == 2
    assert 'exists; --overwrite replaces it' in again.stderr


def test_receptive_field_tool(photo, tmp_path):
    out = tmp_path / 'erf.png'
    result = run_script(
        'analysis/receptive_field.py',
        *(VIM, MAMBAVISION, '--shape', 64, '--count', 1, '--out', out),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('99% in') == 2
    assert Image.open(out).size[0] > 600


def test_tools_name_what_is_wrong(photo, tmp_path):
    out = ('--out', tmp_path / 'out.png')

    def error(tool, *args):
        result = run_script(f'analysis/{tool}.py', *args)
        assert result.returncode == 2
        assert result.stderr.count('\n') == 1
        return result.stderr

    assert 'outside the 4 x 4 tokens' in error(
        'scan_maps', VIM, photo, *out, '--shape', 32, '--token', 4, 0
    )
    assert 'has mixers 0 .. 3' in error('scan_maps', VIM, photo, *out, '--layers', 4)
    assert '--token is for --what' in error(
        'scan_maps', VIM, photo, *out, '--token', 0, 0, '--what', 'delta'
    )
    assert 'does not exist' in error('scan_maps', VIM, tmp_path / 'no.png', *out)
    assert 'must end with one of' in error('scan_maps', VIM, photo, '--out', tmp_path / 'x.bin')
    assert 'has no head' in error('cam', SEG, photo, *out)
    assert 'one video at a time' in error('cam', VIDEO, photo, photo, *out)
    assert 'of videos' in error('receptive_field', VIDEO, *out)
    assert '--weights has 1 entries for 2' in error(
        'receptive_field', VIM, VIM, '--weights', 'none', *out
    )
    (tmp_path / 'bad.png').write_bytes(b'no image')
    assert 'cannot read the image' in error('state_norms', VIM, tmp_path / 'bad.png', *out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bad.png', 'photo.png']


@pytest.mark.parametrize('path', [VIM, SEG, DET])
def test_models_see_what_the_test_pipeline_makes(path, tmp_path):
    """Also a turned photograph, cut and padded: the picture shows each pixel of the input."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pixels = np.full((120, 200, 3), 60, np.uint8)
    pixels[:, :100] = 200
    file = tmp_path / 'turned.jpg'
    Image.fromarray(pixels).save(file, exif=exif)
    cfg = load_config(path)
    if path == VIM:
        crop = [dict(type='ResizeEdge', scale=64), dict(type='CenterCrop', crop_size=48)]
        cfg.test_dataloader.dataset.pipeline[1:1] = crop
    model = open_model(cfg)
    picture, images = read_subject(cfg, model, str(file))
    assert picture.shape == (*images.shape[2:], 3)
    assert images.shape[2:] == (48, 48) if path == VIM else images.shape[2] > images.shape[3]
    mean, std = (getattr(model.data_preprocessor, k).flatten() for k in ('mean', 'std'))
    expected = (torch.tensor(picture).permute(2, 0, 1) - mean[:, None, None]) / std[:, None, None]
    height = images.shape[2] // 2
    torch.testing.assert_close(
        images[0, :, :height, :32], expected[:, :height, :32], atol=1e-3, rtol=0
    )
    assert picture[4, 10].mean() > 180  # the bright half is above, once it is turned
    shaped, images = read_subject(cfg, model, str(file), (64, 32))
    assert shaped.shape[:2] == (64, 32)
    assert shaped[8].mean() > 180 > 80 > shaped[-8].mean()


@pytest.mark.parametrize('frames', [None, 2])
def test_pictures_are_rgb_and_normalised_by_channel(tmp_path, frames):
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / 'x.png')
    mean, std = [10.0, 20.0, 30.0], [1.0, 2.0, 4.0]  # of red, green and blue
    kind = dict(type='mmpretrain.ClsDataPreprocessor', to_rgb=True)
    if frames is not None:
        kind = dict(type='mmvim.VideoDataPreprocessor')
    model = nn.Module()
    model.data_preprocessor = MODELS.build(dict(kind, mean=mean, std=std))
    steps = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    cfg = Config(
        dict(default_scope='mmpretrain', test_dataloader=dict(dataset=dict(pipeline=steps)))
    )
    shape = None if frames is None else (32, 48)
    picture, inputs = read_subject(cfg, model, str(tmp_path / 'x.png'), shape, frames)
    assert np.array_equal(picture if frames is None else picture[1], image)
    expected = torch.from_numpy((image - np.array(mean)) / np.array(std)).float().permute(2, 0, 1)
    torch.testing.assert_close(inputs[0] if frames is None else inputs[0, :, 1], expected)
