#!/usr/bin/env python
"""Effective receptive fields: python tools/analysis/receptive_field.py MODEL … --out erf.png"""

import argparse
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from mmvim.analysis.pictures import draw_fields
from mmvim.analysis.saliency import effective_receptive_field, high_contribution_area
from mmvim.analysis.subjects import backbone_of, open_model, read_subject, size_for
from mmvim.apis.inferencers.common import find_images
from mmvim.cli import analysis
from mmvim.errors import UserError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Draw how much each pixel contributes to the middle of the last feature map '
        '(Luo et al., arXiv 1701.04128), for one model or several side by side.'
    )
    parser.add_argument('model', nargs='+', help='paths of configs, or names of the model zoo')
    parser.add_argument(
        '--weights',
        nargs='+',
        metavar='FILE',
        help="a checkpoint, 'zoo' or 'none' for each model (default: random weights)",
    )
    parser.add_argument('--images', nargs='+', help='files, folders, patterns (default: noise)')
    parser.add_argument('--count', type=int, default=8, help='images at most (default: 8)')
    parser.add_argument('--seed', type=int, default=0, help='of noise and of random weights')
    analysis.add_arguments(parser, frames=False)
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Draw as the command line says."""
    if args.count < 1:
        raise UserError(f'--count must be at least 1, not {args.count}')
    weights = args.weights or ['none'] * len(args.model)
    if len(weights) != len(args.model):
        raise UserError(f'--weights has {len(weights)} entries for {len(args.model)} models')
    files = find_images(args.images)[: args.count] if args.images else None
    fields = {}
    for name, file in zip(args.model, weights, strict=True):
        torch.manual_seed(args.seed)
        file = analysis.weights_of(name, None if file == 'none' else file)
        cfg = analysis.config_of(name, args)
        if cfg.model.backbone.get('num_frames'):
            raise UserError(f'{name!r} is a model of videos; receptive fields are of images')
        pooled = {'pool': None} if 'pool' in cfg.model.backbone else {}
        model = open_model(cfg, file, out_type='featmap', **pooled)
        backbone = backbone_of(model)
        field = None
        for i in range(len(files) if files else args.count):
            if files:
                _, image = read_subject(cfg, model, files[i], args.shape)
            else:
                channels = cfg.model.backbone.get('in_channels', 3)
                image = torch.randn(1, channels, *size_for(model, args.shape))
            new = effective_receptive_field(backbone, image)
            if field is not None and field.shape != new.shape:
                raise UserError(
                    f'{files[i]!r} comes out of the test pipeline with {tuple(new.shape)} pixels, '
                    f'the images before with {tuple(field.shape)}: --shape gives all one size'
                )
            field = new if field is None else field + new
        title = Path(name).stem if name.endswith('.py') else name
        title += analysis.note_on(file)
        fields[title if title not in fields else f'{title} ({len(fields)})'] = field / field.max()
        areas = high_contribution_area(field)
        text = ', '.join(f'{share:.0%} in {area:.1%}' for share, area in areas.items())
        print(f'{title}: share of the contributions in a square of that area: {text}')
    with analysis.complete_file(args.out) as path:
        draw_fields(fields, path)
    print(f'receptive fields: {args.out}')


if __name__ == '__main__':
    analysis.run(run, parse_args())
