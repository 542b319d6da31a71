#!/usr/bin/env python
"""Write a model as a file that runs without mmvim: python tools/export/export.py MODEL OUT"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from torch import nn

from mmvim._configs import merge_options
from mmvim.apis import load_config
from mmvim.apis.inferencers.common import find_images, make_model
from mmvim.apis.inferencers.pipeline import InferencePipeline
from mmvim.apis.inputs import input_shape
from mmvim.cli.diagnosis import reported_errors
from mmvim.cli.options import ConfigOptions
from mmvim.errors import UserError
from mmvim.export.formats import (
    DYNAMIC,
    FORMATS,
    TOLERANCES,
    Exportable,
    ExportError,
    as_function,
    compare,
    export_model,
    format_of,
    latency,
    open_exported,
)
from mmvim.export.metadata import describe
from mmvim.export.onnx_scan import custom_library
from mmvim.export.processing import Processed, WholeDetector
from mmvim.export.quantization import quantize
from mmvim.export.streaming import export_stream

BATCHES = (1, 8)
REPEATS = 10
INT8 = {
    'dynamic': 'also an ONNX file in int8, with activations scaled at run time',
    'static': 'the same, with scales from --calibration images',
    'weights': 'the same, with weights in int8 and activations in float32',
}


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
    parser.add_argument('--opset', type=int, help='version of the ONNX operators (18)')
    parser.add_argument(
        '--custom-ops',
        action='store_true',
        help="mmvim's compiled operators in the file: ONNX for onnxruntime with the library that "
        'is printed, a program or AOTInductor package for use with mmvim',
    )
    parser.add_argument(
        '--dtype', default='float32', choices=tuple(TOLERANCES), help='of weights and activations'
    )
    for mode, meaning in INT8.items():
        suffix = '' if mode == 'dynamic' else f'-{mode}'
        parser.add_argument(f'--int8{suffix}', type=Path, metavar='FILE', help=meaning)
    parser.add_argument(
        '--calibration', nargs='+', metavar='IMAGE', help='files, folders or patterns: some 100'
    )
    parser.add_argument(
        '--report', action='store_true', help='a table of size, difference and latency'
    )
    parser.add_argument('--threads', type=int, default=1, help='threads for --report')
    parser.add_argument(
        '--processing',
        action='store_true',
        help='pixels in (RGB or grey, 0 to 255), scores out, for classifiers and segmentors',
    )
    parser.add_argument(
        '--head', action='store_true', help="a single-stage detector's head, too, without its NMS"
    )
    parser.add_argument(
        '--stream',
        action='store_true',
        help='a step of a StreamingVideoMamba with its states as inputs and outputs, for chunks of '
        '--frames: OUT, and for the first chunk OUT_first.onnx',
    )
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
    files = {'dynamic': args.int8, 'static': args.int8_static, 'weights': args.int8_weights}
    files = {mode: file for mode, file in files.items() if file}
    if files and kind != 'onnx':
        raise UserError('--int8 quantises ONNX files: OUT must end with .onnx')
    if files and args.dtype != 'float32':
        raise UserError(f'--int8 quantises float32 files, not those of --dtype {args.dtype}')
    if args.stream and (
        kind != 'onnx'
        or files
        or args.report
        or args.processing
        or args.head
        or args.dtype != 'float32'
    ):
        raise UserError(
            '--stream writes float32 ONNX files: OUT must end with .onnx, without --int8, --dtype, '
            '--processing, --head and --report'
        )
    if files.get('static') and args.custom_ops:
        raise UserError("--int8-static runs the file without mmvim's library: no --custom-ops")
    if files.get('static') and args.processing:
        raise UserError('--int8-static is calibrated with preprocessed images: no --processing')
    if bool(args.calibration) is not ('static' in files):
        raise UserError('--int8-static and --calibration need each other')
    cfg = load_config(args.model)
    merge_options(cfg, args.cfg_options)
    weights = args.weights
    if weights == 'zoo':
        from mmvim.apis import model_info

        weights = model_info(args.model).weights
    model = make_model(args.model, cfg, weights)
    shape = input_shape(cfg, model, size=args.shape, frames=args.frames)
    metadata = {'shape': list(shape), **describe(cfg, model)}
    if args.stream:
        export_steps(getattr(model, 'backbone', model), (args.batch, *shape), metadata, args)
        return
    if args.head:
        model = WholeDetector(model)
        metadata['output'] = 'maps of the head'
    if args.processing:
        model = Processed(model, metadata)
        metadata.update(channels='grey' if metadata['channels'] == 'grey' else 'RGB')
        metadata.update(mean=[0.0], std=[1.0], output='scores', activation='none')
    report = export_model(
        model,
        args.out,
        kind,
        (args.batch, *shape),
        dynamic=args.dynamic or ('none' if kind == 'aoti' else 'batch'),
        metadata=metadata,
        overwrite=args.overwrite,
        opset=args.opset,
        dtype=args.dtype,
        custom_ops=args.custom_ops,
    )
    size = os.path.getsize(report.path) / 2**20
    print(f'{report.path}: {report.format}, {size:.1f} MiB, exported in {report.seconds:.0f} s')
    for tried, difference in report.differences.items():
        print(f'  input {"x".join(map(str, tried))}: largest difference {difference:.1e}')
    if args.custom_ops and kind == 'onnx':
        print(f'  onnxruntime needs {custom_library()}')
    for mode, file in files.items():
        images = calibration_images(cfg, model, args) if mode == 'static' else None
        quantize(report.path, file, mode, images=images, overwrite=args.overwrite)
        print(f'{file}: int8 ({mode}), {os.path.getsize(file) / 2**20:.1f} MiB')
    if args.report:
        print_report(model, [report.path, *files.values()], shape, args.threads)


def export_steps(
    model: nn.Module, shape: Sequence[int], metadata: dict, args: argparse.Namespace
) -> None:
    """Export the steps of a stream."""
    from mmvim.models import StreamingVideoMamba

    if not isinstance(model, StreamingVideoMamba):
        raise UserError(f'--stream exports a StreamingVideoMamba, not a {type(model).__name__}')
    options = {'overwrite': args.overwrite, 'opset': args.opset, 'custom_ops': args.custom_ops}
    differences = export_stream(model, args.out, shape, metadata=metadata, **options)
    for file, difference in differences.items():
        size = os.path.getsize(file) / 2**20
        print(f'{file}: onnx, {size:.1f} MiB, largest difference {difference:.1e}')


def calibration_images(cfg: Config, model: nn.Module, args: argparse.Namespace) -> Iterator:
    """The inputs of the model for the images of --calibration, one at a time."""
    pipeline = InferencePipeline(cfg, args.shape and (args.shape[0], args.shape[-1]))
    for image in find_images(args.calibration):
        data = model.data_preprocessor(pseudo_collate([pipeline(image)]), False)
        yield data['inputs'].float().numpy()


def print_report(
    model: nn.Module, files: Sequence[Path], shape: Sequence[int], threads: int
) -> None:
    """Print format, size, difference to PyTorch, and latency of a model and its files."""
    torch.set_num_threads(threads)
    module = Exportable(model.float())
    functions = {'PyTorch, mmvim ops': (None, as_function(module))}
    for file in files:
        functions[file.name] = file, open_exported(file, threads)
    random = np.random.default_rng(0)
    inputs = [random.standard_normal((n, *shape), np.float32) for n in BATCHES]
    heads = ' '.join(f'{f"ms, {n}":>9}' for n in BATCHES)
    print(f'{"file":<32} {"MiB":>7} {"difference":>10} {heads}   images, {threads} threads')
    for name, (file, function) in functions.items():
        size = f'{os.path.getsize(file) / 2**20:.1f}' if file else ''
        columns = []
        for images in inputs:
            try:
                columns.append(f'{latency(function, images, REPEATS):.1f}')
            except Exception:
                # A file for one batch only.
                columns.append('-')
        try:
            difference = f'{max(compare(module, function, [inputs[0].shape]).values()):.1e}'
        except Exception:
            difference = '-'
        cells = ' '.join(f'{column:>9}' for column in columns)
        print(f'{name:<32} {size:>7} {difference:>10} {cells}')


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
