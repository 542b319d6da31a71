"""Slow, plain references of the mixers: loops over time and explicit flips, in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (b, l, d), weight (d, 1, w): token t sees t - w + 1 .. t."""
    out = torch.zeros_like(x)
    width = weight.shape[-1]
    for t in range(x.shape[1]):
        for k in range(width):
            source = t - (width - 1) + k
            if source >= 0:
                out[:, t] += x[:, source] * weight[:, 0, k]
    return out + bias


def scan(u, delta, A, B, C, D) -> Tensor:
    """Mamba's recurrence, one step after another (zoh)."""
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs = []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * B[:, t, None] * u[:, t, :, None]
        outputs.append((h * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(outputs, dim=1)


def direction(sd: dict, x: Tensor, suffix: str, a_log: str, skip: str) -> Tensor:
    """One direction before the gate: x (b, l, d_inner), the sequence in its own order."""
    conv = f'conv1d{suffix}'
    rank = sd[f'dt_proj{suffix}.weight'].shape[1]
    n = sd[a_log].shape[1]
    u = F.silu(causal_conv(x, sd[f'{conv}.weight'], sd[f'{conv}.bias']))
    return scan_of(sd, u, suffix, a_log, skip, rank, n)


def scan_of(sd, u, suffix, a_log, skip, rank, n) -> Tensor:
    low, b, c = (u @ sd[f'x_proj{suffix}.weight'].T).split((rank, n, n), dim=-1)
    delta = F.softplus(low @ sd[f'dt_proj{suffix}.weight'].T + sd[f'dt_proj{suffix}.bias'])
    return scan(u, delta, -sd[a_log].exp(), b, c, sd[skip])


def mixer(sd: dict, h: Tensor, bimamba: str = 'none', merge: str = 'sum') -> Tensor:
    """A whole mixer, from the float64 state dict of it."""
    x, z = (h @ sd['in_proj.weight'].T).chunk(2, dim=-1)
    y = direction(sd, x, '', 'A_log', 'D')
    if bimamba == 'v2':
        y = y + direction(sd, x.flip(1), '_b', 'A_b_log', 'D_b').flip(1)
    elif bimamba == 'v1':
        u = F.silu(causal_conv(x, sd['conv1d.weight'], sd['conv1d.bias'])).flip(1)
        rank, n = sd['dt_proj.weight'].shape[1], sd['A_log'].shape[1]
        y = y + scan_of(sd, u, '', 'A_b_log', 'D', rank, n).flip(1)
    if merge == 'mean':
        y = y / 2
    out = (y * F.silu(z)) @ sd['out_proj.weight'].T
    return out * sd['gamma'] if 'gamma' in sd else out


def sub(sd: dict, prefix: str) -> dict:
    """The entries under ``prefix``, without it, in float64."""
    return {k[len(prefix) :]: v.double() for k, v in sd.items() if k.startswith(prefix)}
