"""A slow, plain reference of Vim in float64: one patch, one token, one time step at a time."""

import math

import naive_mamba
import torch
import torch.nn.functional as F
from torch import Tensor


def norm(sd: dict, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    if f'{name}.bias' in sd:
        return F.layer_norm(x, x.shape[-1:], sd[f'{name}.weight'], sd[f'{name}.bias'], eps)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * sd[f'{name}.weight']


def embed(sd, images, patch, stride, place):
    """Tokens with class tokens and positions, the grid, and each token's (row, column) or None."""
    height, width = images.shape[2:]
    grid = ((height - patch) // stride + 1, (width - patch) // stride + 1)
    weight, bias = sd['patch_embed.proj.weight'], sd['patch_embed.proj.bias']
    tokens, where = [], []
    for row in range(grid[0]):
        for column in range(grid[1]):
            top, left = row * stride, column * stride
            piece = images[:, :, top : top + patch, left : left + patch]
            tokens.append(torch.einsum('bchw,dchw->bd', piece, weight) + bias)
            where.append((row, column))
    batch = images.shape[0]
    if place == 'double':
        tokens.insert(0, sd['cls_token_head'][0].expand(batch, -1))
        tokens.append(sd['cls_token_tail'][0].expand(batch, -1))
        where = [None, *where, None]
    elif place != 'none':
        index = {'head': 0, 'tail': len(tokens), 'middle': len(tokens) // 2}[place]
        tokens.insert(index, sd['cls_token'][0].expand(batch, -1))
        where.insert(index, None)
    x = torch.stack(tokens, dim=1)
    if 'pos_embed' in sd:
        x = x + sd['pos_embed']
    return x, grid, where


def rotate(x, grid, where, pt_size):
    """Rotate pairs of channels, the first half by the row, the second by the column."""
    dim = x.shape[-1]
    out = x.clone()
    for t, place in enumerate(where):
        if place is None:
            continue
        for pair in range(dim // 2):
            axis, k = divmod(pair, dim // 4)
            angle = place[axis] / grid[axis] * pt_size * 10000 ** (-2 * k / (dim // 2))
            a, b = x[:, t, 2 * pair], x[:, t, 2 * pair + 1]
            out[:, t, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            out[:, t, 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def streams(
    sd, images, *, patch, stride, place, bimamba, merge, rope=False, rope_residual=False,
    pt_size=14, pairs=False, pair_merge='sum', eps=1e-5,
):  # fmt: skip
    """Residual stream after each layer (each pair of layers), the grid and the tokens' places."""
    x, grid, where = embed(sd, images, patch, stride, place)
    depth = 1 + max(int(k.split('.')[1]) for k in sd if k.startswith('layers.'))

    def layer(i, hidden, residual):
        residual = hidden if residual is None else residual + hidden
        mixer = naive_mamba.sub(sd, f'layers.{i}.mixer.')
        normed = norm(sd, f'layers.{i}.norm', residual, eps)
        return naive_mamba.mixer(mixer, normed, bimamba, merge), residual

    hidden, residual, after = x, None, {}
    for i in range(0, depth, 2 if pairs else 1):
        if rope:
            hidden = rotate(hidden, grid, where, pt_size)
            if rope_residual and residual is not None:
                residual = rotate(residual, grid, where, pt_size)
        if pairs:
            flipped = None if residual is None else residual.flip(1)
            h_f, r_f = layer(i, hidden, residual)
            h_b, r_b = layer(i + 1, hidden.flip(1), flipped)
            hidden, residual = h_f + h_b.flip(1), r_f + r_b.flip(1)
            if pair_merge == 'mean':
                hidden, residual = hidden / 2, residual / 2
            after[i + 1] = hidden + residual
        else:
            hidden, residual = layer(i, hidden, residual)
            after[i] = hidden + residual
    return after, grid, where


def select(x, grid, where, out_type):
    """Class token, map, mean of the patches, or all tokens."""
    patches = [t for t, place in enumerate(where) if place is not None]
    if out_type == 'raw':
        return x
    if out_type == 'cls_token':
        return x[:, [t for t, place in enumerate(where) if place is None]].mean(1)
    if out_type == 'avg_featmap':
        return x[:, patches].mean(1)
    out = x.new_zeros(x.shape[0], x.shape[2], *grid)
    for t in patches:
        row, column = where[t]
        out[:, :, row, column] = x[:, t]
    return out
