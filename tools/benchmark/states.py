#!/usr/bin/env python3
"""Times of scans with 1 to 32 states, and of `mamba_ssm`, in the shapes of all families.

    python tools/benchmark/states.py --csv states.csv [--peer selective_scan_cuda.so] [--states 1 2]

Kernels alone, in a CUDA graph, as tools/benchmark/ops.py times them; bfloat16, zero-order hold.
`groups` is the number of groups of B and C. Errors are of mmvim's gradients, relative in the
Euclidean norm to the PyTorch path in float64 on the first entry of the batch.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common import open_rows
from ops import CHECKPOINTS, Clock, find_peers, turned

# name: (batch, channels, length, groups, gate)
SHAPES = {
    'vim-t-224': (128, 384, 197, 1, True),
    'vim-s-224': (128, 768, 197, 1, True),
    'vim-t-1024': (2, 384, 4097, 1, True),
    'videomamba-t-8x224': (32, 384, 1569, 1, True),
    'mambavision-t-stage3': (128, 160, 196, 1, False),
    'mambavision-t-stage4': (128, 320, 49, 1, False),
    'vmamba-t-stage1': (128, 384, 3136, 4, False),
    'vmamba-t-stage2': (128, 768, 784, 4, False),
    'vmamba-t-stage3': (128, 1536, 196, 4, False),
    'vmamba-t-stage4': (128, 3072, 49, 4, False),
}
NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')
FIELDS = (
    *('shape', 'batch', 'channels', 'length', 'groups', 'gate', 'states', 'direction'),
    *('mmvim_us', 'mamba_ssm_us', 'factor', 'error'),
)


def inputs_of(shape: tuple, states: int, seed: int) -> dict:
    """Tensors of one scan on the GPU."""
    b, d, length, groups, gate = shape
    g = torch.Generator('cuda').manual_seed(seed)

    def r(*sizes, dtype=torch.bfloat16):
        return torch.randn(*sizes, generator=g, device='cuda').to(dtype)

    return {
        'u': r(b, length, d),
        'delta': r(b, length, d),
        'A': -torch.arange(1, states + 1.0, device='cuda').repeat(d, 1),
        'B': r(b, length, groups, states),
        'C': r(b, length, groups, states),
        'D': r(d, dtype=torch.float32),
        'z': r(b, length, d) if gate else None,
        'delta_bias': r(d, dtype=torch.float32) * 0.5 - 4,
        'grad': r(b, length, d),
    }


def ours(x: dict) -> tuple:
    """Forward and backward of mmvim."""
    ops, tensors = torch.ops.mmvim, [x[k] for k in NAMES]

    def forward():
        return ops.selective_scan(*tensors, None, True, 'zoh', False, False, CHECKPOINTS)

    kept = forward()[2]

    def backward():
        return ops.selective_scan_backward(
            x['grad'], None, *tensors, None, kept, True, 'zoh', False, CHECKPOINTS
        )

    return forward, backward


def peers(module: object, x: dict) -> tuple:
    """Forward and backward of `mamba_ssm`, in its layout."""
    u, delta, grad = (turned(x[k]) for k in ('u', 'delta', 'grad'))
    z = None if x['z'] is None else turned(x['z'])
    B, C = (x[k].permute(0, 2, 3, 1).contiguous() for k in ('B', 'C'))
    rest = x['D'], z, x['delta_bias']

    def forward():
        return module.fwd(u, delta, x['A'], B, C, *rest, True)

    out, states = forward()[:2]
    out = None if z is None else out

    def backward():
        return module.bwd(u, delta, x['A'], B, C, *rest, grad, states, out, None, True, False)

    return forward, backward


def error_of(x: dict) -> float:
    """The largest error of a gradient."""
    first = {k: v if v is None or k in ('A', 'D', 'delta_bias') else v[:1] for k, v in x.items()}
    found = ours(first)[1]()
    wide = {k: v if v is None else v.double() for k, v in first.items()}
    tensors = [wide[k] for k in NAMES]
    torch_ops = torch.ops.mmvim_torch
    kept = torch_ops.selective_scan(*tensors, None, True, 'zoh', False, False, CHECKPOINTS)[2]
    expected = torch_ops.selective_scan_backward(
        wide['grad'], None, *tensors, None, kept, True, 'zoh', False, CHECKPOINTS
    )
    return max(
        float((a.double() - b).norm() / b.norm())
        for a, b in zip(found, expected, strict=True)
        if b.numel()
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--states', nargs='+', type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument('--shapes', nargs='+', choices=SHAPES, default=list(SHAPES))
    parser.add_argument('--peer', metavar='FILE', help="mamba_ssm's selective_scan_cuda")
    parser.add_argument('--seconds', type=float, default=0.03, help='for each measurement, about')
    parser.add_argument('--csv', type=Path, required=True)
    args = parser.parse_args()
    module = find_peers([f'mamba_ssm={args.peer}'] if args.peer else []).get('mamba_ssm')
    clock = Clock(torch.device('cuda'), args.seconds)
    head = f'# {torch.cuda.get_device_name()}, torch {torch.__version__}'
    print(head)
    with open_rows(args.csv, FIELDS, head) as write:
        for name in args.shapes:
            for states in args.states:
                sets = [inputs_of(SHAPES[name], states, seed) for seed in range(2)]
                error = error_of(sets[0])
                mine = [ours(x) for x in sets]
                other = [peers(module, x) for x in sets] if module else None
                for i, direction in enumerate(('forward', 'backward')):
                    time = clock([calls[i] for calls in mine])[0]
                    peer = clock([calls[i] for calls in other])[0] if other else None
                    b, d, length, groups, gate = SHAPES[name]
                    write(
                        dict(
                            shape=name, batch=b, channels=d, length=length, groups=groups,
                            gate=gate, states=states, direction=direction,
                            mmvim_us=round(time, 1),
                            mamba_ssm_us=round(peer, 1) if peer else None,
                            factor=round(peer / time, 2) if peer else None, error=f'{error:.1e}',
                        )
                    )  # fmt: skip
                    factor = f'{peer / time:.2f}x' if peer else ''
                    print(
                        f'{name:22} n={states:<2} {direction:8} {time:9.1f} us {factor}', flush=True
                    )


if __name__ == '__main__':
    main()
