import math

import pytest
import torch
import torch.nn.functional as F

from mmvim.layers import (
    CLS_TOKEN_PLACES,
    PatchEmbed,
    apply_rotary,
    insert_tokens,
    resize_pos_embed,
    rotary_table_2d,
    split_tokens,
    token_positions,
)
from mmvim.layers.position import RESIZE_MODES, _multiplied


@pytest.mark.parametrize('place', CLS_TOKEN_PLACES)
@pytest.mark.parametrize('patches', [1, 4, 5])
def test_tokens_go_in_and_out(place, patches):
    positions = token_positions(place, patches)
    x = torch.randn(2, patches, 3)
    tokens = [torch.full((1, 1, 3), float(i)) for i in range(len(positions))]
    sequence = insert_tokens(x, tokens, positions)
    assert sequence.shape[1] == patches + len(positions)
    for i, position in enumerate(positions):
        assert sequence[:, position].eq(i).all()
    back, found = split_tokens(sequence, positions)
    assert torch.equal(back, x)
    assert [f[0, 0, 0].item() for f in found] == list(range(len(positions)))


def test_middle_is_where_the_official_model_has_it():
    assert token_positions('middle', 196) == (98,)
    assert token_positions('middle', 729) == (364,)


@pytest.mark.parametrize('place', CLS_TOKEN_PLACES)
def test_resize_keeps_tokens_and_interpolates_patches(place):
    torch.manual_seed(0)
    count = len(token_positions(place, 1))
    pos = torch.randn(1, 12 + count, 8)
    out = resize_pos_embed(pos, (3, 4), (6, 5), place)
    patches, tokens = split_tokens(pos, token_positions(place, 12))
    grid = patches.reshape(1, 3, 4, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(6, 5), mode='bicubic', align_corners=False)
    got, got_tokens = split_tokens(out, token_positions(place, 30))
    torch.testing.assert_close(got, expected.permute(0, 2, 3, 1).reshape(1, 30, 8))
    assert all(torch.equal(a, b) for a, b in zip(tokens, got_tokens, strict=True))
    assert resize_pos_embed(pos, (3, 4), (3, 4), place) is pos


RESIZES = pytest.mark.parametrize(
    ('source', 'target'),
    [((3, 4), (6, 5)), ((14, 14), (64, 64)), ((8, 6), (3, 6)), ((5, 7), (5, 9))],
)


@pytest.mark.parametrize('mode', RESIZE_MODES)
@RESIZES
def test_resizing_is_two_products(source, target, mode):
    torch.manual_seed(0)
    pos = torch.randn(1, math.prod(source), 8, requires_grad=True)
    grad = torch.randn(1, math.prod(target), 8)
    expected = resize_pos_embed(pos, source, target, mode=mode)
    (expected_gradient,) = torch.autograd.grad(expected, pos, grad)
    with torch.autocast('cpu', torch.bfloat16):
        got = _multiplied(pos, source, target, mode).float()
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(got, pos, grad)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize('mode', RESIZE_MODES)
@RESIZES
def test_a_gpu_resizes_like_a_cpu(source, target, mode):
    torch.manual_seed(0)
    results = []
    pos = torch.randn(1, math.prod(source) + 1, 8)
    grad = torch.randn(1, math.prod(target) + 1, 8)
    for device in ('cpu', 'cuda'):
        x = pos.to(device).requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            out = resize_pos_embed(x, source, target, 'middle', mode)
        results.append((out.cpu(), torch.autograd.grad(out, x, grad.to(device))[0].cpu()))
    for one, two in zip(*results, strict=True):
        assert one.dtype == two.dtype == torch.float32
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('grid', [(3, 3), (2, 5)])
def test_rotary_rotates_each_patch_by_its_row_and_column(grid):
    dim, pt_size = 16, 7
    positions = token_positions('middle', grid[0] * grid[1])
    cos, sin = rotary_table_2d(dim, grid, pt_size, positions)
    x = torch.randn(2, grid[0] * grid[1] + 1, dim)
    out = apply_rotary(x, cos, sin)
    place, patches = positions[0], [t for t in range(x.shape[1]) if t != positions[0]]
    torch.testing.assert_close(out[:, place], x[:, place])
    as_complex = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    for patch, t in enumerate(patches):
        row, column = divmod(patch, grid[1])
        for pair in range(dim // 2):
            coordinate = row / grid[0] if pair < dim // 4 else column / grid[1]
            frequency = 10000 ** -(2 * (pair % (dim // 4)) / (dim // 2))
            angle = torch.tensor(coordinate * pt_size * frequency)
            expected = as_complex[:, t, pair] * torch.polar(torch.tensor(1.0), angle)
            got = torch.view_as_complex(out[:, t].unflatten(-1, (-1, 2)).contiguous())[:, pair]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('patch', 'stride'), [(4, None), (4, 2), ((4, 2), (3, 1))])
def test_patches_are_in_raster_order_and_stay_inside(patch, stride):
    embed = PatchEmbed(3, 5, patch, stride)
    x = torch.randn(2, 3, 11, 9)
    tokens, grid = embed(x)
    (height, width), (down, right) = embed.patch_size, embed.stride
    assert grid == ((11 - height) // down + 1, (9 - width) // right + 1)
    assert tokens.shape == (2, grid[0] * grid[1], 5)
    for row in range(grid[0]):
        for column in range(grid[1]):
            piece = x[:, :, row * down : row * down + height, column * right :][..., :width]
            expected = torch.einsum('bchw,dchw->bd', piece, embed.proj.weight) + embed.proj.bias
            torch.testing.assert_close(
                tokens[:, row * grid[1] + column], expected, rtol=1e-4, atol=1e-5
            )


def test_patch_embed_refuses_bad_input():
    embed = PatchEmbed(3, 5, 4)
    with pytest.raises(ValueError, match=r'3x9 pixels, smaller than a patch of 4x4'):
        embed(torch.randn(1, 3, 3, 9))
    with pytest.raises(ValueError, match=r'\(batch, 3, height, width\)'):
        embed(torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match='patch_size=0'):
        PatchEmbed(3, 5, 0)
