"""Plain float64 loops over time, channels before time, for autograd to differentiate."""

import torch
import torch.nn.functional as F


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False):
    """(gated, ungated, last state); B and C (d, n), (b, n, l) or (b, g, n, l)."""
    b, d, length = u.shape
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = F.softplus(step) if softplus else step

    def at(matrix, t):
        if matrix.dim() == 2:
            return matrix
        if matrix.dim() == 3:
            return matrix[:, None, :, t]
        return matrix[..., t].repeat_interleave(d // matrix.shape[1], 1)

    h = u.new_zeros(b, d, A.shape[1])
    columns = []
    for t in range(length):
        s = step[:, :, t, None]
        h = torch.exp(s * A) * h + s * at(B, t) * u[:, :, t, None]
        columns.append((h * at(C, t)).sum(-1))
    y = torch.stack(columns, -1)
    if D is not None:
        y = y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), y, h


def conv(x, weight, bias=None, silu=False, seq_idx=None, initial=None):
    """Each step from its own and the w - 1 steps before it."""
    length, width = x.shape[2], weight.shape[1]
    before = x.new_zeros(*x.shape[:2], width - 1) if initial is None else initial
    padded = torch.cat([before, x], -1)
    columns = []
    for t in range(length):
        total = torch.zeros_like(x[..., 0])
        for k in range(width):
            source = t - (width - 1) + k
            if seq_idx is None:
                total = total + padded[..., t + k] * weight[:, k]
            elif source >= 0:
                same = (seq_idx[:, source] == seq_idx[:, t]).to(x.dtype)
                total = total + padded[..., t + k] * weight[:, k] * same[:, None]
        total = total if bias is None else total + bias
        total = F.silu(total) if silu else total
        if seq_idx is not None:
            total = total * (seq_idx[:, t] >= 0).to(x.dtype)[:, None]
        columns.append(total)
    return torch.stack(columns, -1)
