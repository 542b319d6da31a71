#!/usr/bin/env python3
"""A program as research code writes it, on mamba_ssm alone; timed by tools/benchmark/dropin.py.

A stack of residual blocks, each with a mixer forwards and one backwards, of Vim-T's width.
"""

import argparse
import json
import time

import torch
from mamba_ssm import Mamba
from mamba_ssm.modules import mamba_simple
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from mamba_ssm.ops.triton.layer_norm import RMSNorm, rms_norm_fn
from torch import nn


class Block(nn.Module):
    """Add, normalise, mix in both directions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.forwards = Mamba(dim)
        self.backwards = Mamba(dim)

    def forward(self, x, residual):
        """Return the mixers' output and the new residual."""
        x, residual = rms_norm_fn(
            x,
            self.norm.weight,
            self.norm.bias,
            residual=residual,
            eps=self.norm.eps,
            prenorm=True,
            residual_in_fp32=True,
        )
        return self.forwards(x) + self.backwards(x.flip(1)).flip(1), residual


def milliseconds(function, device: str, times: int) -> float:
    """Time of one call: of the GPU, or of the one core that a CPU run may use."""
    for _ in range(1 if device == 'cpu' else 10):
        function()
    if device == 'cpu':
        start = time.process_time()
        for _ in range(times):
            function()
        return (time.process_time() - start) / times * 1e3
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times * 1e3


def main() -> None:
    """Print times and a result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--length', type=int, default=197)
    parser.add_argument('--dim', type=int, default=192)
    parser.add_argument('--depth', type=int, default=4)
    parser.add_argument('--times', type=int, default=2)
    parser.add_argument(
        '--reference', action='store_true', help="with mamba_ssm's own scan in PyTorch"
    )
    args = parser.parse_args()
    if args.reference:
        mamba_simple.selective_scan_fn = selective_scan_ref
        mamba_simple.causal_conv1d_fn = None
    torch.set_num_threads(1)
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(args.dim) for _ in range(args.depth))
    if args.reference:
        for block in blocks:
            block.forwards.use_fast_path = block.backwards.use_fast_path = False
    blocks.to(args.device)
    x = torch.randn(args.batch, args.length, args.dim).to(args.device)
    half = args.device != 'cpu'

    def run():
        hidden, residual = x, None
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=half):
            for block in blocks:
                hidden, residual = block(hidden, residual)
        return (hidden.float() + residual).square().mean()

    def train():
        blocks.zero_grad()
        run().backward()

    def infer():
        with torch.no_grad():
            return run()

    result = {'loss': infer().item()}
    train()
    result['gradient'] = blocks[0].forwards.A_log.grad.norm().item()
    for name, function in (('inference', infer), ('training', train)):
        result[name] = milliseconds(function, args.device, args.times)
    print(json.dumps(result))


if __name__ == '__main__':
    main()
