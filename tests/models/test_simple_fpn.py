import pytest
import torch
import torch.nn.functional as F

from mmvim.models import SimpleFPN, Vim


def test_levels_match_the_definition():
    torch.manual_seed(0)
    neck = SimpleFPN(16, 8, num_outs=6)
    x = torch.randn(2, 16, 5, 7)
    levels = neck((x,))
    sizes = [(20, 28), (10, 14), (5, 7), (2, 3), (1, 2), (1, 1)]
    assert [tuple(f.shape) for f in levels] == [(2, 8, *s) for s in sizes]

    def norm(x, layer):
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-6).sqrt() * layer.weight[:, None, None] + layer.bias[
            :, None, None
        ]

    def up(x, layer):
        return F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)

    with torch.no_grad():
        for p in neck.parameters():
            p += 0.1 * torch.randn_like(p)
    first, ln, _, second = neck.scales[0]
    maps = [
        up(F.gelu(norm(up(x, first), ln)), second),
        up(x, neck.scales[1]),
        x,
        F.max_pool2d(x, 2),
    ]
    for level, (a, a_norm, b, b_norm), made in zip(neck(x), neck.outputs, maps, strict=False):
        expected = norm(
            F.conv2d(norm(F.conv2d(made, a.weight), a_norm), b.weight, padding=1), b_norm
        )
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(neck(x)[4], neck(x)[3][:, :, ::2, ::2])


def test_vim_to_pyramid():
    backbone = Vim({'embed_dims': 16, 'depth': 1}, img_size=64, out_type='featmap', out_norm='none')
    levels = SimpleFPN(16, 8)(backbone(torch.randn(1, 3, 64, 96)))
    assert [tuple(f.shape[2:]) for f in levels] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    sum(f.sum() for f in levels).backward()
    assert all(p.grad is not None for p in backbone.layers.parameters())


def test_start_level():
    x = torch.randn(1, 16, 8, 8)
    neck = SimpleFPN(16, 8, num_outs=5, start_level=1)
    assert [f.shape[-1] for f in neck(x)] == [16, 8, 4, 2, 1]
    sum(f.sum() for f in neck(x)).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_bad_arguments_and_input():
    with pytest.raises(ValueError, match='start_level=4'):
        SimpleFPN(16, start_level=4)
    with pytest.raises(ValueError, match='num_outs=3'):
        SimpleFPN(16, num_outs=3)
    with pytest.raises(ValueError, match='in_channels=18'):
        SimpleFPN(18)
    with pytest.raises(TypeError, match='norm_cfg'):
        SimpleFPN(16, norm_cfg=None)
    neck = SimpleFPN(16)
    with pytest.raises(ValueError, match='wants one map, got 2'):
        neck([torch.randn(1, 16, 2, 2)] * 2)
    with pytest.raises(ValueError, match=r'\(batch, 16, rows, columns\), got \(1, 8, 2, 2\)'):
        neck(torch.randn(1, 8, 2, 2))


def test_registered():
    from mmengine.registry import MODELS

    assert type(MODELS.build({'type': 'mmvim.SimpleFPN', 'in_channels': 16})) is SimpleFPN


def test_feature2pyramid_of_mmseg():
    necks = pytest.importorskip('mmseg.models.necks')
    neck = necks.Feature2Pyramid(16, rescales=[4, 2, 1, 0.5], norm_cfg={'type': 'BN'})
    backbone = Vim(
        {'embed_dims': 16, 'depth': 4}, img_size=64, out_type='featmap', out_indices=(0, 1, 2, 3)
    )
    features = neck(backbone(torch.randn(2, 3, 64, 96)))
    assert [tuple(f.shape) for f in features] == [
        (2, 16, 16, 24), (2, 16, 8, 12), (2, 16, 4, 6), (2, 16, 2, 3),
    ]  # fmt: skip
    sum(f.sum() for f in features).backward()
