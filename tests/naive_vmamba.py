"""VMamba in plain PyTorch from an official state dict, step by step; structure of arXiv 2401.10166.

Maps are (batch, channels, rows, columns) throughout, and every scan is a loop over the positions.
"""

import torch
import torch.nn.functional as F


def layer_norm(sd, name, x):
    weight, bias = sd[f'{name}.weight'], sd[f'{name}.bias']
    return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias).movedim(-1, 1)


def linear(sd, name, x):
    return F.conv2d(x, sd[f'{name}.weight'][..., None, None], sd.get(f'{name}.bias'))


def routes(rows, columns):
    """The positions of the map in the order of each of the four scans: (4, rows * columns)."""
    grid = torch.arange(rows * columns).view(rows, columns)
    forward = torch.stack([grid.flatten(), grid.t().flatten()])
    return torch.cat([forward, forward.flip(1)])


def scan(sd, op, x):
    """The sum of the four scans of (batch, inner, rows, columns)."""
    batch, inner, rows, columns = x.shape
    order = routes(rows, columns)
    xs = x.flatten(2)[:, :, order].permute(2, 0, 1, 3)  # (4, batch, inner, length)
    projection, deltas = sd[f'{op}x_proj_weight'], sd[f'{op}dt_projs_weight']
    rank = deltas.shape[2]
    states = (projection.shape[1] - rank) // 2
    low, b, c = torch.einsum('kbdl,kcd->kblc', xs, projection).split((rank, states, states), -1)
    delta = torch.einsum('kblr,kdr->kbld', low, deltas) + sd[f'{op}dt_projs_bias'][:, None, None]
    delta = F.softplus(delta)
    a = -sd[f'{op}A_logs'].exp().view(4, 1, inner, states)
    d = sd[f'{op}Ds'].view(4, 1, inner)
    hidden = x.new_zeros(4, batch, inner, states)
    out = torch.zeros_like(xs)
    for i in range(rows * columns):
        step, value = delta[:, :, i, :, None], xs[..., i, None]
        hidden = (step * a).exp() * hidden + step * b[:, :, i, None] * value
        out[..., i] = (hidden * c[:, :, i, None]).sum(-1) + d * xs[..., i]
    merged = torch.zeros_like(x).flatten(2)
    for route, y in zip(order, out, strict=True):
        merged[:, :, route] += y
    return merged.view_as(x)


def block(sd, name, x):
    op = f'{name}op.'
    h = linear(sd, f'{op}in_proj', layer_norm(sd, f'{name}norm', x))
    kernel, gate = sd[f'{op}conv2d.weight'], None
    if h.shape[1] == 2 * len(kernel):
        h, gate = h.chunk(2, dim=1)
    h = F.conv2d(h, kernel, sd.get(f'{op}conv2d.bias'), padding=1, groups=len(kernel))
    y = layer_norm(sd, f'{op}out_norm', scan(sd, op, F.silu(h)))
    x = x + linear(sd, f'{op}out_proj', y if gate is None else y * F.silu(gate))
    if f'{name}mlp.fc1.weight' not in sd:
        return x
    h = F.gelu(linear(sd, f'{name}mlp.fc1', layer_norm(sd, f'{name}norm2', x)))
    return x + linear(sd, f'{name}mlp.fc2', h)


def stem(sd, x):
    if 'patch_embed.5.weight' not in sd:
        x = F.conv2d(x, sd['patch_embed.0.weight'], sd['patch_embed.0.bias'], stride=4)
        return layer_norm(sd, 'patch_embed.2', x)
    x = F.conv2d(x, sd['patch_embed.0.weight'], sd['patch_embed.0.bias'], stride=2, padding=1)
    x = F.gelu(layer_norm(sd, 'patch_embed.2', x))
    x = F.conv2d(x, sd['patch_embed.5.weight'], sd['patch_embed.5.bias'], stride=2, padding=1)
    return layer_norm(sd, 'patch_embed.7', x)


def downsample(sd, name, x):
    if f'{name}reduction.weight' not in sd:
        weight, bias = sd[f'{name}1.weight'], sd[f'{name}1.bias']
        return layer_norm(sd, f'{name}3', F.conv2d(x, weight, bias, stride=2, padding=1))
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    corners = [(0, 0), (1, 0), (0, 1), (1, 1)]
    x = torch.cat([x[:, :, row::2, column::2] for row, column in corners], dim=1)
    return linear(sd, f'{name}reduction', layer_norm(sd, f'{name}norm', x))


def forward(sd, x, depths):
    """Return the map of each stage before its downsampling, and the logits."""
    x, maps = stem(sd, x), []
    for stage, depth in enumerate(depths):
        if stage:
            x = downsample(sd, f'layers.{stage - 1}.downsample.', x)
        for i in range(depth):
            x = block(sd, f'layers.{stage}.blocks.{i}.', x)
        maps.append(x)
    pooled = layer_norm(sd, 'classifier.norm', x).mean((2, 3))
    return maps, F.linear(pooled, sd['classifier.head.weight'], sd['classifier.head.bias'])
