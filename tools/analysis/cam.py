#!/usr/bin/env python
"""Grad-CAM of a classifier over images: python tools/analysis/cam.py MODEL IMAGES --out cam.png"""

import argparse
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmvim.analysis.pictures import draw_maps
from mmvim.analysis.saliency import class_activation_map, default_cam_layer
from mmvim.analysis.subjects import backbone_of, open_model, read_subject
from mmvim.cli import analysis
from mmvim.errors import UserError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Draw where in images a classifier sees a class (Grad-CAM, arXiv 1610.02391).'
    )
    parser.add_argument('model', help='path of a config, or a name of the model zoo')
    parser.add_argument('images', nargs='+', help='images, or one video for a video model')
    parser.add_argument(
        '--weights', help="checkpoint, or 'zoo' for the authors' weights (default: random)"
    )
    parser.add_argument('--target', type=int, metavar='CLASS', help="default: each image's best")
    parser.add_argument(
        '--layer', help='module whose output is looked at (default: before the last mixer)'
    )
    analysis.add_arguments(parser)
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Draw as the command line says."""
    cfg = analysis.config_of(args.model, args)
    model = open_model(cfg, analysis.weights_of(args.model, args.weights))
    frames = args.frames or getattr(backbone_of(model), 'num_frames', None)
    if frames is not None and len(args.images) > 1:
        raise UserError('a video model takes one video at a time')
    rows, pictures = [], []
    for name in args.images:
        picture, images = read_subject(cfg, model, name, args.shape, frames)
        maps, classes, scores = class_activation_map(model, images, args.target, args.layer)
        rows.append((Path(name).stem, {f'class {int(classes)}, {float(scores):.0%}': maps[0]}))
        pictures.append(picture)
        print(f'{name}: class {int(classes)}, {float(scores):.1%}')
    title = f'Grad-CAM at {args.layer or default_cam_layer(model)}'
    title += analysis.note_on(args.weights)
    with analysis.complete_file(args.out) as path:
        draw_maps(pictures if frames is None else pictures[0], rows, path, title=title)
    print(f'maps: {args.out}')


if __name__ == '__main__':
    analysis.run(run, parse_args())
