#!/usr/bin/env python3
"""Integration error of each method on a smooth signal, and its order.

    python tools/studies/discretization/integration_error.py --out results

The equation h' = A h + u(t), h(0) = 0, with u(t) = 1 - cos 2πt on [0, 1] and A = -1, -4, -16 has
the exact solution

    h(t) = (e^{At} - 1)/A - (A e^{At} - A cos ωt + ω sin ωt)/(A² + ω²),  ω = 2π.

Each method steps through it with mmvim.ops.selective_scan in float64 at Δ = 1/8 to 1/512, given
u at the end of each step as in a model, and the largest error over the last half is kept. A row of
<out>/integration.csv: method, A, steps, relative error; the order is the slope between two rows.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'benchmark'))

import torch
from common import open_rows

from mmvim.ops import DISCRETIZATIONS, selective_scan

POLES = (-1.0, -4.0, -16.0)
STEPS = (8, 16, 32, 64, 128, 256, 512)
OMEGA = 2 * math.pi


def main(argv: list[str] | None = None) -> int:
    """Compute and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, required=True, help='folder of the table')
    args = parser.parse_args(argv)
    path = args.out / 'integration.csv'
    with open_rows(path, ['method', 'A', 'steps', 'error']) as write:
        for row in rows():
            write(row)
    print(path)
    return 0


def rows() -> Iterator[dict]:
    """The table."""
    for method in DISCRETIZATIONS:
        for pole in POLES:
            for steps in STEPS:
                yield dict(
                    method=method, A=pole, steps=steps, error=f'{error(method, pole, steps):.6g}'
                )


def exact(pole: float, t: torch.Tensor) -> torch.Tensor:
    """h(t)."""
    decay = torch.exp(pole * t)
    wave = pole * decay - pole * torch.cos(OMEGA * t) + OMEGA * torch.sin(OMEGA * t)
    return (decay - 1) / pole - wave / (pole**2 + OMEGA**2)


def error(method: str, pole: float, steps: int) -> float:
    """Largest error over the last half, relative to the largest exact value there."""
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    u = (1 - torch.cos(OMEGA * t)).view(1, steps, 1)
    one = torch.ones(1, steps, 1, dtype=torch.float64)
    A = torch.tensor([[pole]], dtype=torch.float64)
    h = selective_scan(u, one / steps, A, one, one, discretization=method).flatten()
    truth = exact(pole, t)
    half = slice(steps // 2, None)
    return float((h - truth)[half].abs().max() / truth[half].abs().max())


if __name__ == '__main__':
    sys.exit(main())
