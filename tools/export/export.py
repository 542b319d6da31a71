#!/usr/bin/env python
"""Write a model as a file that runs without mmvim: python tools/export/export.py MODEL OUT"""

import argparse
import logging
import os
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmengine.logging import MMLogger

from mmvim._configs import merge_options
from mmvim.apis import load_config
from mmvim.apis.inferencers.common import make_model
from mmvim.apis.inputs import input_shape
from mmvim.cli.diagnosis import reported_errors
from mmvim.cli.options import ConfigOptions
from mmvim.errors import UserError
from mmvim.export.formats import (
    DYNAMIC,
    FORMATS,
    ExportError,
    export_model,
    format_of,
    quantize,
)
from mmvim.export.metadata import describe


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Export a classifier (logits), segmentor (logits), detector (feature maps) or '
        'backbone, and check that the file gives the same outputs. Formats by suffix: '
        + ', '.join(f'{suffix} {name}' for name, suffix in FORMATS.items())
    )
    parser.add_argument('model', help='path of a config, or a name of the model zoo')
    parser.add_argument('out', type=Path, help='file to write')
    parser.add_argument(
        '--weights', help="checkpoint, or 'zoo' for the authors' weights (default: random)"
    )
    parser.add_argument(
        '--shape',
        nargs='+',
        type=int,
        metavar='SIDE',
        help="height and width (default: those of the test pipeline, else the model's img_size)",
    )
    parser.add_argument('--frames', type=int, help="frames of a video (default: the model's)")
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument(
        '--dynamic', choices=DYNAMIC, help="what may vary (default: batch; 'none' for aoti)"
    )
    parser.add_argument('--opset', type=int, help='version of the ONNX operators, 18 or later')
    parser.add_argument('--int8', type=Path, metavar='FILE', help='also an ONNX file in int8')
    parser.add_argument('--overwrite', action='store_true')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, default={}, metavar='KEY=VALUE'
    )
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Export as the command line says."""
    kind = format_of(args.out)
    if args.shape and (len(args.shape) > 2 or min(args.shape) < 1):
        raise UserError(f'--shape takes one or two positive sides, not {args.shape}')
    if args.int8 and kind != 'onnx':
        raise UserError('--int8 quantises ONNX files: OUT must end with .onnx')
    cfg = load_config(args.model)
    merge_options(cfg, args.cfg_options)
    weights = args.weights
    if weights == 'zoo':
        from mmvim.apis import model_info

        weights = model_info(args.model).weights
    model = make_model(args.model, cfg, weights)
    shape = input_shape(cfg, model, size=args.shape, frames=args.frames)
    report = export_model(
        model,
        args.out,
        kind,
        (args.batch, *shape),
        dynamic=args.dynamic or ('none' if kind == 'aoti' else 'batch'),
        metadata={'shape': list(shape), **describe(cfg, model)},
        overwrite=args.overwrite,
        opset=args.opset,
    )
    size = os.path.getsize(report.path) / 2**20
    print(f'{report.path}: {report.format}, {size:.1f} MiB, exported in {report.seconds:.0f} s')
    for shape, difference in report.differences.items():
        print(f'  input {"x".join(map(str, shape))}: largest difference {difference:.1e}')
    if args.int8:
        quantize(report.path, args.int8, overwrite=args.overwrite)
        print(f'{args.int8}: int8, {os.path.getsize(args.int8) / 2**20:.1f} MiB')


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with reported_errors():
        MMLogger.get_current_instance().setLevel(logging.ERROR)
        try:
            run(args)
        except (ExportError, ValueError, FileExistsError, FileNotFoundError) as error:
            raise UserError(str(error)) from error


if __name__ == '__main__':
    main()
