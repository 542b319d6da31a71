#!/usr/bin/env python
"""Hidden attention and Δ of scans over an image: python tools/analysis/scan_maps.py MODEL IMAGE"""

import argparse
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmvim.analysis.pictures import draw_maps
from mmvim.analysis.scans import Scan, hidden_attention, record_scans
from mmvim.analysis.subjects import backbone_of, open_model, read_subject
from mmvim.cli import analysis
from mmvim.errors import UserError
from mmvim.models.backbones.base import TokenLayout


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Draw what scans do with an image, for each layer and direction: the hidden '
        'attention (Ali et al., arXiv 2403.01590) of the class token, or of all tokens '
        'on average where there is none or --token says another, and the step sizes Δ.'
    )
    parser.add_argument('model', help='path of a config, or a name of the model zoo')
    parser.add_argument('image', help='image, or, for a video model, a video')
    parser.add_argument(
        '--weights', help="checkpoint, or 'zoo' for the authors' weights (default: random)"
    )
    parser.add_argument('--what', choices=('attention', 'delta'), default='attention')
    parser.add_argument(
        '--layers', nargs='+', type=int, metavar='N', help='mixers, from 0 (default: four of all)'
    )
    parser.add_argument(
        '--token',
        nargs=2,
        type=int,
        metavar=('ROW', 'COLUMN'),
        help='whose attention is drawn (not for videos)',
    )
    analysis.add_arguments(parser)
    return parser.parse_args()


def values(scan: Scan, layout: TokenLayout, args: argparse.Namespace):
    """The map of one scan, of the first image."""
    if args.what == 'delta':
        return layout.to_map(scan.delta.mean(-1))[0]
    matrices = hidden_attention(scan, reduce='abs')
    if args.token is None:
        return layout.to_map(layout.to_rows(matrices))[0]
    if layout.window not in (None, layout.size) or layout.steps is not None:
        raise UserError('--token is for images whose tokens form one sequence')
    row, column = args.token
    rows, columns = layout.size
    if not (0 <= row < rows and 0 <= column < columns):
        raise UserError(f'--token {row} {column} is outside the {rows} x {columns} tokens')
    place = row * columns + column
    place += sum(token <= place for token in layout.class_tokens)
    return layout.to_map(matrices[:, place])[0]


def run(args: argparse.Namespace) -> None:
    """Draw as the command line says."""
    if args.token is not None and args.what == 'delta':
        raise UserError('--token is for --what attention')
    cfg = analysis.config_of(args.model, args)
    model = open_model(cfg, analysis.weights_of(args.model, args.weights))
    backbone = backbone_of(model)
    frames = args.frames or getattr(backbone, 'num_frames', None)
    picture, images = read_subject(cfg, model, args.image, args.shape, frames)
    scans = record_scans(backbone, images)
    names = list(dict.fromkeys(scan.layer for scan in scans))
    if args.layers is None:
        args.layers = sorted({round(i * (len(names) - 1) / 3) for i in range(4)})
    if not all(0 <= i < len(names) for i in args.layers):
        raise UserError(f'--layers {args.layers}: the model has mixers 0 .. {len(names) - 1}')
    rows = []
    for i in args.layers:
        layout = backbone.token_layout(images.shape, names[i])
        maps = {s.direction: values(s, layout, args) for s in scans if s.layer == names[i]}
        if len(maps) > 1 and args.what == 'attention':
            maps['both' if len(maps) == 2 else 'all'] = sum(maps.values())
        rows.append((f'mixer {i}', maps))
    what = 'hidden attention' if args.what == 'attention' else 'mean Δ'
    if args.token:
        what += f' of token {tuple(args.token)}'
    what += analysis.note_on(args.weights)
    with analysis.complete_file(args.out) as path:
        draw_maps(picture, rows, path, title=what)
    print(f'{what} of {len(rows)} of {len(names)} mixers: {args.out}')


if __name__ == '__main__':
    analysis.run(run, parse_args())
