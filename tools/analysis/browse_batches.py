#!/usr/bin/env python
"""Batches of a data loader: python tools/analysis/browse_batches.py CONFIG --out batch.png"""

import argparse
import itertools
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from mmvim.analysis.batches import browse, draw_samples
from mmvim.cli import analysis
from mmvim.cli.options import ConfigOptions
from mmvim.errors import UserError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Draw samples of a data loader as the model gets them: augmented, mixed and '
        'padded, with their classes, boxes or label maps.'
    )
    parser.add_argument('model', help='path of a config, or a name of the model zoo')
    parser.add_argument('--split', choices=('train', 'val', 'test'), default='train')
    parser.add_argument('--count', type=int, default=16, help='samples (default: 16)')
    parser.add_argument('--seed', type=int, default=0, help='of order and augmentation')
    parser.add_argument('--out', type=Path, required=True, help='picture: .png, .jpg, .svg, .pdf')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing picture')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, default={}, metavar='KEY=VALUE'
    )
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Draw as the command line says."""
    if args.count < 1:
        raise UserError(f'--count must be at least 1, not {args.count}')
    cfg = analysis.config_of(args.model, args)
    samples = list(itertools.islice(browse(cfg, args.split, args.seed), args.count))
    if not samples:
        raise UserError(f'the {args.split}_dataloader yields nothing')
    with analysis.complete_file(args.out) as path:
        draw_samples(samples, path)
    print(f'{len(samples)} samples: {args.out}')


if __name__ == '__main__':
    analysis.run(run, parse_args())
