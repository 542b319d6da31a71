"""A slow, plain reference of MambaVision in evaluation mode: one window, one head, one step."""

import math

import naive_mamba
import torch
import torch.nn.functional as F
from torch import Tensor


def batch_norm(sd: dict, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    mean, var = (sd[f'{name}.running_{s}'][:, None, None] for s in ('mean', 'var'))
    weight, bias = (sd[f'{name}.{s}'][:, None, None] for s in ('weight', 'bias'))
    return (x - mean) / (var + eps).sqrt() * weight + bias


def layer_norm(sd: dict, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * sd[f'{name}.weight'] + sd[f'{name}.bias']


def linear(sd: dict, name: str, x: Tensor) -> Tensor:
    out = x @ sd[f'{name}.weight'].T
    return out + sd[f'{name}.bias'] if f'{name}.bias' in sd else out


def conv(sd: dict, name: str, x: Tensor, stride: int = 1) -> Tensor:
    return F.conv2d(x, sd[f'{name}.weight'], sd.get(f'{name}.bias'), stride, padding=1)


def conv_block(sd: dict, x: Tensor) -> Tensor:
    out = batch_norm(sd, 'norm1', conv(sd, 'conv1', x))
    out = 0.5 * out * (1 + torch.tanh(math.sqrt(2 / math.pi) * (out + 0.044715 * out**3)))
    out = batch_norm(sd, 'norm2', conv(sd, 'conv2', out))
    return x + (out * sd['gamma'][:, None, None] if 'gamma' in sd else out)


def centred_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise, width 3: token t sees t - 1, t and t + 1."""
    out = torch.zeros_like(x)
    length = x.shape[1]
    for t in range(length):
        for k in range(3):
            if 0 <= t + k - 1 < length:
                out[:, t] += x[:, t + k - 1] * weight[:, 0, k]
    return out


def mamba(sd: dict, x: Tensor, bias_count: int = 2) -> Tensor:
    half = sd['in_proj.weight'].shape[0] // 2
    x, z = linear(sd, 'in_proj', x).split(half, dim=-1)
    x = F.silu(centred_conv(x, sd['conv1d_x.weight']))
    z = F.silu(centred_conv(z, sd['conv1d_z.weight']))
    n = sd['A_log'].shape[1]
    rank = sd['dt_proj.weight'].shape[1]
    low, b, c = linear(sd, 'x_proj', x).split((rank, n, n), dim=-1)
    delta = F.softplus(low @ sd['dt_proj.weight'].T + bias_count * sd['dt_proj.bias'])
    y = naive_mamba.scan(x, delta, -sd['A_log'].exp(), b, c, sd['D'])
    return linear(sd, 'out_proj', torch.cat((y, z), dim=-1))


def attention(sd: dict, x: Tensor, heads: int) -> Tensor:
    dim = x.shape[-1]
    width = dim // heads
    qkv = linear(sd, 'qkv', x)
    outputs = []
    for head in range(heads):
        q, k, v = (
            qkv[..., part * dim + head * width : part * dim + (head + 1) * width]
            for part in range(3)
        )
        scores = torch.einsum('bqc,bkc->bqk', q, k) / math.sqrt(width)
        outputs.append(scores.softmax(-1) @ v)
    return linear(sd, 'proj', torch.cat(outputs, dim=-1))


def token_block(sd: dict, x: Tensor, heads: int, bias_count: int = 2) -> Tensor:
    mixer = naive_mamba.sub(sd, 'mixer.')
    h = layer_norm(sd, 'norm1', x)
    out = attention(mixer, h, heads) if 'qkv.weight' in mixer else mamba(mixer, h, bias_count)
    x = x + (out * sd['gamma_1'] if 'gamma_1' in sd else out)
    mlp = naive_mamba.sub(sd, 'mlp.')
    hidden = linear(mlp, 'fc1', layer_norm(sd, 'norm2', x))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    out = linear(mlp, 'fc2', hidden)
    return x + (out * sd['gamma_2'] if 'gamma_2' in sd else out)


def in_windows(x: Tensor, window: tuple[int, int], function) -> Tensor:
    """Apply ``function`` to each window of ``x`` (b, c, h, w); missing places count as zero."""
    (batch, channels, height, width), (rows, columns) = x.shape, window
    out = torch.zeros_like(x)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            tokens = x.new_zeros(batch, rows * columns, channels)
            inside = [
                (i * columns + j, top + i, left + j)
                for i in range(rows)
                for j in range(columns)
                if top + i < height and left + j < width
            ]
            for t, row, column in inside:
                tokens[:, t] = x[:, :, row, column]
            tokens = function(tokens)
            for t, row, column in inside:
                out[:, :, row, column] = tokens[:, t]
    return out


def blocks_of(sd: dict, level: int) -> list[dict]:
    count = len([k for k in sd if k.startswith(f'levels.{level}.') and k.endswith('norm1.weight')])
    return [naive_mamba.sub(sd, f'levels.{level}.blocks.{j}.') for j in range(count)]


def stages(sd: dict, images: Tensor, windows, heads, bias_count: int = 2) -> list[Tensor]:
    """The four feature maps before their downsampling; ``windows``, ``heads``: of the last two."""
    x = conv(sd, 'patch_embed.conv_down.0', images, stride=2)
    x = batch_norm(sd, 'patch_embed.conv_down.1', x, eps=1e-4).clamp(min=0)
    x = conv(sd, 'patch_embed.conv_down.3', x, stride=2)
    x = batch_norm(sd, 'patch_embed.conv_down.4', x, eps=1e-4).clamp(min=0)
    maps = []
    for level in range(4):
        if level:
            x = conv(sd, f'levels.{level - 1}.downsample.reduction.0', x, stride=2)
        blocks = blocks_of(sd, level)
        if level < 2:
            for block in blocks:
                x = conv_block(block, x)
        else:

            def run(tokens, blocks=blocks, count=heads[level - 2]):
                for block in blocks:
                    tokens = token_block(block, tokens, count, bias_count)
                return tokens

            window = windows[level - 2] or tuple(x.shape[2:])
            x = in_windows(x, window, run)
        maps.append(x)
    return maps
