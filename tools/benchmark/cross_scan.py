#!/usr/bin/env python3
"""Time VMamba's four-route scan, and what stands around it, in the stages of its models.

    python tools/benchmark/cross_scan.py --csv cross_scan.csv [--peer selective_scan_cuda.so]

Kernels in a CUDA graph, as tools/benchmark/ops.py times them; bfloat16, zero-order hold, all four
routes, step sizes of low rank, as SS2D calls the op. `cross_scan`: the op. `by route`: the same op
as a selective scan of each route, which it is where its kernels do not reach. `mamba_ssm`: its
compiled scan of four copies of the map; `mamba_ssm, all` adds the copies, the projections and the
sum of the outputs, as the authors of VMamba document them (on their own kernels, which do not
compile with CUDA 13); its backward pass is autograd's. `floor`: the time in which the op's inputs
and outputs, each once, pass at the speed of an elementwise kernel of the same run.
Errors are relative in the Euclidean norm to the PyTorch path in float64 on the first images: of the
output, and the largest of a gradient.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common import open_rows
from ops import Clock, copy_rate, find_peers
from torch import Tensor
from torch.nn import functional as F

from mmvim.layers import SS2D
from mmvim.ops import ROUTES, cross_scan

# name: (batch, height, width, channels, states, rank)
SHAPES = {
    'tiny-stage1': (128, 56, 56, 96, 1, 6),
    'tiny-stage2': (128, 28, 28, 192, 1, 12),
    'tiny-stage3': (128, 14, 14, 384, 1, 24),
    'tiny-stage4': (128, 7, 7, 768, 1, 48),
    'base-stage1': (128, 56, 56, 128, 1, 8),
    'tiny-1024-stage1': (2, 256, 256, 96, 1, 6),
    'tiny-1024-stage2': (2, 128, 128, 192, 1, 12),
    'tiny-1024-stage3': (2, 64, 64, 384, 1, 24),
    'vanilla-stage1': (64, 56, 56, 192, 16, 6),
    'vanilla-stage3': (64, 14, 14, 768, 16, 24),
}
FIELDS = (
    'shape', 'batch', 'height', 'width', 'channels', 'states', 'rank', 'direction',
    'implementation', 'us', 'floor_us', 'error',
)  # fmt: skip
ORDER = ('x', 'delta', 'A', 'B', 'C', 'D', 'delta_bias', 'delta_weight')


def inputs_of(
    shape: tuple, dtype: torch.dtype = torch.bfloat16, device: str = 'cuda'
) -> dict[str, Tensor]:
    """Tensors of one call; step sizes, B and C lie in one buffer, as SS2D makes them."""
    b, h, w, d, n, r = shape
    g = torch.Generator(device).manual_seed(0)

    def randn(*sizes):
        return torch.randn(*sizes, generator=g, device=device)

    joined = randn(b, h, w, 4, r + 2 * n).to(dtype)
    low, B, C = joined.split((r, n, n), -1)
    return {
        'x': randn(b, h, w, d).to(dtype),
        'delta': low,
        'A': -torch.arange(1, n + 1.0, device=device).repeat(4, d, 1),
        'B': B,
        'C': C,
        'D': randn(4, d),
        'delta_bias': randn(4, d) * 0.5 - 4,
        'delta_weight': randn(4, d, r) / r**0.5,
        'grad': randn(b, h, w, d).to(dtype),
    }


def ours(x: dict[str, Tensor], fused: bool) -> tuple:
    """Forward, forward for training, backward."""
    tensors = [x[k] for k in ('x', 'delta', 'delta_weight', 'A', 'B', 'C', 'D', 'delta_bias')]
    ops, options = torch.ops.mmvim, ([0, 1, 2, 3], True, 'zoh')
    if not fused:

        def forward(keep=32):
            return ops.cross_scan(*tensors, *options, keep)

        kept = forward()[1]
        return forward, forward, lambda: ops.cross_scan_backward(
            x['grad'], *tensors, kept, *options, 32
        )  # fmt: skip
    from mmvim.ops.cross_scan import _round_steps

    steps = _round_steps(ops, x['x'], x['delta_weight'], x['A'], [0, 1, 2, 3], True, 'zoh')
    kept = ops.cross_scan_fused(*tensors, *options, steps, True)[1]
    return (
        lambda: ops.cross_scan_fused(*tensors, *options, steps, False),
        lambda: ops.cross_scan_fused(*tensors, *options, steps, True),
        lambda: ops.cross_scan_fused_backward(x['grad'], *tensors, kept, *options, steps),
    )


class MambaSsmScan(torch.autograd.Function):
    """`mamba_ssm`'s compiled scan without a gate, in its layout (b, d, l)."""

    module: object = None

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, delta_bias):
        """Scan (b, d, l)."""
        out, states, *_ = MambaSsmScan.module.fwd(u, delta, A, B, C, D, None, delta_bias, True)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, states)
        return out

    @staticmethod
    def backward(ctx, grad):
        """Gradients of the inputs."""
        u, delta, A, B, C, D, delta_bias, states = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, dbias, *_ = MambaSsmScan.module.bwd(
            u,
            delta,
            A,
            B,
            C,
            D,
            None,
            delta_bias,
            grad.contiguous(),
            states,
            None,
            None,
            True,
            False,
        )
        return du, ddelta, dA, dB, dC, dD, dbias


def four_copies(x: Tensor) -> Tensor:
    """A map (b, d, h, w) as the four sequences (b, 4, d, h w)."""
    two = torch.stack((x.flatten(2), x.transpose(2, 3).flatten(2)), 1)
    return torch.cat((two, two.flip(-1)), 1)


def merged(y: Tensor, h: int, w: int) -> Tensor:
    """The sum of four sequences (b, 4, d, h w) as a map (b, h, w, d)."""
    b, _, d, _ = y.shape
    y = y[:, :2] + y[:, 2:].flip(-1)
    y = y[:, 0].view(b, d, h, w) + y[:, 1].view(b, d, w, h).transpose(2, 3)
    return y.permute(0, 2, 3, 1)


def scan_copies(x, projection, weight, A, D, bias) -> Tensor:
    """The four-route scan of (b, d, h, w) on copies, in the documented steps of the authors."""
    b, d, h, w = x.shape
    rank = weight.shape[2]
    copies = four_copies(x)
    columns = torch.einsum('bkdl,kcd->bkcl', copies, projection.to(x.dtype))
    low, B, C = columns.split((rank, A.shape[-1], A.shape[-1]), 2)
    delta = torch.einsum('bkrl,kdr->bkdl', low, weight.to(x.dtype))
    y = MambaSsmScan.apply(
        copies.flatten(1, 2), delta.contiguous().flatten(1, 2), A.flatten(0, 1), B.contiguous(),
        C.contiguous(), D.flatten(), bias.flatten(),
    )  # fmt: skip
    return merged(y.view(b, 4, d, h * w), h, w)


class OnMambaSsm(SS2D):
    """SS2D in the documented steps of the authors, on `mamba_ssm`'s scan: the peer.

    Maps are (b, d, h, w) between the projections; parameters are those of SS2D.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Mix over the map (b, h, w, d)."""
        x = self.in_proj(x)
        z = None
        if self.gated:
            x, z = x.chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        inner = self.d_inner
        y = scan_copies(
            x, self.x_proj_weight, self.dt_projs_weight,
            -torch.exp(self.A_logs.float()).view(4, inner, -1), self.Ds.view(4, inner),
            self.dt_projs_bias,
        )  # fmt: skip
        y = self.out_norm(y)
        return self.out_proj(y if z is None else y * F.silu(z))


def peer_calls(x: dict[str, Tensor]) -> dict[str, tuple]:
    """Forward and backward of the peer: the scan alone, and all steps."""
    d = x['x'].shape[3]
    n, rank = x['A'].shape[2], x['delta'].shape[-1]
    u = four_copies(x['x'].permute(0, 3, 1, 2).contiguous()).flatten(1, 2)
    low = x['delta'].permute(0, 3, 4, 1, 2).flatten(3).contiguous()
    delta = torch.einsum('bkrl,kdr->bkdl', low, x['delta_weight'].to(low.dtype))
    delta = delta.contiguous().flatten(1, 2)
    B, C = (x[k].permute(0, 3, 4, 1, 2).flatten(3).contiguous() for k in ('B', 'C'))
    rest = x['A'].flatten(0, 1), B, C, x['D'].flatten()
    bias, module = x['delta_bias'].flatten(), MambaSsmScan.module
    states = module.fwd(u, delta, *rest, None, bias, True)[1]
    grad = torch.randn_like(u)
    image = x['x'].permute(0, 3, 1, 2).contiguous().requires_grad_()
    projection = torch.randn(4, rank + 2 * n, d, device=image.device).requires_grad_()
    leaves = [image, projection, *(x[k].detach().clone().requires_grad_()
              for k in ('delta_weight', 'A', 'D', 'delta_bias'))]  # fmt: skip

    def forward():
        with torch.no_grad():
            return scan_copies(*leaves)

    def both():
        return torch.autograd.grad(scan_copies(*leaves), leaves, x['grad'])

    return {
        'mamba_ssm': (
            lambda: module.fwd(u, delta, *rest, None, bias, True),
            lambda: module.bwd(u, delta, *rest, None, bias, grad, states, None, None, True, False),
            None,
        ),
        'mamba_ssm, all': (forward, None, both),
    }


def errors_of(shape: tuple) -> tuple[float, float]:
    """Relative errors of the output, and the largest of a gradient."""
    b, *rest = shape
    x = inputs_of((min(b, 2), *rest))
    results = []
    for dtype, backend in ((None, 'compiled'), (torch.float64, 'torch')):
        leaves = {k: x[k].detach().to(dtype or x[k].dtype).requires_grad_() for k in ORDER}
        out = cross_scan(**leaves, delta_softplus=True, routes=ROUTES, backend=backend)
        grads = torch.autograd.grad(out, list(leaves.values()), x['grad'].to(out.dtype))
        results.append([t.double() for t in (out, *grads)])
    error = [((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]
    return error[0], max(error[1:])


def measure(name: str, shape: tuple, clock: Clock, rate: float, peer: bool, errors: bool):
    """Rows of one shape."""
    b, h, w, d, n, r = shape
    x = inputs_of(shape)
    tokens = b * h * w
    low, activation = tokens * 4 * (r + 2 * n) * 2, tokens * d * 2
    floors = {'forward': 2 * activation + low, 'backward': 3 * activation + 2 * low}
    floors['training-forward'] = floors['forward']
    floors['forward+backward'] = floors['forward'] + floors['backward']
    found = errors_of(shape) if errors else (None, None)

    def row(direction, implementation, call, error=None):
        time = clock([call])[0]
        return dict(
            zip(
                FIELDS,
                (name, *shape, direction, implementation, round(time, 1),
                 round(floors[direction] / rate * 1e6, 1),
                 '' if error is None else f'{error:.1e}'),
                strict=True,
            )
        )  # fmt: skip

    for fused, label in ((True, 'cross_scan'), (False, 'by route')):
        if fused and n > 4:
            continue  # the op is a scan of each route
        forward, training, backward = ours(x, fused)
        yield row('forward', label, forward, found[0] if fused else None)
        if fused:
            yield row('training-forward', label, training)
        yield row('backward', label, backward, found[1] if fused else None)
        del forward, training, backward
    if not peer:
        return
    for label, (forward, backward, both) in peer_calls(x).items():
        yield row('forward', label, forward)
        if backward is not None:
            yield row('backward', label, backward)
        if both is not None:
            yield row('forward+backward', label, both)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--shapes', nargs='+', choices=SHAPES, default=list(SHAPES), metavar='NAME')
    parser.add_argument('--peer', help='file of selective_scan_cuda; default: what can be imported')
    parser.add_argument('--no-errors', action='store_true')
    parser.add_argument('--seconds', type=float, default=0.05, help='for each measurement, about')
    parser.add_argument('--csv', type=Path)
    args = parser.parse_args()
    clock = Clock(torch.device('cuda'), args.seconds)
    modules = find_peers([f'mamba_ssm={args.peer}'] if args.peer else [])
    MambaSsmScan.module = modules.get('mamba_ssm')
    rate = copy_rate(torch.device('cuda'), clock)
    head = f'# {torch.cuda.get_device_name()}, torch {torch.__version__}, {rate / 1e12:.2f} TB/s'
    print(head, flush=True)
    with open_rows(args.csv, FIELDS, head) as write:
        for name in args.shapes:
            peer = MambaSsmScan.module is not None
            for row in measure(name, SHAPES[name], clock, rate, peer, not args.no_errors):
                write(row)
                print(
                    f'{name:18} {row["direction"]:17} {row["implementation"]:16} {row["us"]:9.1f}'
                    f' us  floor {row["floor_us"]:7.1f}  {row["error"]}',
                    flush=True,
                )
            torch.cuda.empty_cache()
    return 0


if __name__ == '__main__':
    sys.exit(main())
