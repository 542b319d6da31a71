#!/usr/bin/env python
"""Sizes of the states of all scans: python tools/analysis/state_norms.py MODEL IMAGE"""

import argparse
import json
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmvim.analysis.pictures import draw_norms
from mmvim.analysis.scans import record_scans, state_norms
from mmvim.analysis.subjects import backbone_of, open_model, read_subject
from mmvim.cli import analysis


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Draw the root mean square of the state of each scan, over layers and tokens.'
    )
    parser.add_argument('model', help='path of a config, or a name of the model zoo')
    parser.add_argument('image', help='image, or, for a video model, a video')
    parser.add_argument(
        '--weights', help="checkpoint, or 'zoo' for the authors' weights (default: random)"
    )
    parser.add_argument('--json', action='store_true', help='print the means over tokens as JSON')
    analysis.add_arguments(parser)
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Draw as the command line says."""
    cfg = analysis.config_of(args.model, args)
    model = open_model(cfg, analysis.weights_of(args.model, args.weights))
    backbone = backbone_of(model)
    frames = args.frames or getattr(backbone, 'num_frames', None)
    _, images = read_subject(cfg, model, args.image, args.shape, frames)
    norms: dict[str, dict] = {}
    for scan in record_scans(backbone, images):
        # Of a stage with windows, the mean over the windows.
        norms.setdefault(scan.direction, {})[scan.layer] = state_norms(scan).mean(0)
    with analysis.complete_file(args.out) as path:
        draw_norms(norms, path, f'states{analysis.note_on(args.weights)}')
    means = {
        direction: {layer: round(float(x.mean()), 6) for layer, x in by_layer.items()}
        for direction, by_layer in norms.items()
    }
    print(json.dumps(means, indent=2) if args.json else f'states: {args.out}')


if __name__ == '__main__':
    analysis.run(run, parse_args())
